"""Transport `cuda_ipc`: P's kernel writes straight into D's KV blocks. No staging, no copy by D.

D exports its KV memory (one handle an allocation) and a word of permission for each P. P maps both. A push is one
launch a group of layers; the kernel looks at D's word before it writes. So D needs nobody's help to get its blocks back
from a P that hangs: it changes the word, and after `REVOKE_GRACE_S` no kernel that saw the old one still runs. A
transfer's last push opens D's gate (gates.py).
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

import msgspec
import torch

from twolane.connector.agent import logger
from twolane.connector.host import host_identity
from twolane.connector.layout import KVLayout
from twolane.connector.messages import GateWord
from twolane.connector.transport.base import Extent, Fence, Gate, Items, Opening, Ticket
from twolane.connector.transport.cuda import driver
from twolane.connector.transport.cuda.copier import CudaCopier, Ending
from twolane.connector.transport.cuda.gates import GATES_BYTES, NUM_GATES, Gates
from twolane.connector.transport.cuda.kernel import permit_of
from twolane.connector.transport.cuda.planes import Plane, PlaneTable, planes_of
from twolane.connector.transport.hub import ReceiveHalf, ReceiveWay, SendWay
from twolane.errors import TransferError

# A kernel runs for milliseconds once it has begun; the GPU may give its time to other processes in between.
REVOKE_GRACE_S = 0.25
_MAX_PEERS = 256
_PERMITS_BYTES = 8 * _MAX_PEERS


class RemotePlane(msgspec.Struct, frozen=True, array_like=True):
    """A plane of D's KV memory: in which exported allocation, and where in it."""

    allocation: int
    offset: int
    stride_bytes: int
    size_bytes: int


class ExportedMemory(msgspec.Struct, frozen=True):
    """What P needs to write into D's blocks."""

    host: str
    device: str  # for the log
    num_blocks: int
    handles: list[bytes]
    planes: list[RemotePlane]
    words_handle: bytes
    permit_index: int
    permit_value: int
    gates_offset: int  # in the words' allocation


class Acceptance(msgspec.Struct, frozen=True):
    """P's answer."""

    opens_gates: bool = False


