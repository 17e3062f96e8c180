"""`twolane scale`: what shall run (pure), and instances that come and go under requests (real proxy, fake vLLM)."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_plan import CPU, FOUR_GPUS, MODEL, by_name, value_after
from tests.launch.test_process import wait_for
from tests.launch.test_terminal import Place, ends_with
from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch.commands import chosen
from twolane.launch.control import Files, stop_all
from twolane.launch.plan import Plan, load_plan, make_plan, save_plan
from twolane.launch.scale import scaled


def names(plan: Plan) -> list[str]:
    return [spec.name for spec in plan.services]


def test_what_is_there_keeps_its_name_and_all_else_and_the_highest_numbers_go_first() -> None:
    one = make_plan(Settings(max_model_len=512), CPU, MODEL)
    three = scaled(one, CPU, 3, 2)
    assert names(three) == ["proxy", "prefill", "prefill-2", "prefill-3", "decode", "decode-2"]
    assert {by_name(three)[name] == spec for name, spec in by_name(one).items()} == {True}
    added = by_name(three)["prefill-3"]
    assert (added.http_port, added.kv_port, added.log) == (20023, 21021, "logs/prefill-3.log")
    assert value_after(added, "--max-model-len") == "512"
    assert names(scaled(three, CPU, 2, None)) == ["proxy", "prefill", "prefill-2", "decode", "decode-2"]
    assert scaled(three, CPU, 1, 1) == one
    assert names(scaled(make_plan(Settings(decode=2), CPU, MODEL), CPU, None, 1)) == ["proxy", "prefill", "decode-1"]


def test_a_gap_is_filled_before_higher_numbers_are_given() -> None:
    three = make_plan(Settings(prefill=3), CPU, MODEL)
    gap = Plan(
        **{f: getattr(three, f) for f in Plan.__struct_fields__}
        | {"services": (*three.services[:2], *three.services[3:])}
    )
    assert names(gap) == ["proxy", "prefill-1", "prefill-3", "decode"]
    assert names(scaled(gap, CPU, 3, None)) == ["proxy", "prefill-1", "prefill-2", "prefill-3", "decode"]


def test_gpus_are_those_that_are_named_or_free() -> None:
    plan = make_plan(Settings(), FOUR_GPUS, MODEL)
    more = scaled(plan, FOUR_GPUS, 2, 2)
    assert [spec.gpus for spec in more.instances()] == [(0,), (2,), (1,), (3,)]
    assert [spec.gpus for spec in scaled(more, FOUR_GPUS, 3, 1).instances()] == [(0,), (2,), (3,), (1,)]
    shared = make_plan(Settings(prefill_gpu=((0,), (1,)), decode_gpu=((0,),), prefill=2), FOUR_GPUS, MODEL)
    back = scaled(scaled(shared, FOUR_GPUS, 1, None), FOUR_GPUS, 2, None)
    assert by_name(back)["prefill-2"].gpus == (1,)
    wide = make_plan(Settings(prefill_gpu=((0, 1),), decode_gpu=((2, 3),)), FOUR_GPUS, MODEL)
    with pytest.raises(
        ConfigError, match=r"decode-2 needs 2 GPUs, but 0 are free; taken: 0 \(prefill\), .* Ask for fewer"
    ):
        scaled(wide, FOUR_GPUS, 1, 2)


@pytest.mark.parametrize(
    ("prefill", "decode", "words"),
    [(0, 1, "one has to stay"), (1, 0, "nobody would answer"), (65, None, "64 instances of a role at most")],
)
def test_too_few_or_too_many_are_refused_with_the_reason(prefill: int, decode: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        scaled(make_plan(Settings(), CPU, MODEL), CPU, prefill, decode)


def test_where_nobody_can_say_goodbye_none_is_taken_away() -> None:
    plan = make_plan(Settings(kv="p2pnccl", prefill=2), FOUR_GPUS, MODEL)
    with pytest.raises(ConfigError, match="requests would be lost"):
        scaled(plan, FOUR_GPUS, 1, None)
    assert len(scaled(plan, FOUR_GPUS, 3, None).services) == 5


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    settings = Settings(prefill_gpu=((0, 1),), decode_gpu=((2, 3),), vllm_args=("--seed", "1"), log_dir=tmp_path)
    plan = make_plan(settings, FOUR_GPUS, MODEL)
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_the_one_without_a_number_is_the_first() -> None:
    services = [("proxy", "proxy"), ("prefill", "prefill"), ("prefill-2", "prefill")]
    assert chosen(services, "prefill-1") == ["prefill"]
    assert chosen(services, "prefill") == ["prefill", "prefill-2"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path)
    stop_all(Files(Settings(state_dir=tmp_path / ".twolane", log_dir=tmp_path / "logs")))


class Stream(threading.Thread):
    """One long answer through the proxy. `text`: all of it, once it has ended."""

    def __init__(self, place: Place, slow_s: float) -> None:
        super().__init__(daemon=True)
        self.began = threading.Event()
        self.text = b""
        self._port = place.ports["HTTP_PROXY_PORT"]
        self._body = json.dumps(
            {"model": "tiny", "prompt": "Hello", "stream": True, "max_tokens": 99, "slow_s": slow_s}
        )
        self.start()

    def run(self) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)) as connection:
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            with connection.getresponse() as answer, contextlib.suppress(OSError, http.client.HTTPException):
                self.text = answer.readline()
                self.began.set()
                self.text += answer.read()


def rows(place: Place) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(place.run("status", "--json").stdout)["services"]}


def test_up_scale_and_back_while_every_request_is_answered(place: Place) -> None:
    assert place.run("up").returncode == 0
    before = rows(place)
    done = place.run("scale", "--prefill", "3", "--decode", "2")
    assert (done.returncode, "now 3 prefill and 2 decode instances" in done.stdout) == (0, True), done.stderr
    more = rows(place)
    assert list(more) == ["proxy", "prefill", "prefill-2", "prefill-3", "decode", "decode-2"]
    assert {row["state"] for row in more.values()} == {"ready"}
    assert all(more[name]["pid"] == row["pid"] for name, row in before.items())
    again = place.run("up")
    assert "settings say 1 and 1: `twolane scale --prefill 1 --decode 1`" in again.stdout
    assert len(rows(place)) == 6
    assert place.run("restart", "prefill-1").stdout.endswith("prefill: started again\n")
    assert "prefill-3 | " in place.run("logs", "prefill").stdout

    streams = [Stream(place, 3.0) for _ in range(8)]
    assert all(stream.began.wait(60) for stream in streams)
    assert rows(place)["decode-2"]["in_flight"] > 0
    done = place.run("scale", "--prefill", "1", "--decode", "1")
    assert "decode-2: drained, " in done.stdout, done.stdout + done.stderr
    for stream in streams:
        stream.join(60)
        assert stream.text.endswith(b"data: [DONE]\n\n")
    left = rows(place)
    assert list(left) == ["proxy", "prefill", "decode"]
    assert left["decode"]["pid"] == before["decode"]["pid"]
    assert place.run("test").returncode == 0


def test_a_restart_loses_no_request_but_what_outlasts_the_deadline(place: Place) -> None:
    assert place.run("up", "--decode", "2").returncode == 0
    streams = [Stream(place, 3.0) for _ in range(4)]
    assert all(stream.began.wait(60) for stream in streams)
    assert place.run("restart", "decode").returncode == 0
    for stream in streams:
        stream.join(60)
        assert stream.text.endswith(b"data: [DONE]\n\n")
    long = [Stream(place, 4.0) for _ in range(2)]
    assert all(stream.began.wait(60) for stream in long)
    done = place.run("scale", "--decode", "1", "--drain-seconds", "1")
    assert "decode-2: its requests were cut, " in done.stdout


def test_ctrl_c_leaves_it_to_go_on_and_the_old_numbers_take_it_back(place: Place) -> None:
    assert place.run("up").returncode == 0
    stopped = place.terminal("scale", "--decode", "3")
    stopped.expect("starting")
    stopped.sendintr()
    stopped.expect("it goes on in the background")
    ends_with(stopped, 130)
    wait_for(lambda: len(rows(place)) == 5 and {row["state"] for row in rows(place).values()} == {"ready"}, 60)
    stream = Stream(place, 6.0)
    assert stream.began.wait(60)
    for _ in range(2):  # the second finds the one that drains, and waits for its end
        leaving = place.terminal("scale", "--decode", "1", "--drain-seconds", "100")
        leaving.expect("draining|starting")
        leaving.sendintr()
        ends_with(leaving, 130)
    done = place.run("scale", "--decode", "2", "--drain-seconds", "1")
    assert done.returncode == 0, done.stderr
    wait_for(lambda: list(rows(place)) == ["proxy", "prefill", "decode", "decode-2"], 60)


def test_what_is_wrong_is_told_and_changes_nothing(place: Place) -> None:
    none = place.run("scale", "--prefill", "2")
    assert (none.returncode, "`twolane up` starts it" in none.stderr) == (1, True)
    assert place.run("up").returncode == 0
    before = rows(place)
    for words, code, why in (
        ((), 2, "say how many there shall be"),
        (("--decode", "0"), 2, "nobody would answer"),
        (("--decode", "99"), 2, "64 instances"),
        (("--decode", "x"), 2, "valid integer"),
    ):
        done = place.run("scale", *words)
        assert (done.returncode, why in done.stderr) == (code, True), done.stderr
    with socket.create_server(("127.0.0.1", place.ports["DECODE_HTTP_PORT"] + 10)):
        done = place.run("scale", "--decode", "2")
        assert done.returncode == 2
        assert "(decode-2's HTTP port) is taken by" in done.stderr
    assert rows(place).keys() == before.keys()

    # One that does not start is taken out again, and the others stay.
    plan_path = place.folder / ".twolane/plan.json"
    plan = json.loads(plan_path.read_text())
    plan["settings"]["decode_args"] = ["--nope"]
    plan_path.write_text(json.dumps(plan))
    done = place.run("scale", "--prefill", "2", "--decode", "2")
    assert done.returncode == 1
    assert "decode-2 ended while it was starting" in done.stderr
    assert "vLLM doesn't know --nope" in done.stderr
    assert list(rows(place)) == ["proxy", "prefill", "prefill-2", "decode"]
    assert [spec.name for spec in load_plan(plan_path).services] == ["proxy", "prefill", "prefill-2", "decode"]
    assert "already up" in place.run("up").stdout


def test_down_in_the_middle_ends_all(place: Place) -> None:
    assert place.run("up", "--decode", "2").returncode == 0
    streams = [Stream(place, 4.0) for _ in range(2)]
    assert all(stream.began.wait(60) for stream in streams)
    scaling = place.terminal("scale", "--decode", "1")
    scaling.expect("draining|starting")
    done = place.run("down")
    assert done.returncode == 0
    ends_with(scaling, 1)
    wait_for(place.nothing_listens)
