"""A proxy process and scripted instances, for tests that are not asynchronous themselves, as a browser's are."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import msgspec

from tests.ports import free_port
from tests.proxy.scripted import MODEL, Behaviour, Call, ScriptedInstance, answer, chunk
from twolane.protocol import Load, Role

T = TypeVar("T")
DEADLINE_S = 60.0  # for what happens at once on a machine that has time
REGISTER_EVERY_S = 1.0

MAIN = """
import logging, sys
from pathlib import Path
import msgspec
from twolane.config import ProxySettings
from twolane.proxy.service import run
logging.basicConfig(level=logging.INFO)
given = msgspec.json.decode(sys.argv[1])
if "log_dir" in given:
    given["log_dir"] = Path(given["log_dir"])
given["api_keys"] = tuple(given.get("api_keys", ()))
sys.exit(run(ProxySettings(**given)))
"""


def wait_until(condition: Callable[[], bool]) -> None:
    """For another process's deeds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


class Actor(ScriptedInstance):
    """An instance that says again and again that it is there, as real ones do."""

    def __init__(self, role: Role, behave: Behaviour, name: str) -> None:
        super().__init__(role, behave)
        self.name = name
        self.load = Load(free_blocks=100, num_blocks=100, block_size=16, num_running=0, num_waiting=0)
        self.more: dict[str, Any] = {}
        self._task: asyncio.Task[None] | None = None

    async def appear(self, discovery_port: int) -> None:
        await self.start()
        self._task = asyncio.create_task(self._keep_registered(discovery_port))

    async def _keep_registered(self, discovery_port: int) -> None:
        while True:
            self.register(discovery_port, name=self.name, load=self.load, **self.more)
            await asyncio.sleep(REGISTER_EVERY_S)

    async def die(self) -> None:
        """Like SIGKILL: no listener, no connection, no word."""
        if self._task is not None:
            self._task.cancel()
        await self.kill()

    async def leave(self) -> None:
        await self.die()
        await self.stop()


class Stage:
    """Owns a proxy process, and a thread with a loop in which the instances live."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.http_port, self.discovery_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.http_port}"
        given = {"http_port": self.http_port, "discovery_port": self.discovery_port, "health_every_s": 0.2}
        self._settings = msgspec.json.encode(given | settings).decode()
        self._log = folder / "stage-proxy.log"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._process: subprocess.Popen[bytes] | None = None
        self.instances: dict[str, Actor] = {}
        self.key = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self.start_proxy()
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.instances):
            self.do(self.instances.pop(name).leave())
        if self._process is not None:
            self.stop_proxy()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def start_proxy(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-c", MAIN, self._settings]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            httpx.get(self.url + "/health", trust_env=False)
        except httpx.TransportError:
            return False
        return True

    def stop_proxy(self) -> int:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(DEADLINE_S)
        self._process = None
        return code

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The proxy is there and does nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def add(self, role: Role, name: str, behave: Behaviour = answer, **more: Any) -> Actor:
        instance = self.instances[name] = Actor(role, behave, name)
        instance.more = more
        self.do(instance.appear(self.discovery_port))
        return instance

    def wait_ready(self, number: int) -> None:
        wait_until(lambda: sum(i["state"] == "ready" for i in self.stats()["instances"]) == number)

    def stats(self) -> Any:
        return httpx.get(self.url + "/stats", headers=self.headers, trust_env=False).json()

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def complete(self, request_id: str = "", **fields: Any) -> httpx.Response:
        """A whole request, streamed, from its first to its last byte."""
        headers = self.headers | ({"x-request-id": request_id} if request_id else {})
        body = {"model": MODEL, "prompt": "hello", "stream": True, **fields}
        url = self.url + "/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=DEADLINE_S, trust_env=False)


class Slow:
    """A decode instance's behaviour: a token, then nothing more until `go_on` is set."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    async def __call__(self, call: Call) -> None:
        if call.method != "POST":
            await answer(call)
            return
        call.start_stream()
        await call.event(chunk("one", chat=False))
        while not self.go_on.is_set() and not call.gone.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.02)
        await call.end_stream()
