"""Every command as a new user would try it: in a pseudo-terminal, with the real proxy and a small stand-in for vLLM."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pexpect
import pytest

import twolane
from tests.launch.test_process import wait_for
from tests.ports import free_ports_of
from twolane.config import Settings
from twolane.launch.control import Files, stop_all
from twolane.launch.ports import is_free
from twolane.launch.probes import request
from twolane.launch.state import read_state

SOURCE = Path(twolane.__file__).parent.parent
FAKE_VLLM = Path(__file__).parent / "fake_vllm"
ROOT = Path(__file__).parent.parent.parent
PORTS = ("HTTP_PROXY_PORT", "PROXY_PORT", "PREFILL_HTTP_PORT", "DECODE_HTTP_PORT")
WAIT_S = 60


def heed_ctrl_c() -> None:
    """A runner in the background may have SIGINT ignored, and children inherit that; a person's terminal doesn't."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Place:
    """A folder to run in, with a model, ports of its own and a terminal that is 80 columns wide."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = folder / "tiny"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        ports = free_ports_of((*PORTS, "PREFILL_KV_PORT", "DECODE_KV_PORT"))
        self.ports = {name: int(ports[name]) for name in PORTS}
        self.env = {
            **{"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", "TERM": "xterm", "COLUMNS": "80"},
            **{"PYTHONPATH": f"{FAKE_VLLM}:{SOURCE}", "MODEL": str(model), "PYTHON": sys.executable},
            **ports,
        }

    def terminal(
        self, *words: str, command: tuple[str, ...] = (sys.executable, "-m", "twolane.cli"), **env: str
    ) -> Any:
        argv = [*command, *words]
        terminal = pexpect.spawn(
            argv[0],
            argv[1:],
            cwd=str(self.folder),
            env=self.env | env,
            dimensions=(24, 80),
            encoding="utf-8",
            timeout=WAIT_S,
            preexec_fn=heed_ctrl_c,
        )
        terminal.delaybeforesend = None
        return terminal

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "twolane.cli", *words],
            cwd=self.folder,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def service(self, name: str) -> dict[str, Any]:
        rows = json.loads(self.run("status", "--json").stdout)["services"]
        found: dict[str, Any] = next(row for row in rows if row["name"] == name)
        return found

    def run_beside(self, terminals: list[Any], *words: str) -> subprocess.CompletedProcess[str]:
        """Reads meanwhile what the terminals show: a full one stops its program."""
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self.run, *words)
            while not done.done():
                for terminal in terminals:
                    with contextlib.suppress(pexpect.TIMEOUT, pexpect.EOF):
                        terminal.read_nonblocking(65536, timeout=0.02)
        return done.result()

    def nothing_listens(self) -> bool:
        return all(is_free("127.0.0.1", port) for port in self.ports.values())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path)
    stop_all(Files(Settings(state_dir=tmp_path / ".twolane", log_dir=tmp_path / "logs")))


def health_of(place: Place) -> str:
    """What the proxy says of itself; also while it starts."""
    try:
        answer = request(f"127.0.0.1:{place.ports['HTTP_PROXY_PORT']}", "GET", "/health")[1]
    except OSError:
        return "down"
    return str(json.loads(answer)["status"])


def ends_with(terminal: Any, code: int) -> None:
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == code, terminal.before


def test_the_menu_key_by_key(place: Place) -> None:
    menu = place.terminal()
    menu.expect("4  all, in the background.*Your choice: ")
    menu.sendline("x")
    menu.expect("'x' is none of the choices: 0 to 9")
    for key, words in {
        "7": "nothing is running in this folder",
        "6": "prefill_http_port .* environment PREFILL_HTTP_PORT",
        "4": "first light: a real request went through both lanes",
        "5": "pass  KV moved .* came from P",
        "8": "prefill \\| INFO",
        "9": "decode: stopped",
    }.items():
        menu.expect("Your choice: ")
        menu.sendline(key)
        menu.expect(words)
    menu.expect("Your choice: ")
    menu.sendline("0")
    ends_with(menu, 0)
    wait_for(place.nothing_listens)


def test_ctrl_c_ends_a_choice_and_comes_back_to_the_menu(place: Place) -> None:
    menu = place.terminal("menu")
    for key, words in {"1": "proxy ready", "2": "non-default args", "3": "non-default args"}.items():
        menu.expect("Your choice: ")
        menu.sendline(key)
        menu.expect(words)
        menu.sendintr()
    menu.expect("decode: stopped")
    menu.expect("Your choice: ")
    menu.sendintr()
    ends_with(menu, 0)
    wait_for(place.nothing_listens)


def test_the_menu_follows_the_locale(place: Place) -> None:
    menu = place.terminal(LANG="zh_CN.UTF-8")
    menu.expect("9  停止全部服务")
    menu.expect("请选择")
    menu.sendeof()
    ends_with(menu, 0)


def test_without_a_terminal_there_is_help(place: Place) -> None:
    done = place.run()
    assert done.returncode == 0
    assert "Usage: " in done.stdout


def test_status_logs_and_down_know_what_runs_in_terminals(place: Place) -> None:
    terminals = [place.terminal(role) for role in ("proxy", "prefill", "decode")]
    wait_for(lambda: health_of(place) == "ok", 30)
    report = json.loads(place.run_beside(terminals, "status", "--json").stdout)
    assert report["running"] is False
    assert [(row["name"], row["state"]) for row in report["services"]] == [
        (name, "ready") for name in ("proxy", "prefill", "decode")
    ]
    assert all(row["pid"] and row["memory_bytes"] and row["log"] for row in report["services"])
    assert "decode  | " in place.run_beside(terminals, "logs").stdout
    done = place.run_beside(terminals, "down")
    assert sorted(done.stdout.splitlines()[1:]) == [
        f"{name}: stopped in its terminal" for name in ("decode", "prefill", "proxy")
    ]
    for terminal in terminals:
        ends_with(terminal, 0)
    assert not list((place.folder / ".twolane/terminals").iterdir())
    assert place.run("status").returncode == 1


def test_up_starts_beside_nothing_that_a_terminal_runs_and_leaves_it_alone(place: Place) -> None:
    terminal = place.terminal("decode")
    terminal.expect("non-default args")
    done = place.run_beside([terminal], "up")
    assert done.returncode == 2
    assert f"port {place.ports['DECODE_HTTP_PORT']} (decode's HTTP port) is taken by" in done.stderr
    terminal.sendintr()
    ends_with(terminal, 0)


def test_a_killed_terminals_record_stops_nobody_and_goes(place: Place) -> None:
    terminal = place.terminal("decode")
    terminal.expect("non-default args")
    wait_for(lambda: bool(place.service("decode")["memory_bytes"]))
    os.kill(terminal.pid, signal.SIGKILL)
    terminal.expect(pexpect.EOF)
    wait_for(place.nothing_listens)
    assert place.run("status").returncode == 1
    assert place.run("down").returncode == 0
    assert not list((place.folder / ".twolane/terminals").iterdir())


@pytest.mark.parametrize("order", list(itertools.permutations(("proxy", "prefill", "decode"))), ids="-".join)
def test_three_terminals_in_each_order(place: Place, order: tuple[str, ...]) -> None:
    shows = {"proxy": "proxy ready", "prefill": "seed=7", "decode": "seed=7"}
    terminals = []
    for role in order:
        terminal = place.terminal(role, *([] if role == "proxy" else ["--", "--seed", "7"]))
        terminal.expect(shows[role])
        terminals.append(terminal)
    wait_for(lambda: health_of(place) == "ok")
    assert sorted(row["role"] for row in json.loads(place.run("status", "--json").stdout)["services"]) == sorted(order)
    assert "pass  KV moved" in place.run_beside(terminals, "test").stdout
    for terminal in terminals:
        terminal.sendintr()
        ends_with(terminal, 0)
    wait_for(place.nothing_listens)
    assert {path.name for path in (place.folder / "logs").glob("*.log")} == {"proxy.log", "prefill.log", "decode.log"}


def test_up_stays_in_the_foreground_until_ctrl_c(place: Place) -> None:
    terminal = place.terminal("up", "--foreground")
    terminal.expect("Ctrl\\+C stops everything")
    second = place.run("up")
    assert (second.returncode, "already up" in second.stdout, "other settings" in second.stdout) == (0, True, False)
    other = place.run("up", "--decode", "2")
    assert (other.returncode, "`twolane scale --prefill 1 --decode 2` makes it so" in other.stdout) == (0, True)
    other = place.run("up", "--max-model-len", "512")
    assert (other.returncode, "was started with other settings" in other.stdout) == (0, True)
    terminal.sendintr()
    terminal.expect("decode: stopped")
    ends_with(terminal, 0)
    wait_for(place.nothing_listens)


def test_down_ends_what_stays_in_the_foreground_as_a_service_manager_wants_it(place: Place) -> None:
    terminal = place.terminal("up", "--foreground")
    terminal.expect("Ctrl\\+C stops everything")
    assert "decode: stopped" in place.run("down").stdout
    ends_with(terminal, 0)
    assert place.nothing_listens()


def test_sigterm_ends_all_in_order_as_a_container_wants_it(place: Place) -> None:
    terminal = place.terminal("up", "--foreground")
    terminal.expect("Ctrl\\+C stops everything")
    terminal.kill(signal.SIGTERM)
    terminal.expect("decode: stopped")
    ends_with(terminal, 0)
    assert place.nothing_listens()


def test_ctrl_c_while_it_starts_leaves_nothing(place: Place) -> None:
    terminal = place.terminal("up", "--prefill-args", "--seed 99")  # it never registers
    terminal.expect("starting 3 services")
    second = place.run("up")
    assert (second.returncode, "at work in this folder" in second.stderr) == (1, True)
    terminal.sendintr()
    ends_with(terminal, 130)
    wait_for(place.nothing_listens)
    assert place.run("status").returncode == 1


def test_two_prefill_two_decode_and_restart_of_one(place: Place) -> None:
    assert place.run("up", "--prefill", "2", "--decode", "2").returncode == 0
    rows = json.loads(place.run("status", "--json").stdout)["services"]
    assert [row["name"] for row in rows] == ["proxy", "prefill-1", "prefill-2", "decode-1", "decode-2"]
    assert {row["state"] for row in rows} == {"ready"}
    assert all(row["memory_bytes"] and row["uptime_s"] is not None and row["in_flight"] == 0 for row in rows)
    assert max(len(line) for line in place.run("status").stdout.splitlines()[1:]) <= 80
    done = place.run("restart", "decode-2")
    assert "decode-2: started again" in done.stdout
    wrong = place.run("restart", "decod")
    assert (wrong.returncode, "did you mean decode" in wrong.stderr) == (2, True)
    fresh = json.loads(place.run("status", "--json").stdout)["services"]
    assert [a["pid"] == b["pid"] for a, b in zip(rows, fresh, strict=True)] == [True, True, True, True, False]


def test_the_next_up_after_a_killed_supervisor_stops_what_is_left(place: Place) -> None:
    assert place.run("up").returncode == 0
    state = read_state(place.folder / ".twolane/state.json")
    assert state is not None
    os.kill(state.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: not state.supervisor.alive())
    done = place.run("up")
    assert done.returncode == 0, done.stderr
    assert "left over from before" in done.stdout
    assert not any(member.alive() for service in state.services for member in service.members)


def test_a_configuration_that_became_wrong_keeps_nobody_from_stopping(place: Place) -> None:
    assert place.run("up").returncode == 0
    (place.folder / "twolane.toml").write_text("nonsense = 1\n")
    assert place.run("status").returncode == 2
    done = place.run("down")
    assert (done.returncode, "decode: stopped" in done.stdout) == (0, True)


def test_killing_a_terminals_command_ends_its_instance(place: Place) -> None:
    terminal = place.terminal("decode")
    terminal.expect("non-default args")
    os.kill(terminal.pid, signal.SIGKILL)
    terminal.expect(pexpect.EOF)
    wait_for(place.nothing_listens)


def test_each_role_killed_comes_back_and_takes_traffic(place: Place) -> None:
    assert place.run("up").returncode == 0
    for row in json.loads(place.run("status", "--json").stdout)["services"]:
        os.kill(row["pid"], signal.SIGKILL)
        wait_for(lambda name=row["name"]: place.service(name)["restarts"] == 1)  # type: ignore[misc]
        assert place.run("up").returncode == 0
        assert place.run("test").returncode == 0
    assert "proxy: started again 1 times" in place.run("status").stdout


def test_logs_are_interleaved_and_followed(place: Place) -> None:
    assert place.run("up").returncode == 0
    follower = place.terminal("logs", "-f", "-n", "1")
    follower.expect("decode  \\| INFO")
    assert place.run("test").returncode == 0
    follower.expect("proxy   \\| .*outcome=ok")
    follower.sendintr()
    ends_with(follower, 130)
    assert place.run("logs", "prefill").stdout.startswith("prefill | ")
    assert place.run("logs", "proxxy").returncode == 2


def test_a_port_in_use_is_told_with_its_holder_by_up_doctor_and_proxy(place: Place) -> None:
    port = place.ports["HTTP_PROXY_PORT"]
    with socket.create_server(("127.0.0.1", port)):
        for command, code in {"up": 2, "doctor": 1, "proxy": 2}.items():
            done = place.run(command)
            assert done.returncode == code
            assert str(port) in done.stdout + done.stderr
        assert f"taken by process {os.getpid()} " in place.run("up").stderr
        assert f"HTTP_PROXY_PORT={port + 5}" in place.run("up").stderr


def test_an_instance_that_does_not_register_is_told_with_both_addresses(place: Place) -> None:
    prefill = f"127.0.0.1:{place.ports['PREFILL_HTTP_PORT']}"
    done = place.run("up", "--prefill-args", "--seed 99", "--timeout-seconds", "8")
    assert done.returncode == 1
    assert f"it serves at {prefill} and registers at 127.0.0.1:{place.ports['PROXY_PORT']}" in done.stderr
    alone = place.terminal("prefill")
    alone.expect(f"no proxy answers yet at 127.0.0.1:{place.ports['HTTP_PROXY_PORT']}")
    alone.sendintr()
    ends_with(alone, 0)


def test_a_wrong_vllm_option_is_explained(place: Place) -> None:
    for words in (("prefill", "--", "--nope"), ("up", "--vllm-args", "--nope")):
        done = place.run(*words)
        assert done.returncode == 1
        assert "vLLM doesn't know --nope" in done.stderr
    assert place.run("prefill", "nope").returncode == 2


def test_test_fails_where_nothing_runs_or_no_kv_moves(place: Place) -> None:
    done = place.run("test")
    assert done.returncode == 1
    assert "FAIL  health" in done.stdout
    terminals = [place.terminal("proxy"), place.terminal("decode")]
    terminals[1].expect("non-default args")
    wait_for(lambda: health_of(place) == "degraded")
    done = place.run_beside(terminals, "test")
    assert done.returncode == 1
    assert "FAIL  health      degraded: no prefill instance is ready" in done.stdout
    assert "FAIL  KV moved" in done.stdout
    for terminal in terminals:
        terminal.sendintr()
        ends_with(terminal, 0)


def test_config_shows_origins_and_writes_a_file_that_reads_the_same(place: Place) -> None:
    assert place.run("config", "--write", "--decode", "2", "--vllm-args", "--seed 1").returncode == 0
    again = json.loads(place.run("config", "--json").stdout)
    assert (again["decode"]["value"], again["vllm_args"]["value"]) == ("2", "--seed 1")
    assert again["decode"]["from"].startswith("twolane.toml:")
    assert again["model"]["from"] == "environment MODEL"
    assert place.run("config", "--write").returncode == 2
    (place.folder / "twolane.toml").write_text("decod = 2\n")
    done = place.run("up")
    assert (done.returncode, done.stderr) == (
        2,
        "twolane: twolane.toml:1: 'decod' is no setting: did you mean decode?\n",
    )


@pytest.fixture
def scripts(place: Place) -> Callable[..., Any]:
    """The entry scripts, in the place's own folder."""
    for name in ("test_single_machine.sh", "disagg_prefill_proxy_server.py"):
        shutil.copy(ROOT / name, place.folder)
    return lambda *words: place.terminal(*words, command=("./test_single_machine.sh",))


def test_the_recipes_script_knows_its_words(place: Place, scripts: Callable[..., Any]) -> None:
    wrong = scripts("nope")
    wrong.expect("usage: ./test_single_machine.sh")
    ends_with(wrong, 2)
    menu = scripts()
    menu.expect("Your choice: ")
    menu.sendline("0")
    ends_with(menu, 0)
    up = scripts("all")
    up.expect("first light")
    ends_with(up, 0)
    test = scripts("test")
    test.expect("pass  KV moved")
    ends_with(test, 0)
    found = subprocess.run(["pgrep", "-f", "disagg_prefill_proxy_server"], capture_output=True, text=True, check=True)
    assert str(place.service("proxy")["pid"]) in found.stdout.split()


def test_pkill_finds_the_proxy_that_the_script_started(place: Place, scripts: Callable[..., Any]) -> None:
    proxy = scripts("proxy")
    proxy.expect("proxy ready")
    found = subprocess.run(["pgrep", "-f", "disagg_prefill_proxy_server"], capture_output=True, text=True, check=True)
    assert str(proxy.pid) in found.stdout.split()
    os.kill(proxy.pid, signal.SIGTERM)
    ends_with(proxy, 0)
