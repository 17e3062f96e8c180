"""Small decisions: phases from log lines, counters from a metrics page, ports."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.launch.fakes import make_run, server_spec
from twolane.errors import ConfigError
from twolane.launch.firstlight import prompt_sources, read_stream
from twolane.launch.phases import IMPORTING, next_phase
from twolane.launch.ports import check_ports
from twolane.launch.status import print_status

LOG = """\
(APIServer pid=1) INFO 11-22 16:12:01 [api_utils.py:286] non-default args: {'host': '127.0.0.1'}
(EngineCore pid=2) INFO 11-22 16:13:02 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='/m'
(Worker pid=3) INFO 11-22 16:13:09 [cpu_model_runner.py:68] Starting to load model /m...
(Worker pid=3) INFO 11-22 16:13:12 [default_loader.py:501] Loading weights took 2.90 seconds
(EngineCore pid=2) INFO 11-22 16:13:17 [core.py:402] init engine (profile, create kv cache, warmup model) took 3.00 s
INFO:     Application startup complete.
"""
METRICS = """\
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 42.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 7.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="m",source="external_kv_transfer"} 1e+03
vllm:prompt_tokens_by_source_created{engine="0",model_name="m",source="external_kv_transfer"} 1.79e+09
"""


def test_phases_follow_the_log() -> None:
    phase, seen = IMPORTING, []
    for line in LOG.splitlines():
        phase = next_phase(phase, [line])
        seen.append(phase)
    assert seen == [
        "reading the model's config",
        "starting the engine",
        "loading weights",
        "warming up",
        "starting the server",
        "registering",
    ]
    assert next_phase("loading weights", ["nothing new"]) == "loading weights"


def test_prompt_tokens_are_added_up_over_engines() -> None:
    assert prompt_sources(METRICS) == {"local_compute": 42, "external_kv_transfer": 1007}
    assert prompt_sources("") == {}


def test_a_port_in_use_is_named_with_its_holder_and_the_variable(tmp_path: Path) -> None:
    plan = make_run(tmp_path, server_spec(tmp_path, "decode", "decode"))
    check_ports(plan)
    port = plan.services[1].http_port
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError) as error:
        check_ports(plan)
    assert f"port {port} (decode's HTTP port) is taken by process {os.getpid()} (" in str(error.value)
    assert "DECODE_HTTP_PORT=" in str(error.value)


def test_the_first_answer_is_put_together_from_its_stream() -> None:
    events = [
        b'data: {"choices": [{"text": " Par"}], "usage": null}',
        b'data: {"choices": [{"text": "is"}]}',
        b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}',
        b"data: [DONE]",
    ]
    text, usage = read_stream(b"\n\n".join(events) + b"\n\n")
    assert (text, usage["prompt_tokens"]) == (" Paris", 5)
    assert read_stream(b"\n\n".join(events[:2])) == (" Paris", {}), "a cut stream has no usage"


@pytest.mark.parametrize(("width", "shown"), [(80, False), (120, True)])
def test_status_shows_the_engines_load_where_the_terminal_has_room(width: int, shown: bool) -> None:
    load = {"num_waiting": 3, "num_blocks": 200, "free_blocks": 175, "num_running": 5, "block_size": 16}
    row: dict[str, Any] = dict.fromkeys(("node", "pid", "kv_port", "uptime_s", "memory_bytes", "in_flight", "restarts"))
    row |= {"name": "decode", "role": "decode", "gpus": [], "http_port": 20005, "state": "ready", "load": load}
    console = Console(width=width, file=io.StringIO())
    report = {"running": True, "state": "ready", "url": "http://x", "models": ["m"], "services": [row]}
    print_status(report, console)
    assert isinstance(console.file, io.StringIO)
    assert ("87%" in console.file.getvalue()) is shown
