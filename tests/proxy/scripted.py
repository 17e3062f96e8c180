"""Network peers for the proxy: instances whose behaviour a test scripts, and raw clients.

They are peers on real sockets, with real ZMQ registration; nothing inside the proxy is replaced.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self, cast

import httpx
import msgspec
import zmq

from twolane.config import ProxySettings
from twolane.protocol import Kind, Registration, Role
from twolane.proxy.pool import Instance, State
from twolane.proxy.service import Service

MODEL = "scripted"


@dataclass(eq=False)
class Call:
    """One request that an instance got. `gone` is set when the peer has closed the connection."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    reusable: bool = True

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def kv(self) -> Any:
        return self.json.get("kv_transfer_params")

    async def reply(self, status: int = 200, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, {"content-type": "application/json", "content-length": str(len(data)), **headers})
        self.writer.write(data)
        await self.writer.drain()

    def head(self, status: int, headers: dict[str, str]) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.writer.write(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode())

    def start_stream(self) -> None:
        self.head(200, {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"})

    async def send(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self.writer.drain()

    async def event(self, value: object) -> None:
        await self.send(f"data: {json.dumps(value)}\n\n".encode())

    async def end_stream(self) -> None:
        await self.send(b"data: [DONE]\n\n")
        self.writer.write(b"0\r\n\r\n")

    def reset(self) -> None:
        """The process dies: RST, or FIN without the promised rest."""
        self.reusable = False
        self.writer.transport.abort()


Behaviour = Callable[[Call], Awaitable[None]]


def chunk(text: str, chat: bool) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}} if chat else {"index": 0, "text": text}
    kind = "chat.completion.chunk" if chat else "text_completion"
    return {"id": "x", "object": kind, "created": 1, "model": MODEL, "choices": [choice | {"finish_reason": None}]}


def completion(text: str, chat: bool) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}} if chat else {"index": 0, "text": text}
    kind = "chat.completion" if chat else "text_completion"
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    choices = [choice | {"finish_reason": "stop", "logprobs": None}]
    return {"id": "x", "object": kind, "created": 1, "model": MODEL, "choices": choices, "usage": usage}


async def answer(call: Call) -> None:
    """What a healthy vLLM does, P or D."""
    chat = "chat" in call.path
    if call.path == "/v1/models":
        await call.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
    elif call.method == "POST" and call.path.startswith("/v1/") and call.json.get("stream"):
        call.start_stream()
        for word in ("one ", "two ", "three"):
            await call.event(chunk(word, chat))
        await call.end_stream()
    elif call.method == "POST" and call.path.startswith("/v1/"):
        await call.reply(200, completion("one two three", chat))
    else:
        await call.reply(200, {"path": call.path, "body": call.raw.decode()})


async def tell_nothing(call: Call) -> None:
    await call.reply(404, {"detail": "Not Found"})


async def hang(call: Call) -> None:
    await call.gone.wait()


def paced(num_events: int) -> Behaviour:
    """A stream of so many events, 20 ms before each."""

    async def pace(call: Call) -> None:
        call.start_stream()
        for number in range(num_events):
            await asyncio.sleep(0.02)
            await call.event({"number": number})
        await call.end_stream()

    return pace


