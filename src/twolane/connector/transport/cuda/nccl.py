"""Transport `nccl`: staging buffers of bounded size on both GPUs, NCCL's send and receive between them.

One communicator a pair of workers, made and used by a thread of its own (`Pair`), so that neither the engine nor the
agent ever waits for the other side. P gathers blocks into a slot, says Push and sends; D receives into its slot of the
same number and scatters. Both post in the order of the Push messages. When either side goes, the other aborts.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
import torch

from twolane.connector.agent import logger
from twolane.connector.transport.base import NO_ROOM, Extent, Fence, Items, Opening, Ticket, extent_of_slot
from twolane.connector.transport.cuda import driver
from twolane.connector.transport.cuda.copier import CudaCopier
from twolane.connector.transport.cuda.lane import Waiter
from twolane.connector.transport.cuda.nccl_library import Communicator, NcclError, new_id
from twolane.connector.transport.cuda.planes import PlaneTable
from twolane.connector.transport.frames import Positive
from twolane.connector.transport.hub import ReceiveHalf, ReceiveWay, SendWay
from twolane.errors import TransferError

Post = Callable[[Communicator, torch.cuda.Stream], None]
Then = Callable[[torch.cuda.Stream], None]

_POLL_S = 5e-5  # how often a call in progress is looked at
_MIB = 1 << 20


class Meeting(msgspec.Struct, frozen=True):
    """What D needs to join P's communicator."""

    id: bytes
    num_slots: Positive
    slot_bytes: Positive


def gpu_identity(device: torch.device) -> str:
    """The same for two processes only on the same GPU, whatever either sees of the machine."""
    return str(torch.cuda.get_device_properties(device).uuid)


class Staging:
    """Slots on the GPU."""

    def __init__(self, copier: CudaCopier, num_slots: int, slot_bytes: int) -> None:
        """Raises TransferError where there is no memory for it."""
        self.slot_bytes = slot_bytes
        try:
            self.buffers = [torch.empty(slot_bytes, dtype=torch.uint8, device=copier.device) for _ in range(num_slots)]
        except torch.cuda.OutOfMemoryError as error:
            raise TransferError(
                f"no {num_slots * slot_bytes // _MIB} MiB of GPU memory for staging: lower "
                "gpu_memory_utilization, slot_bytes or num_slots"
            ) from error


class Pair:
    """The thread of one communicator. `call(post, then)` makes it run `post(communicator, stream)`, wait until NCCL has
    put that on the stream (a call to a non-blocking communicator returns before), and run `then(stream)`; in order.
    Ends on `end`, on the first error, or when the other rank is lost; then aborts, and `error` says why."""

    def __init__(self, name: bytes, rank: int, device: torch.device) -> None:
        self.error = ""
        self.is_joined = False
        self._device = device
        self._name, self._rank = name, rank
        self._posts: SimpleQueue[tuple[Post, Then]] = SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="twolane-nccl", daemon=True)
        self._thread.start()

    def call(self, post: Post, then: Then) -> None:
        self._posts.put((post, then))

    def end(self) -> None:
        self._ending.set()

    def join(self, timeout_s: float) -> None:
        self.end()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        driver.bind(self._device)
        communicator = None
        try:
            communicator = Communicator(self._name, self._rank)
            self._settle(communicator)
            self.is_joined = True
            stream = torch.cuda.Stream(self._device, priority=-1)
            while not self._ending.is_set():
                try:
                    post, then = self._posts.get(timeout=0.05)
                except Empty:
                    communicator.is_settled()  # tells of a lost rank
                    continue
                post(communicator, stream)
                self._settle(communicator)
                then(stream)
        except (NcclError, RuntimeError) as error:
            self.error = str(error)
            logger.log(logging.DEBUG if self._ending.is_set() else logging.ERROR, "nccl: %s", error)
        finally:
            self.error = self.error or "closed"
            if communicator is not None:
                communicator.abort()

    def _settle(self, communicator: Communicator) -> None:
        while not communicator.is_settled():
            if self._ending.is_set():
                raise NcclError("given up while the other rank was awaited")
            time.sleep(_POLL_S)


class NcclSend(SendWay):
    """P's half."""

    name = "nccl"

    def __init__(self, copier: CudaCopier, *, slot_bytes: int, num_slots: int, zero: bool = False) -> None:
        self._copier = copier
        self._slot_bytes = max(slot_bytes or copier.slot_bytes, *copier.layer_bytes)
        self._num_slots = num_slots
        self._zero = zero

    def open(self, data: dict[str, Any], pid: int, host: str) -> tuple[NcclSendChannel, dict[str, Any]]:  # noqa: ARG002
        if "gpu" not in data:
            raise TransferError("the decode worker's offer isn't understood: it names no GPU")
        self._copier.bind()
        if data["gpu"] == gpu_identity(self._copier.device):
            raise TransferError("both workers are on one GPU, where NCCL takes no two ranks")
        try:
            meeting = Meeting(new_id(), self._num_slots, self._slot_bytes)
        except NcclError as error:
            raise TransferError(str(error)) from error
        return NcclSendChannel(self._copier, meeting, zero=self._zero), msgspec.structs.asdict(meeting)

    def close(self) -> None: ...


