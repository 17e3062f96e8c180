"""A proxy with a secret: strangers at its discovery socket change nothing, are counted, and hear nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgspec
import pytest
import zmq
from tests.connector.strangers import MEMBERS_ONLY, RAW, SECRET, Relay, dealer, deployment_keys, raw
from tests.ports import free_port
from tests.proxy.scripted import Cluster, ScriptedInstance, cluster, eventually

from twolane import curve
from twolane.config import ProxySettings
from twolane.connector.register import Registrar
from twolane.curve import Keys
from twolane.protocol import Registration, Story, StoryEvent, clock_identity, encode
from twolane.proxy.discovery import _MAX_MESSAGE_BYTES
from twolane.proxy.pool import State
from twolane.proxy.service import Service

WAIT_S = 30.0
FORGED = Registration("D", "127.0.0.1:1", "127.0.0.1:2", "twolane", "forged")


@pytest.fixture(autouse=True)
def short_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "HANDSHAKE_S", 2.0)


def address_of(c: Cluster) -> str:
    return f"127.0.0.1:{c.service.discovery_port}"


class Member:
    """A real registrar, and the HTTP server that it speaks for."""

    def __init__(self, instance: ScriptedInstance, address: str, keys: Keys | None) -> None:
        me = Registration(
            instance.role, instance.address, instance.control_address, "twolane", instance.epoch, name="the good one"
        )
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.registrar = Registrar(self.context, address, me, keys)

    async def tick(self) -> None:
        while True:
            self.registrar.tick(time.monotonic())
            await asyncio.sleep(0.02)


@contextmanager
def member(instance: ScriptedInstance, address: str, keys: Keys | None) -> Iterator[Registrar]:
    made = Member(instance, address, keys)
    ticking = asyncio.get_running_loop().create_task(made.tick())
    try:
        yield made.registrar
    finally:
        ticking.cancel()
        made.registrar.close()
        made.context.destroy(linger=0)


@asynccontextmanager
async def deployment() -> AsyncIterator[Cluster]:
    """A proxy with a secret, and a member of which it knows."""
    async with cluster(0, 0, registration_secret=SECRET) as c:
        d = await ScriptedInstance("D").start()
        c.decodes.append(d)
        with member(d, address_of(c), deployment_keys()):
            await eventually(lambda: len(c.service.pool.ready("D")) == 1, WAIT_S)
            yield c
        await d.stop()


async def is_unchanged(c: Cluster, *, refused: int, registrations: int = 0, ended: int = 0) -> None:
    """All of it was counted, and the member goes on."""
    await eventually(lambda: c.service._app._stats.registrants == (refused, ended), WAIT_S)
    stats = await c.stats()
    assert stats["registration_connections"] == {"refused": refused, "ended": ended}
    assert stats["registrations_refused"] == registrations
    page = (await c.http.get("/metrics")).text
    assert f'twolane_proxy_registration_connections_total{{end="refused"}} {refused}.0' in page
    staying = [(i.address, i.name, i.epoch) for i in c.service.pool if i.state is not State.LEAVING]
    assert staying == [(c.d.address, "the good one", "first")]
    assert (await c.complete()).status_code == 200


@pytest.mark.parametrize("what", RAW)
async def test_bytes_of_a_stranger_change_nothing_and_are_counted(what: str) -> None:
    async with deployment() as c:
        with raw(address_of(c), RAW[what]):
            await is_unchanged(c, refused=1)


@pytest.mark.parametrize("who", MEMBERS_ONLY)
async def test_a_strangers_registration_changes_nothing_and_is_counted(
    who: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys, server = MEMBERS_ONLY[who]()
    async with deployment() as c:
        with dealer(address_of(c), keys, server) as stranger:
            stranger.send(encode(FORGED))
            stranger.send(encode(msgspec.structs.replace(FORGED, http_address=c.d.address, leaving=True)))
            await eventually(lambda: c.service._app._stats.registrants.refused > 0, WAIT_S)
        refused = c.service._app._stats.registrants.refused  # he may have tried twice
        await is_unchanged(c, refused=refused)
        assert len([one for one in caplog.records if "registration refused" in one.message]) == 1
        assert "registration_secret_file" in caplog.text


async def test_a_recorded_registration_is_worth_nothing_and_tells_nothing() -> None:
    async with deployment() as c:
        relay = Relay(address_of(c))
        other = await ScriptedInstance("P").start()
        with member(other, relay.address, deployment_keys()):
            await eventually(lambda: len(c.service.pool) == 2, WAIT_S)
        await eventually(lambda: c.view(other).state is State.LEAVING, WAIT_S)  # it said goodbye
        with raw(address_of(c), bytes(relay.sent)):
            await is_unchanged(c, refused=1, ended=1)
        for told in (other.address, "the good one", SECRET):
            assert told.encode() not in relay.heard
        relay.close()
        await other.stop()


async def test_without_a_secret_the_same_relay_hears_it_all() -> None:
    async with cluster(0, 0) as c:
        relay = Relay(address_of(c))
        p = await ScriptedInstance("P").start()
        with member(p, relay.address, None):
            await eventually(lambda: len(c.service.pool) == 1, WAIT_S)
        assert p.address.encode() in relay.heard
        relay.close()
        await p.stop()


async def test_what_a_member_says_is_checked_and_counted() -> None:
    words = encode(FORGED)
    story = encode(Story("P", "127.0.0.1:1", clock_identity(), [StoryEvent("t", "scheduled", 1.0)]))
    async with deployment() as c:
        with dealer(address_of(c), deployment_keys()) as broken:
            for payload in (words[:-3], story[:-3], words + b"x", b"", b"\xc1"):
                broken.send(payload)
            await eventually(lambda: c.service._app._stats.num_registrations_refused == 5, WAIT_S)
            broken.send(bytes(_MAX_MESSAGE_BYTES + 1000))  # ends the connection
            await is_unchanged(c, refused=0, registrations=5, ended=1)


@pytest.mark.parametrize(
    ("of_proxy", "of_instance"), [(SECRET, None), ("", deployment_keys()), ("x", deployment_keys())]
)
async def test_unlike_secrets_end_in_one_clear_word_and_heal(
    of_proxy: str, of_instance: Keys | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The instance says so once, and goes on trying: a proxy that comes back with the right secret hears it."""
    port = free_port()
    d = await ScriptedInstance("D").start()
    with member(d, f"127.0.0.1:{port}", of_instance):
        async with cluster(0, 0, discovery_port=port, registration_secret=of_proxy) as c:
            await eventually(lambda: "can't register with the proxy" in caplog.text, WAIT_S)
            await eventually(lambda: c.service._app._stats.registrants.refused >= 3, WAIT_S)
            assert len(c.service.pool) == 0
        errors = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
        assert len(errors) == 1, errors
        assert "registration_secret_file" in errors[0]
        right = SECRET if of_instance else ""
        async with Service(ProxySettings(http_port=0, discovery_port=port, registration_secret=right)) as service:
            await eventually(lambda: len(service.pool) == 1, WAIT_S)
    await d.stop()