class ScriptedInstance:
    """An HTTP server on loopback. `calls` holds all requests but health probes and those for /metrics, for which there
    is `tell`; both behaviours may be changed any time."""

    def __init__(self, role: Role, behave: Behaviour = answer, kind: Kind = "twolane") -> None:
        self.role: Role = role
        self.behave = behave
        self.kind: Kind = kind
        self.healthy = True
        self.hung = False  # accepts connections, answers no probe
        self.epoch = "first"
        self.port = 0
        self.control_address = ""
        self.calls: list[Call] = []
        self.num_probes = 0
        self.tell: Behaviour = tell_nothing
        self.num_told = 0
        self.called = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.control_address = self.control_address or f"127.0.0.1:{self.port % 10000 + 40000}"
        return self

    async def kill(self) -> None:
        """Like SIGKILL: nobody listens any more, all connections are reset."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.sleep(0)

    async def stop(self) -> None:
        await self.kill()
        await eventually(lambda: not self._writers)
        if self._socket is not None:
            self._socket.close(linger=0)
        self._context.term()

    def register(self, discovery_port: int, **changes: Any) -> None:
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.setsockopt(zmq.IDENTITY, self.control_address.encode())
            self._socket.connect(f"tcp://127.0.0.1:{discovery_port}")
        registration = Registration(self.role, self.address, self.control_address, self.kind, self.epoch)
        self._socket.send(msgspec.msgpack.encode(msgspec.structs.replace(registration, **changes)))

    async def call(self, number: int = 0) -> Call:
        """The `number`th request, as soon as it has come."""
        async with asyncio.timeout(10), self.called:
            await self.called.wait_for(lambda: len(self.calls) > number)
        return self.calls[number]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # killed while this one was on its way
            writer.transport.abort()
            return
        self._writers.add(writer)
        handler = cast("asyncio.Task[None]", asyncio.current_task())
        self._handlers.add(handler)
        try:
            while await self._serve(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # killed: this is the task's own end
        finally:
            writer.close()
            self._writers.discard(writer)
            self._handlers.discard(handler)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = lines[0].split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        call = Call(method, path, headers, body, writer)
        if path == "/health":
            self.num_probes += 1
            if self.hung:
                await reader.read()
                return False
            await call.reply(200 if self.healthy else 503, b"")
            return True
        if path == "/metrics":
            self.num_told += 1
            await self._until_gone(self.tell, call, reader)
            return call.reusable and not call.gone.is_set()
        async with self.called:
            self.calls.append(call)
            self.called.notify_all()
        await self._until_gone(self.behave, call, reader)
        return call.reusable and not call.gone.is_set()

    async def _until_gone(self, behave: Behaviour, call: Call, reader: asyncio.StreamReader) -> None:
        """A client that speaks no pipelining sends nothing now: whatever can be read is its end."""

        async def watch() -> None:
            try:
                at_end = not await reader.read(1)
            except ConnectionError:
                at_end = True
            if at_end:
                call.gone.set()

        watcher = asyncio.create_task(watch())
        try:
            await behave(call)
        except ConnectionError:
            call.gone.set()
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)


@dataclass
class Cluster:
    """A proxy in this process, and its instances, all ready."""

    service: Service
    prefills: list[ScriptedInstance]
    decodes: list[ScriptedInstance]
    http: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.http_port}"

    @property
    def p(self) -> ScriptedInstance:
        return self.prefills[0]

    @property
    def d(self) -> ScriptedInstance:
        return self.decodes[0]

    def view(self, instance: ScriptedInstance) -> Instance:
        """How the proxy sees it."""
        return next(i for i in self.service.pool if (i.role, i.address) == (instance.role, instance.address))

    async def stats(self) -> Any:
        return (await self.http.get("/stats")).json()

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": MODEL, "prompt": "hello", **fields})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.service.http_port)

    async def add(self, instance: ScriptedInstance) -> None:
        await instance.start()
        instance.register(self.service.discovery_port)
        (self.prefills if instance.role == "P" else self.decodes).append(instance)


@asynccontextmanager
async def cluster(
    num_prefill: int = 1, num_decode: int = 1, kind: Kind = "twolane", **settings: Any
) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        # Instances register once: how long a busy machine takes to serve a test mustn't make them leave.
        defaults: dict[str, Any] = {"http_port": 0, "discovery_port": 0, "health_every_s": 0.05}
        defaults["registration_expiry_s"] = 120.0
        service = await stack.enter_async_context(Service(ProxySettings(**(defaults | settings))))
        http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.http_port}", timeout=20, trust_env=False)
        await stack.enter_async_context(http)
        made = Cluster(service, [], [], http)
        roles: list[Role] = [*["P"] * num_prefill, *["D"] * num_decode]  # type: ignore[list-item]
        for role in roles:
            instance = ScriptedInstance(role, kind=kind)
            await made.add(instance)
            stack.push_async_callback(instance.stop)
        await eventually(lambda: sum(i.state is State.READY for i in service.pool) == num_prefill + num_decode)
        yield made


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """For what another process or callback does soon, and tells nobody."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.002)


async def exchange(cluster: Cluster, request: bytes, timeout_s: float = 10.0) -> bytes:
    """Sends raw bytes; returns all that comes until the proxy closes."""
    reader, writer = await cluster.connect()
    try:
        writer.write(request)
        async with asyncio.timeout(timeout_s):
            return await reader.read()
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """One answer with a Content-Length, from a connection that stays."""
    async with asyncio.timeout(10):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(lines[0].split(" ")[1]), headers, body
