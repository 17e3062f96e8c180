"""Transport `nccl`: staging buffers of bounded size on both GPUs, NCCL's send and receive between them.

One communicator a pair of workers, made and used by a thread of its own (`Pair`), so that neither the engine nor the
agent ever waits for the other side. P gathers blocks into a slot, says Push and sends; D receives and scatters.

NCCL matches sends with receives by their order alone. So slots go by the number of their loan, from 0 on for each
communicator; loan n lies in both sides' buffer n modulo their number. P sends in the order of the loans. D receives
each of them, also those that nobody wants, and takes a Push only if it is of the loan that is due: one that was lost
ends the connection. When either side goes, the other aborts.
"""

from __future__ import annotations

import functools
import os
from queue import SimpleQueue
from typing import Any

import msgspec
import torch

from twolane.connector.transport.base import NO_ROOM, Extent, Fence, Items, Opening, Ticket, extent_of_slot
from twolane.connector.transport.cuda.copier import CudaCopier
from twolane.connector.transport.cuda.lane import Waiter, event_now
from twolane.connector.transport.cuda.nccl_library import Communicator, NcclError, new_id
from twolane.connector.transport.cuda.nccl_pair import Pair
from twolane.connector.transport.cuda.planes import PlaneTable
from twolane.connector.transport.frames import Positive
from twolane.connector.transport.hub import ReceiveHalf, ReceiveWay, SendWay
from twolane.errors import TransferError

_END_S = 1.0  # how long D waits for the end of a communicator when it ends itself
_MIB = 1 << 20


class Meeting(msgspec.Struct, frozen=True):
    """What D needs to join P's communicator."""

    id: bytes
    num_slots: Positive
    slot_bytes: Positive


def gpu_identity(device: torch.device) -> str:
    """The same for two processes only on the same GPU, whatever either sees of the machine. NCCL takes two ranks on one
    GPU if NCCL_HOSTID says that they are on two hosts; then sockets are their way."""
    return f"{torch.cuda.get_device_properties(device).uuid}{os.environ.get('NCCL_HOSTID', '')}"


def staging(copier: CudaCopier, meeting: Meeting) -> tuple[torch.Tensor, ...]:
    """The buffers. Raises TransferError where there is no memory for them."""
    num_slots, slot_bytes = meeting.num_slots, meeting.slot_bytes
    try:
        return tuple(torch.empty(slot_bytes, dtype=torch.uint8, device=copier.device) for _ in range(num_slots))
    except torch.cuda.OutOfMemoryError as error:
        raise TransferError(
            f"no {num_slots * slot_bytes // _MIB} MiB of GPU memory for staging: lower "
            "gpu_memory_utilization, slot_bytes or num_slots"
        ) from error


class NcclSend(SendWay):
    """P's half."""

    name = "nccl"

    def __init__(self, copier: CudaCopier, *, slot_bytes: int, num_slots: int, zero: bool = False) -> None:
        self._copier = copier
        self._slot_bytes = max(slot_bytes or copier.slot_bytes, *copier.layer_bytes)
        self._num_slots = num_slots
        self._zero = zero
        self._streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()

    def open(self, data: dict[str, Any], pid: int, host: str) -> tuple[NcclSendChannel, dict[str, Any]]:  # noqa: ARG002
        if "gpu" not in data:
            raise TransferError("the decode worker's offer isn't understood: it names no GPU")
        self._copier.bind()
        if data["gpu"] == gpu_identity(self._copier.device):
            raise TransferError("both workers are on one GPU, where NCCL takes no two ranks of one host")
        try:
            meeting = Meeting(new_id(), self._num_slots, self._slot_bytes)
        except NcclError as error:
            raise TransferError(str(error)) from error
        channel = NcclSendChannel(self._copier, meeting, self._streams, zero=self._zero)
        return channel, msgspec.structs.asdict(meeting)

    def close(self) -> None: ...


class NcclSendChannel:
    """Mutable state: how many loans there were, and how many of them came back, which they do in order."""

    def __init__(
        self, copier: CudaCopier, meeting: Meeting, streams: SimpleQueue[torch.cuda.Stream], *, zero: bool
    ) -> None:
        self._copier = copier
        self._meeting = meeting
        self._zero = zero
        self._buffers = staging(copier, meeting)
        self._num_lent = self._num_back = 0
        self._pair = Pair(meeting.id, 0, copier.device, self._buffers, streams, copier.wake)

    @property
    def error(self) -> str:
        return f"nccl: {self._pair.error}" if self._pair.error else ""

    def room(self, num_blocks: int, first_layer: int, fence: Fence) -> Extent:
        has_free = self._num_lent - self._num_back < self._meeting.num_slots
        if not self.error and not (self._pair.is_joined and has_free):  # an error is for `push` to say
            return NO_ROOM
        return extent_of_slot(self._copier.layer_bytes, self._meeting.slot_bytes, num_blocks, first_layer, fence)

    def push(
        self,
        sources: Items,
        targets: Items,  # noqa: ARG002 - D knows its targets
        fence: Fence,
        opening: Opening | None = None,  # noqa: ARG002 - D scatters by itself
    ) -> Ticket:
        if self.error:
            return Ticket(0, done=True, error=self.error)
        loan, buffer = self._num_lent, self._buffers[self._num_lent % len(self._buffers)]
        self._num_lent += 1
        size_bytes = sources.size_bytes(self._copier.layer_bytes)
        ticket = Ticket(size_bytes, loan)

        @functools.cache
        def table() -> PlaneTable:
            return self._copier.dense(buffer.data_ptr(), sources.layers)  # on the stream of the first launch

        def launch(block_ids: torch.Tensor, layers: range, programs: int | None) -> None:
            self._copier.launch(self._copier.planes, table(), block_ids, layers, programs)
            if self._zero:
                buffer.zero_()  # on the same stream

        numbers = list(range(len(sources.blocks)))
        gathered = self._copier.copy(self, fence, sources, numbers, ticket, launch)

        def post(communicator: Communicator, stream: torch.cuda.Stream) -> None:
            stream.wait_event(gathered)
            communicator.send(buffer.data_ptr(), size_bytes, stream)

        self._pair.call(post, lambda _stream: None)
        return ticket

    def release(self, slot: int) -> None:
        if self._num_back <= slot < self._num_lent:
            self._num_back = slot + 1

    def close(self) -> None:
        """Aborts: D is gone, or connected anew. The buffers are free once nothing is copied to them or sent."""
        self._pair.end()
        self._copier.when_idle(self, self._forget_buffers)

    def _forget_buffers(self) -> None:
        self._buffers = ()


