"""Keys of clients, and what of them the instances see."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.proxy.scripted import MODEL, cluster

from twolane.errors import ConfigError
from twolane.proxy.flags import all_keys

BODY = {"model": MODEL, "prompt": "x"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic sesame"},
        {"Authorization": "sesame"},
        {"X-Api-Key": "sesam"},
    ],
)
async def test_without_a_key_nothing_but_health_is_answered(headers: dict[str, str]) -> None:
    async with cluster(api_keys=("sesame",)) as c:
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/stats"), ("GET", "/x")):
            answered = await c.http.request(method, path, headers=headers, json=BODY)
            assert answered.status_code == 401
            assert answered.headers["www-authenticate"] == "Bearer"
            assert answered.json()["error"]["type"] == "authentication_error"
        assert (await c.http.get("/health")).status_code == 200
        assert not c.p.calls
        assert not c.d.calls


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer two"}, {"Authorization": "bearer one"}, {"X-Api-Key": "two"}]
)
async def test_key_opens_and_stays_with_the_proxy(headers: dict[str, str]) -> None:
    async with cluster(api_keys=("one", "two")) as c:
        assert (await c.http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
        for leg in (await c.p.call(), await c.d.call()):
            assert "authorization" not in leg.headers
            assert "x-api-key" not in leg.headers


async def test_instances_get_their_own_key() -> None:
    async with cluster(api_keys=("one",), upstream_api_key="theirs") as c:
        headers = {"Authorization": "Bearer one"}
        assert (await c.http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
        assert (await c.p.call()).headers["authorization"] == "Bearer theirs"
        assert (await c.d.call()).headers["authorization"] == "Bearer theirs"


async def test_without_keys_of_the_proxy_the_clients_is_passed_on() -> None:
    async with cluster() as c:
        await c.http.post("/v1/completions", json=BODY, headers={"Authorization": "Bearer mine"})
        assert (await c.p.call()).headers["authorization"] == "Bearer mine"


def test_keys_come_from_flags_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nb\n\n  c  \n")
    assert all_keys(["a"], file) == ("a", "b", "c")
    assert all_keys([], None) == ()
    for text in ("", "# none\n", "two words\n", "\x00\n"):
        file.write_text(text)
        with pytest.raises(ConfigError):
            all_keys([], file)
    with pytest.raises(ConfigError, match="nowhere"):
        all_keys([], tmp_path / "nowhere")