class NcclSendChannel:
    """Mutable state: which slots are free."""

    error = ""

    def __init__(self, copier: CudaCopier, meeting: Meeting, *, zero: bool) -> None:
        self._copier = copier
        self._meeting = meeting
        self._zero = zero
        self._staging = Staging(copier, meeting.num_slots, meeting.slot_bytes)
        self._free = list(range(meeting.num_slots))
        self._pair = Pair(meeting.id, 0, copier.device)

    def room(self, num_blocks: int, first_layer: int, fence: Fence) -> Extent:
        if not self._pair.error and not (self._pair.is_joined and self._free):  # an error is for `push` to say
            return NO_ROOM
        return extent_of_slot(self._copier.layer_bytes, self._meeting.slot_bytes, num_blocks, first_layer, fence)

    def push(
        self,
        sources: Items,
        targets: Items,  # noqa: ARG002 - D knows its targets
        fence: Fence,
        opening: Opening | None = None,  # noqa: ARG002 - D scatters by itself
    ) -> Ticket:
        if self._pair.error:
            return Ticket(0, done=True, error=f"nccl: {self._pair.error}")
        slot = self._free.pop(0)
        size_bytes, buffer = sources.size_bytes(self._copier.layer_bytes), self._staging.buffers[slot]
        ticket = Ticket(size_bytes, slot)

        @functools.cache
        def table() -> PlaneTable:
            return self._copier.dense(buffer.data_ptr(), sources.layers)  # on the stream of the first launch

        def launch(block_ids: torch.Tensor, layers: range, programs: int | None) -> None:
            self._copier.launch(self._copier.planes, table(), block_ids, layers, programs)
            if self._zero:
                buffer.zero_()

        numbers = list(range(len(sources.blocks)))
        gathered = self._copier.copy(self, fence, sources, numbers, ticket, launch)

        def post(communicator: Communicator, stream: torch.cuda.Stream) -> None:
            stream.wait_event(gathered)
            communicator.send(buffer.data_ptr(), size_bytes, stream)

        self._pair.call(post, lambda _stream: None)
        return ticket

    def release(self, slot: int) -> None:
        if 0 <= slot < self._meeting.num_slots and slot not in self._free:
            self._free.append(slot)

    def close(self) -> None:
        """Aborts: D is gone, or connected anew."""
        self._pair.end()


class NcclReceive(ReceiveWay):
    """D's half: an NcclReceiveHalf for each P."""

    name = "nccl"

    def __init__(self, copier: CudaCopier) -> None:
        self._copier = copier

    def open(self) -> NcclReceiveHalf:
        return NcclReceiveHalf(self._copier)

    def close(self) -> None: ...


class NcclReceiveHalf(ReceiveHalf):
    """Mutable state: the pair, and the jobs that it hasn't ended."""

    name = "nccl"
    direct = False

    def __init__(self, copier: CudaCopier) -> None:
        self._copier = copier
        self._pair: Pair | None = None
        self._staging: Staging | None = None
        self._waiter: Waiter | None = None

    def offer(self) -> dict[str, Any]:
        self._copier.bind()
        return {"gpu": gpu_identity(self._copier.device)}

    def attach(self, data: dict[str, Any], pid: int) -> None:  # noqa: ARG002
        try:
            meeting = msgspec.convert(data, Meeting)
        except msgspec.ValidationError as error:
            raise TransferError(f"the prefill worker's invitation is not understood: {error}") from error
        self._copier.bind()
        self._staging = Staging(self._copier, meeting.num_slots, meeting.slot_bytes)
        self._waiter = Waiter("twolane-recv", self._copier.device, self._copier.wake)
        self._pair = Pair(meeting.id, 1, self._copier.device)

    def read(self, slot: int, items: Items) -> Ticket:
        staging, pair, waiter = self._staging, self._pair, self._waiter
        if staging is None or pair is None or waiter is None or not 0 <= slot < len(staging.buffers):
            raise TransferError(f"slot {slot} lies outside the staging buffers")
        size_bytes, buffer = items.size_bytes(self._copier.layer_bytes), staging.buffers[slot]
        if size_bytes > buffer.numel():
            raise TransferError(f"a push of {items.count} items doesn't fit its slot")
        ticket = Ticket(size_bytes, slot)
        self._copier.bind()
        job = self._copier.add_job(ticket, self, None)

        def receive(communicator: Communicator, stream: torch.cuda.Stream) -> None:
            communicator.receive(buffer.data_ptr(), size_bytes, stream)

        def scatter(stream: torch.cuda.Stream) -> None:
            with torch.cuda.stream(stream):  # uploads too: on the agent's they would wait for D's forward passes
                dense = self._copier.dense(buffer.data_ptr(), items.layers)
                block_ids = self._copier.upload(list(range(len(items.blocks))), items.blocks)
                self._copier.launch(dense, self._copier.planes, block_ids, items.layers)
                waiter.add(None, self._copier.event_now(blocking=True), job)

        pair.call(receive, scatter)
        return ticket

    def revoke(self) -> float:
        """Ends the receives that wait for P. Only D's own kernels write to D's memory."""
        if self._pair is not None:
            self._pair.join(timeout_s=1.0)
            self._copier.fail_jobs(self, f"nccl: {self._pair.error}")
        return 0.0

    def close(self) -> None:
        self.revoke()
        if self._waiter is not None:
            self._waiter.close(timeout_s=1.0)