class NcclReceive(ReceiveWay):
    """D's half: a NcclReceiveHalf for each P. Mutable state: those whose communicator isn't over."""

    name = "nccl"

    def __init__(self, copier: CudaCopier) -> None:
        self._copier = copier
        self._streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        self._halves: list[NcclReceiveHalf] = []

    def open(self) -> NcclReceiveHalf:
        self._halves.append(NcclReceiveHalf(self._copier, self._streams))
        return self._halves[-1]

    def poll(self) -> None:
        for half in self._halves:
            half.poll()
        self._halves = [half for half in self._halves if not half.is_over]

    def close(self) -> None:
        for half in self._halves:
            half.close()
        for half in self._halves:
            half.join(_END_S)
        self.poll()


class NcclReceiveHalf(ReceiveHalf):
    """Mutable state: the pair until it is over, and which loan is due."""

    name = "nccl"
    direct = False

    def __init__(self, copier: CudaCopier, streams: SimpleQueue[torch.cuda.Stream]) -> None:
        self._copier = copier
        self._streams = streams
        self._pair: Pair | None = None
        self._waiter: Waiter | None = None
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._due = 0
        self._is_closed = False

    def offer(self) -> dict[str, Any]:
        self._copier.bind()
        return {"gpu": gpu_identity(self._copier.device)}

    def attach(self, data: dict[str, Any], pid: int) -> None:  # noqa: ARG002
        try:
            meeting = msgspec.convert(data, Meeting)
        except msgspec.ValidationError as error:
            raise TransferError(f"the prefill worker's invitation is not understood: {error}") from error
        self._copier.bind()
        self._buffers = staging(self._copier, meeting)
        self._waiter = Waiter("twolane-recv", self._copier.device, self._copier.wake)
        self._pair = Pair(meeting.id, 1, self._copier.device, self._buffers, self._streams, self._copier.wake)

    def read(self, slot: int, items: Items) -> Ticket:
        return self._receive(slot, items.size_bytes(self._copier.layer_bytes), items)

    def discard(self, slot: int, size_bytes: int) -> Ticket:
        """Receives all the same: P's send is matched with the next receive, whichever it is."""
        return self._receive(slot, size_bytes, None)

    def _receive(self, slot: int, size_bytes: int, items: Items | None) -> Ticket:
        """`items`: where the bytes go; None: nowhere."""
        pair, waiter = self._pair, self._waiter
        if pair is None or waiter is None or pair.error:
            raise TransferError(f"nccl: {pair.error if pair else 'there is no communicator'}")
        if slot != self._due:
            raise TransferError(f"slot {slot} isn't lent to us (any more), {self._due} is due")
        buffer = self._buffers[slot % len(self._buffers)]
        if not 0 < size_bytes <= buffer.numel():
            raise TransferError(f"a push of {size_bytes} bytes doesn't fit its slot")
        self._due += 1
        ticket = Ticket(size_bytes, slot, is_intact=lambda: not pair.error)  # an abort looks like an end
        self._copier.bind()
        job = self._copier.add_job(ticket, self, None)

        def receive(communicator: Communicator, stream: torch.cuda.Stream) -> None:
            communicator.receive(buffer.data_ptr(), size_bytes, stream)

        def then(stream: torch.cuda.Stream) -> None:
            with torch.cuda.stream(stream):  # uploads too: on the agent's they would wait for D's forward passes
                if items is not None:
                    self._scatter(buffer, items)
                waiter.add(None, event_now(self._copier.device), job)

        pair.call(receive, then)
        return ticket

    def _scatter(self, buffer: torch.Tensor, items: Items) -> None:
        dense = self._copier.dense(buffer.data_ptr(), items.layers)
        block_ids = self._copier.upload(list(range(len(items.blocks))), items.blocks)
        self._copier.launch(dense, self._copier.planes, block_ids, items.layers)

    def poll(self) -> None:
        """Once nothing of the communicator runs any more: what hasn't landed has failed, the memory is free."""
        if self._pair is not None and self._waiter is not None and self._pair.is_over:
            self._copier.fail_jobs(self, f"nccl: {self._pair.error}")
            self._waiter.close(timeout_s=0.0)
            self._pair = self._waiter = None
            self._buffers = ()

    def revoke(self) -> float:
        """Only D's own kernels write to D's memory. Reads end when none of them runs any more: not before the abort,
        which nobody waits for here, under the agent's lock."""
        if self._pair is not None:
            self._pair.end()
        return 0.0

    def close(self) -> None:
        """Idempotent."""
        self.revoke()
        self._is_closed = True

    def join(self, timeout_s: float) -> None:
        if self._pair is not None:
            self._pair.join(timeout_s)

    @property
    def is_over(self) -> bool:
        return self._is_closed and self._pair is None
