"""The other end in a process of its own: CUDA maps no memory of the process that made it. Here: a transport's D."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from twolane.connector.layout import layout_of
from twolane.connector.messages import GateWord, TransportOffer
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transport.base import Gate, Items, ReceiveChannel, Ticket
from twolane.connector.transport.hub import Receivers
from twolane.connector.transport.select import receivers_for

NUM_BLOCKS = 8
TWO_HOSTS = {"NCCL_HOSTID": "another"}  # of one of both processes: NCCL then takes both on one GPU, and goes by sockets
Footprint = tuple[int, int, int]  # descriptors, mappings of arenas, free GPU memory in MiB


@dataclass(frozen=True)
class Memory:
    """What the KV memory of a test looks like. `lay` says which dimension counts blocks."""

    shape: tuple[int, ...]
    device: str
    transport: str
    layers: int = 3

    def make(self, *, fill: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(7)
        make = torch.randn if fill else torch.zeros
        kwargs = {"generator": generator} if fill else {}
        return {
            f"layer.{i}": make(*self.shape, **kwargs).to(torch.bfloat16).to(self.device) for i in range(self.layers)
        }

    def settings(self) -> ConnectorSettings:
        return ConnectorSettings(transport=self.transport, slot_bytes=1 << 16, num_slots=4)  # type: ignore[arg-type]


def no_wake() -> None:
    """These tests poll."""


def footprint() -> Footprint:
    """Of this process."""
    gc.collect()
    free_mib = torch.cuda.mem_get_info()[0] >> 20 if torch.cuda.is_initialized() else 0
    arenas = Path("/proc/self/maps").read_text().count("twolane-kv")
    return len(list(Path("/proc/self/fd").iterdir())), arenas, free_mib


class Session:
    """The child's side: does what the test asks, one call after the other."""

    _gate: Gate
    _stepped: torch.cuda.Event
    _seen: dict[str, torch.Tensor]

    def __init__(self) -> None:
        self._kv: dict[str, torch.Tensor] = {}
        self._receivers: Receivers | None = None
        self._channels: list[ReceiveChannel] = []

    def make(self, memory: Memory) -> int:
        self._kv = memory.make(fill=False)
        self._receivers = receivers_for(layout_of(self._kv, NUM_BLOCKS), memory.settings(), no_wake)
        return os.getpid()

    def open(self) -> tuple[int, list[TransportOffer]]:
        assert self._receivers is not None
        self._channels.append(self._receivers.open())
        return len(self._channels) - 1, self._channels[-1].offers

    def attach(self, channel: int, chosen: TransportOffer, pid: int) -> bool:
        self._channels[channel].attach(chosen, pid)
        return self._channels[channel].direct

    def read(self, channel: int, slot: int, items: Items) -> int:
        return self._wait(self._channels[channel].read(slot, items)).size_bytes

    def discard(self, channel: int, slot: int, size_bytes: int) -> None:
        self._wait(self._channels[channel].discard(slot, size_bytes))

    def _wait(self, ticket: Ticket) -> Ticket:
        assert self._receivers is not None
        deadline_s = time.monotonic() + 10
        while not ticket.done:
            assert time.monotonic() < deadline_s
            self._receivers.poll()
            time.sleep(0.001)
        assert not ticket.error
        return ticket

    def revoke(self, channel: int) -> float:
        return self._channels[channel].revoke()

    def close(self, channel: int) -> None:
        self._channels[channel].close()

    def launch_behind_gate(self, channel: int) -> GateWord | None:
        """A step on a GPU whose memory is all zeros, that reads it behind a gate. None: this transport has none."""
        gate = self._channels[channel].gate()
        if gate is None or not gate.is_kept:
            return None
        self._gate = gate
        self._seen = {name: tensor.zero_().clone() for name, tensor in self._kv.items()}
        torch.cuda.synchronize()
        gate.hold()
        for name, tensor in self._kv.items():
            self._seen[name].copy_(tensor, non_blocking=True)
        self._stepped = torch.cuda.Event()
        self._stepped.record()
        return gate.word

    def has_stepped(self) -> bool:
        return bool(self._stepped.query())

    def seen(self) -> dict[str, torch.Tensor]:
        """What that step read."""
        seen = {name: tensor.cpu() for name, tensor in self._seen.items()}
        self._gate.close()
        return seen

    def contents(self) -> dict[str, torch.Tensor]:
        return {name: tensor.cpu().clone() for name, tensor in self._kv.items()}

    def footprint(self) -> Footprint:
        return footprint()

    def end(self) -> None:
        if self._receivers is not None:
            for channel in self._channels:
                channel.close()
            self._receivers.close()
        self._channels, self._receivers, self._kv = [], None, {}


def _serve(pipe: Connection, make: Callable[[], object], env: Mapping[str, str]) -> None:
    os.environ.update(env)
    torch.multiprocessing.set_sharing_strategy("file_system")
    session = make()
    while True:
        call = pipe.recv()
        if call is None:
            return
        name, args = call
        try:
            pipe.send((getattr(session, name)(*args), None))
        except Exception as error:  # noqa: BLE001 - passed on to the test
            pipe.send((None, error))


def wait_gone(pid: int, timeout_s: float) -> None:
    """Until the process is gone. ProcessLookupError if it was already."""
    pidfd = os.pidfd_open(pid)
    select.select([pidfd], [], [], timeout_s)
    os.close(pidfd)


class Death:
    """When a process that was killed is gone: before that CUDA takes its memory apart. Nobody can know of it sooner."""

    def __init__(self, pid: int) -> None:
        self.began_s = time.monotonic()
        self.gone_s = 0.0
        self._pidfd = os.pidfd_open(pid)
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        select.select([self._pidfd], [], [], 30)
        self.gone_s = time.monotonic()
        os.close(self._pidfd)

    def wait(self) -> float:
        """When it was gone, on the monotonic clock."""
        self._thread.join()
        return self.gone_s


class TargetProcess:
    """The test's side: every call goes to what the child made, a Session if nothing else is said."""

    def __init__(self, make: Callable[[], object] = Session, env: Mapping[str, str] = MappingProxyType({})) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, dict(env)), daemon=True)
        self._process.start()
        theirs.close()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.begin(name, *args)
            return self.result(name)

        return call

    def begin(self, name: str, *args: Any) -> None:
        """A call whose `result` is asked for later: several children can work at once."""
        self._pipe.send((name, args))

    def result(self, name: str) -> Any:
        assert self._pipe.poll(60), f"{name} hangs"
        result, error = self._pipe.recv()
        if error is not None:
            raise error
        return result

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def kill(self) -> Death:
        """Returns at once. `stop` does the rest."""
        death = Death(self._pid)
        self._process.kill()
        return death

    def stop(self) -> None:
        """Idempotent. Nothing of the child stays in this process."""
        if self._pipe.closed:
            return
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        with contextlib.suppress(ProcessLookupError):
            wait_gone(self._pid, 10.0)  # `join` would wait for what torch starts to share tensors, too
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()
