"""CUDA's streams, events and words of memory, and NCCL, on the CPU: for what the GPU transports do with them.

Nothing runs before it may: an operation is at the head of its stream, and what it waits for is over. Which stream goes
on first is random. The copy kernel reads the tables of planes as the real one does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import itertools
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

Op = Callable[[], bool]  # whether it is over; asked again until it is

PACKAGE = "twolane.connector.transport.cuda"
DEADLOCK_S = 30.0
GATE = 1 << 40  # cuda.kernel.gate_value(0)


class Device:
    """Mutable state: the streams, and which of them each thread uses."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._changed = threading.Condition(threading.RLock())
        self._streams: list[Stream] = []
        self.num_asked_for = 0  # streams, beside each thread's own
        self._current = threading.local()
        self.posts: dict[bytes, dict[str, list[Post]]] = {}  # of NCCL's communicators
        self.is_cut = False  # the ranks find out that they have lost each other
        self.have_met = True

    def stream(self, *_: object, **__: object) -> Stream:
        self.num_asked_for += 1
        return self._make_stream()

    def _make_stream(self) -> Stream:
        made = Stream(self)
        self._streams.append(made)
        return made

    def event(self, **_: object) -> Event:
        return Event(self)

    def current(self, *_: object) -> Stream:
        """Of this thread. Nobody's default stream is another's: P and D are two processes."""
        if not hasattr(self._current, "stream"):
            self._current.stream = self._make_stream()
        stream = self._current.stream
        assert isinstance(stream, Stream)
        return stream

    @contextlib.contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self._current.stream = self.current(), stream
        yield
        self._current.stream = before

    def enqueue(self, stream: Stream, op: Op) -> None:
        with self._changed:
            stream.ops.append(op)
            self.advance()

    def advance(self) -> None:
        with self._changed:
            moves = True
            while moves:
                moves = False
                for stream in self._random.sample(self._streams, len(self._streams)):
                    while stream.ops and stream.ops[0]():
                        stream.ops.pop(0)
                        moves = True
            self._changed.notify_all()

    def move(self, target: int, source: int, size_bytes: int, stream: Stream) -> None:
        """cuda.driver's copies to and from the host."""

        def op() -> bool:
            ctypes.memmove(target, source, size_bytes)
            return True

        self.enqueue(stream, op)

    def copy_blocks(
        self,
        sources: Any,
        targets: Any,
        block_ids: torch.Tensor,
        *,
        first_plane: int,
        num_planes: int,
        permit: torch.Tensor,
        **_: object,
    ) -> None:
        """cuda.kernel's, on the current stream."""

        def op() -> bool:
            if not is_permitted(permit):
                return True
            for plane in range(first_plane, first_plane + num_planes):
                source, stride, size = sources.tensor[plane].tolist()
                target, target_stride, _ = targets.tensor[plane].tolist()
                for own, wanted in zip(*block_ids.tolist(), strict=True):
                    ctypes.memmove(target + wanted * target_stride, source + own * stride, size * 16)
            return True

        self.enqueue(self.current(), op)

    def open_gate(self, address: int, value: int, permit: torch.Tensor, _scratch: object) -> None:
        """cuda.kernel's, on the current stream."""

        def op() -> bool:
            if is_permitted(permit):
                word_at(address).value = GATE + value
            return True

        self.enqueue(self.current(), op)

    def write_word(self, address: int, value: int, stream: Stream) -> None:
        """cuda.driver's."""

        def op() -> bool:
            word_at(address).value = value
            return True

        self.enqueue(stream, op)

    def wait_word(self, address: int, value: int, stream: Stream) -> None:
        """cuda.driver's."""
        self.enqueue(stream, lambda: word_at(address).value == value)

    def wait(self, is_over: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLOCK_S
        with self._changed:
            while not is_over():
                assert time.monotonic() < deadline_s
                self._changed.wait(0.01)


def word_at(address: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(address)


def is_permitted(permit: torch.Tensor) -> bool:
    address, value = permit.tolist()
    return not address or word_at(address).value == value


class Stream:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.ops: list[Op] = []

    def wait_event(self, event: Event) -> None:
        record = event.record_number
        self.device.enqueue(self, lambda: event.is_over or event.record_number != record)

    def synchronize(self) -> None:
        self.device.wait(lambda: not self.ops)


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.record_number = 0
        self.is_over = True

    def record(self, stream: Stream) -> None:
        self.record_number += 1
        number, self.is_over = self.record_number, False

        def op() -> bool:
            self.is_over |= self.record_number == number
            return True

        self._device.enqueue(stream, op)

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self._device.wait(self.query)


class Post:
    """A send or a receive: both are on their streams until both are at the head."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.is_here = self.is_over = False


class Communicator:
    """cuda.nccl_library.Communicator between two threads."""

    def __init__(self, device: Device, error: type[Exception], name: bytes, rank: int) -> None:
        self._device = device
        self._error = error
        self._posts = device.posts.setdefault(name, {"send": [], "receive": []})
        self._is_aborted = False

    def is_settled(self) -> bool:
        if self._device.is_cut:
            raise self._error("remote process exited")
        return self._device.have_met

    def abort(self) -> None:
        """What waits for the other rank ends, like any other kernel."""
        self._is_aborted = True
        self._device.advance()

    def send(self, address: int, size_bytes: int, stream: Stream) -> None:
        self._post("send", "receive", Post(address, size_bytes), stream)

    def receive(self, address: int, size_bytes: int, stream: Stream) -> None:
        self._post("receive", "send", Post(address, size_bytes), stream)

    def _post(self, mine: str, theirs: str, post: Post, stream: Stream) -> None:
        number = len(self._posts[mine])
        self._posts[mine].append(post)

        def op() -> bool:
            post.is_here = not self._is_aborted
            others = self._posts[theirs]
            if post.is_here and not post.is_over and number < len(others) and others[number].is_here:
                other = others[number]
                assert post.size_bytes == other.size_bytes
                source, target = (post, other) if mine == "send" else (other, post)
                ctypes.memmove(target.address, source.address, post.size_bytes)
                post.is_over = other.is_over = True
            return post.is_over or self._is_aborted

        self._device.enqueue(stream, op)


@contextlib.contextmanager
def simulated(seed: int) -> Iterator[Device]:
    """While it lasts, the package twolane.connector.transport.cuda works on a simulated device."""
    device = Device(seed)
    with pytest.MonkeyPatch.context() as patch:
        _forget_package(patch)
        for name, module in _fake_triton().items():
            patch.setitem(sys.modules, name, module)
        fakes = {"Stream": device.stream, "Event": device.event, "stream": device.using}
        fakes |= {"current_stream": device.current, "set_device": lambda _: None}
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        _patch_package(patch, device)
        yield device
        _forget_package(patch)


def _forget_package(patch: pytest.MonkeyPatch) -> None:
    """Whoever imports it next, before or after, gets it anew."""
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        patch.delitem(sys.modules, name)


def _fake_triton() -> dict[str, ModuleType]:
    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(language)["constexpr"] = object
    vars(triton).update(language=language, jit=lambda **_: lambda kernel: kernel)
    return {"triton": triton, "triton.language": language}


def _patch_package(patch: pytest.MonkeyPatch, device: Device) -> None:
    copier, driver, nccl, pair = (
        importlib.import_module(f"{PACKAGE}.{name}") for name in ("copier", "driver", "nccl", "nccl_pair")
    )
    for name in ("bind", "pin", "unpin", "free", "unmap_memory", "end_stream"):
        patch.setattr(driver, name, lambda *_: None)
    for name in ("copy_to_host", "copy_from_host"):
        patch.setattr(driver, name, device.move)
    _patch_memory(patch, driver)
    for name in ("write_word", "wait_word"):
        patch.setattr(driver, name, getattr(device, name))
    patch.setattr(driver, "make_stream", device.stream)
    patch.setattr(copier, "copy_blocks", device.copy_blocks)
    patch.setattr(copier, "open_gate", device.open_gate)
    gpus = itertools.count()
    patch.setattr(nccl, "gpu_identity", lambda _: str(next(gpus)))
    patch.setattr(nccl, "new_id", lambda: secrets.token_bytes(8))
    patch.setattr(pair, "Communicator", functools.partial(Communicator, device, pair.NcclError))


def _patch_memory(patch: pytest.MonkeyPatch, driver: ModuleType) -> None:
    """A handle is the address: P and D are one process here."""
    kept: list[object] = []

    def allocate(size_bytes: int) -> int:
        kept.append(memory := (ctypes.c_uint64 * (size_bytes // 8))())
        return ctypes.addressof(memory)

    patch.setattr(driver, "allocate", allocate)
    patch.setattr(driver, "write_words", lambda *_: None)
    patch.setattr(driver, "allocation_of", lambda address: (address, 0))
    patch.setattr(driver, "export_memory", lambda base: base.to_bytes(8))
    patch.setattr(driver, "map_memory", int.from_bytes)
    patch.setattr(torch.cuda, "get_device_name", lambda _: "simulated")