class IpcReceive(ReceiveWay):
    """D's half. Mutable state: the words of permission, and who has which. Owns their memory."""

    name = "cuda_ipc"

    def __init__(self, layout: KVLayout, *, with_gates: bool = True) -> None:
        """Raises driver.DriverError where this memory can't be exported."""
        self._device = torch.device(layout.device)
        driver.bind(self._device)
        self._num_blocks = layout.num_blocks
        self._planes, self._handles = self._export(planes_of(layout))
        self._words = driver.allocate(_PERMITS_BYTES + GATES_BYTES)
        driver.write_words(self._words, [0] * ((_PERMITS_BYTES + GATES_BYTES) // 8))
        self._words_handle = driver.export_memory(self._words)
        self._free = list(range(_MAX_PEERS))
        self._stream = driver.make_stream(self._device)
        self.gates = self._make_gates() if with_gates else None

    def _make_gates(self) -> Gates | None:
        try:
            return Gates(self._words + _PERMITS_BYTES, self._device, self._stream)
        except driver.DriverError as error:
            logger.warning("this GPU can't wait for a word in its memory, so D's engine will: %s", error)
            return None

    @staticmethod
    def _export(planes: list[Plane]) -> tuple[list[RemotePlane], list[bytes]]:
        bases: dict[int, int] = {}  # base address -> index of its handle
        handles: list[bytes] = []
        remote: list[RemotePlane] = []
        for plane in planes:
            base, _ = driver.allocation_of(plane.base)
            if base not in bases:
                bases[base] = len(handles)
                handles.append(driver.export_memory(base))
            remote.append(RemotePlane(bases[base], plane.base - base, plane.stride_bytes, plane.size_bytes))
        return remote, handles

    def open(self) -> IpcReceiveHalf:
        if not self._free:
            raise TransferError(f"more than {_MAX_PEERS} prefill workers at once")
        return IpcReceiveHalf(self, self._free.pop())

    def describe(self, index: int, value: int) -> dict[str, Any]:
        exported = ExportedMemory(
            host_identity(),
            torch.cuda.get_device_name(self._device),
            self._num_blocks,
            self._handles,
            self._planes,
            self._words_handle,
            index,
            value,
            _PERMITS_BYTES,
        )
        return msgspec.structs.asdict(exported)

    def set_permit(self, index: int, value: int) -> None:
        """It is there when this returns, also while the engine's stream stands before a gate."""
        driver.bind(self._device)
        driver.write_word(self._words + 8 * index, value, self._stream)
        self._stream.synchronize()

    def give_back(self, index: int) -> None:
        self._free.append(index)

    def close(self) -> None:
        if self._words:
            driver.bind(self._device)
            if self.gates is not None:
                self.gates.close()
            driver.end_stream(self._stream)
            driver.free(self._words)
            self._words, self.gates = 0, None


class IpcReceiveHalf(ReceiveHalf):
    """What one P may do."""

    name = "cuda_ipc"
    direct = True

    def __init__(self, way: IpcReceive, index: int) -> None:
        self._way = way
        self._index: int | None = index
        self._value = secrets.randbits(62) | 1
        self._opens_gates = False
        way.set_permit(index, self._value)

    def offer(self) -> dict[str, Any]:
        assert self._index is not None
        return self._way.describe(self._index, self._value)

    def attach(self, data: dict[str, Any], pid: int) -> None:  # noqa: ARG002
        """P has mapped this memory, not the other way round."""
        try:
            self._opens_gates = msgspec.convert(data, Acceptance).opens_gates
        except msgspec.ValidationError as error:
            raise TransferError(f"the prefill worker's answer is not understood: {error}") from error

    def gate(self) -> Gate | None:
        gates = self._way.gates
        return gates.take(lambda: self._opens_gates) if gates is not None else None

    def read(self, slot: int, items: Items) -> Ticket:
        raise TransferError(f"slot {slot} of {items.count} items pushed over cuda_ipc, which has no slots")

    def revoke(self) -> float:
        if self._index is not None:
            self._way.set_permit(self._index, 0)
        return REVOKE_GRACE_S

    def close(self) -> None:
        """Revokes too. Idempotent."""
        if self._index is not None:
            self.revoke()
            self._way.give_back(self._index)
            self._index = None


class IpcSend(SendWay):
    """P's half. Mutable state: channels that are to be closed once their last push is through."""

    name = "cuda_ipc"

    def __init__(self, copier: CudaCopier, *, zero: bool = False) -> None:
        self._copier = copier
        self._zeros = self._zero_planes() if zero else None

    def _zero_planes(self) -> tuple[PlaneTable, torch.Tensor]:
        planes = self._copier.planes.planes
        zeros = torch.zeros(max(plane.size_bytes for plane in planes), dtype=torch.uint8, device=self._copier.device)
        return PlaneTable(
            [Plane(zeros.data_ptr(), 0, plane.size_bytes) for plane in planes], self._copier.device
        ), zeros

    def open(self, data: dict[str, Any], pid: int, host: str) -> tuple[IpcSendChannel, dict[str, Any]]:  # noqa: ARG002
        """Maps D's memory. TransferError says why it can't be."""
        try:
            exported = msgspec.convert(data, ExportedMemory)
        except msgspec.ValidationError as error:
            raise TransferError(f"the decode worker's description of its memory isn't understood: {error}") from error
        if exported.host != host_identity() or host != host_identity():
            raise TransferError("the decode worker is on another host")
        self._copier.bind()
        sources = self._zeros[0] if self._zeros else self._copier.planes
        try:
            channel = IpcSendChannel(self._copier, sources, exported)
        except driver.DriverError as error:
            raise TransferError(f"can't map the decode worker's GPU memory ({exported.device}): {error}") from error
        return channel, msgspec.structs.asdict(Acceptance(opens_gates=True))

    def close(self) -> None: ...


class IpcSendChannel:
    """D's memory as P sees it."""

    error = ""

    def __init__(self, copier: CudaCopier, sources: PlaneTable, exported: ExportedMemory) -> None:
        """Raises driver.DriverError; then nothing stays mapped."""
        self._copier = copier
        self._sources = sources
        self._num_blocks = exported.num_blocks
        self._mapped: list[int] = []
        try:
            bases = [self._map(handle) for handle in exported.handles]
            words = self._map(exported.words_handle)
        except driver.DriverError:
            self._unmap()
            raise
        self._permit = permit_of(words + 8 * exported.permit_index, exported.permit_value, copier.device)
        self._gates = words + exported.gates_offset
        self._targets = PlaneTable(
            [Plane(bases[p.allocation] + p.offset, p.stride_bytes, p.size_bytes) for p in exported.planes],
            copier.device,
        )

    def _map(self, handle: bytes) -> int:
        base = driver.map_memory(handle)
        self._mapped.append(base)
        return base

    def _unmap(self) -> None:
        while self._mapped:
            try:
                driver.unmap_memory(self._mapped.pop())
            except driver.DriverError as error:
                logger.warning("memory of a decode worker that is gone stays mapped: %s", error)

    def room(self, num_blocks: int, first_layer: int, fence: Fence) -> Extent:  # noqa: ARG002
        """All: the copier follows the layers by itself."""
        return Extent(num_blocks, range(first_layer, self._copier.num_layers))

    def push(self, sources: Items, targets: Items, fence: Fence, opening: Opening | None = None) -> Ticket:
        assert 0 <= min(targets.blocks) <= max(targets.blocks) < self._num_blocks
        assert 0 <= min(sources.blocks) <= max(sources.blocks) < self._copier.num_blocks
        ticket = Ticket(sources.size_bytes(self._copier.layer_bytes))
        ending = Ending(partial(self._open, opening.gate), opening.after) if opening is not None else None
        self._copier.copy(self, fence, sources, targets.blocks, ticket, self._launch, ending)
        return ticket

    def _open(self, gate: GateWord) -> None:
        if 0 <= gate.index < NUM_GATES:
            self._copier.open_gate(self._gates + 8 * gate.index, gate.value, self._permit)

    def _launch(self, block_ids: torch.Tensor, layers: range, programs: int | None) -> None:
        self._copier.launch(self._sources, self._targets, block_ids, layers, programs, self._permit)

    def release(self, slot: int) -> None:
        """There are none."""

    def close(self) -> None:
        """Unmaps as soon as no push of this channel is in flight."""
        self._copier.when_idle(self, self._unmap)
