"""Runs shell lines of the docs in one folder, against one deployment, with its ports in place of those in the text."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field

import httpx

from tests.docs.pages import Block
from tests.engine.place import BIN, PORTS, Place
from tests.ports import free_port

USUAL_PORTS = dict(zip((10001, 30001, 20003, 20005, 21001, 22001), PORTS, strict=True))
OWN_PORTS = (10002, 30002, 8000)  # what else the docs start listens there
LINE_TIMEOUT_S = 300
WAIT_S = 60
NUM_STREAMS, STREAM_TOKENS = 6, 120


@dataclass
class Runner:
    """Owns what the lines leave running; `stop` ends it. A line that was run isn't run again."""

    place: Place
    done: set[str] = field(default_factory=set)
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)
    ports: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for usual, name in USUAL_PORTS.items():
            for step in (0, 10):
                self.ports[str(usual + step)] = str(int(self.place.ports[name]) + step)
        self.ports |= {str(port): str(free_port()) for port in OWN_PORTS}
        self.place.env["PATH"] = f"{BIN}{os.pathsep}{self.place.env['PATH']}"

    def here(self, text: str) -> str:
        return re.sub(r"\b(?:" + "|".join(self.ports) + r")\b", lambda match: self.ports[match[0]], text)

    def write(self, block: Block) -> None:
        (self.place.folder / block.options["file"]).write_text(self.here(block.text))

    def run(self, block: Block) -> None:
        fresh = [line for line in block.lines if line not in self.done]
        self.done |= set(fresh)
        if "background" in block.options:
            self._leave_running(fresh, self.here(block.options["background"]))
        elif block.options.get("while") == "streams":
            self._run_while_streaming(fresh, block)
        else:
            self._run(fresh, block)

    def _run(self, lines: list[str], block: Block) -> None:
        output = ""
        for line in lines:
            before, _, after = block.options.get("short", "").partition(" => ")
            typed = self.here(line.replace(before, after) if before else line)
            done = subprocess.run(
                ["bash", "-c", typed],
                cwd=self.place.folder,
                env=self.place.env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LINE_TIMEOUT_S,
                check=False,
            )
            output += done.stdout + done.stderr
            assert done.returncode == int(block.options.get("exit", "0")), f"{typed}\n{output}"
        for word in block.options.get("expect", "").split("|"):
            assert not lines or self.here(word) in output, f"{word!r} is not in the output:\n{output}"

    def _leave_running(self, lines: list[str], url: str) -> None:
        log = (self.place.folder / "background.log").open("wb")
        for line in lines:
            argv = ["bash", "-c", f"exec {self.here(line)}"]
            self.background.append(
                subprocess.Popen(argv, cwd=self.place.folder, env=self.place.env, stdout=log, stderr=log)
            )
        log.close()
        deadline_s = time.monotonic() + WAIT_S
        while not _answers(url):
            assert self.background[-1].poll() is None, (self.place.folder / "background.log").read_text()
            assert time.monotonic() < deadline_s, f"{url} doesn't answer"
            time.sleep(0.1)

    def _run_while_streaming(self, lines: list[str], block: Block) -> None:
        """Answers begin before the lines do, and all of them come to their end."""
        ends: list[str] = []
        streams = [threading.Thread(target=lambda: ends.append(self._stream())) for _ in range(NUM_STREAMS)]
        for stream in streams:
            stream.start()
        deadline_s = time.monotonic() + WAIT_S
        while not all(row["in_flight"] for row in self.place.services().values() if row["role"] == "decode"):
            assert time.monotonic() < deadline_s, "no streams on each decode instance"
        self._run(lines, block)
        for stream in streams:
            stream.join(LINE_TIMEOUT_S)
        assert ends == ["data: [DONE]"] * NUM_STREAMS

    def _stream(self) -> str:
        """The last line of an answer."""
        url = f"http://127.0.0.1:{self.place.ports['HTTP_PROXY_PORT']}/v1/completions"
        body = {"model": "SmolLM2-135M-Instruct", "prompt": "Once", "max_tokens": STREAM_TOKENS, "ignore_eos": True}
        tokens, last = 0, ""
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=LINE_TIMEOUT_S) as answer:
            for line in answer.iter_lines():
                last = line or last
                tokens += line.startswith("data: {") and "choices" in json.loads(line.removeprefix("data: "))
        return last if tokens else "no token"

    def stop(self) -> None:
        for process in self.background:
            process.send_signal(signal.SIGINT)
        for process in self.background:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == 200
    return False
