"""GPU memory: follows the forward pass, moves blocks on streams of its own, and tells when a copy is through."""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from twolane.connector.layout import KVLayout
from twolane.connector.transport.base import Extent, Fence, Items, Ticket, Wake
from twolane.connector.transport.cuda import driver
from twolane.connector.transport.cuda.kernel import (
    FOLLOWING_PROGRAMS,
    copy_blocks,
    open_gate,
    permit_of,
)
from twolane.connector.transport.cuda.lane import Job, Lane, event_now
from twolane.connector.transport.cuda.passes import Passes, PassFence
from twolane.connector.transport.cuda.planes import PlaneTable, dense_planes, planes_of
from twolane.connector.transport.pace import Forecast
from twolane.errors import ConfigError

# (block ids, layers, programs or None for as many as fill the link), on the current stream
Launch = Callable[[torch.Tensor, range, int | None], None]

_MIN_GROUP_BYTES = 4 << 20  # a launch of its own pays from here on


@dataclass(frozen=True)
class Ending:
    """What a copy launches last, behind these that were begun before it."""

    launch: Callable[[], None]
    after: list[Ticket]


class CudaCopier:
    """transport.copier.Copier for GPUs.

    Mutable state: the passes (engine's thread); jobs in flight, the last copy's event of each lane, a staging buffer
    (all: agent's thread under its lock). Two lanes: one follows the forward pass in flight, so
    that it may wait; what is computed already takes the other and overtakes it.
    """

    slot_bytes = 32 << 20

    def __init__(self, layout: KVLayout, wake: Wake) -> None:
        self.device = torch.device(layout.device)
        self.num_blocks = layout.num_blocks
        self.num_layers = len(layout.regions)
        self.wake = wake
        driver.bind(self.device)
        try:
            self.planes = PlaneTable(planes_of(layout), self.device)
        except ValueError as error:
            raise ConfigError(f"{error}; TwoLane can't move it.") from error
        self._end_plane = list(
            itertools.accumulate((len(region.piece_offsets) for region in layout.regions), initial=0)
        )
        self._passes = Passes([region.name for region in layout.regions], self.device, wake)
        self.begin_pass, self.layer_done, self.fence = self._passes.begin, self._passes.layer_done, self._passes.fence
        self.following = Lane("follow", self.device, wake)
        self.overtaking = Lane("copy", self.device, wake)
        self._jobs: list[Job] = []
        self._endings: list[tuple[object, Callable[[], None]]] = []
        self._last_copies: dict[Lane, torch.cuda.Event] = {}
        self.layer_bytes = layout.layer_bytes
        self.always = permit_of(0, 0, self.device)
        self.scratch = torch.zeros(2, dtype=torch.int64, device=self.device)  # written, never read
        self._bound = threading.local()
        self._warm_up()

    def _warm_up(self) -> None:
        """Compiles the kernel, so that the first request doesn't pay for it."""
        none = torch.zeros((2, 0), dtype=torch.int32, device=self.device)
        copy_blocks(self.planes, self.planes, none, first_plane=0, num_planes=1, permit=self.always)
        self.open_gate(self.scratch.data_ptr(), 1, self.always)
        torch.cuda.current_stream(self.device).synchronize()

    @property
    def num_passes(self) -> int:
        return self._passes.num

    @property
    def forecasts(self) -> Sequence[Forecast]:
        return self._passes.forecasts

    # -- engine's thread

    def quiesce(self) -> None:
        for event in self._last_copies.values():
            torch.cuda.current_stream(self.device).wait_event(event)

    def passes(self) -> Ticket:
        ticket = Ticket(0)
        job = Job(ticket, object(), None)
        event = event_now(self.device)
        if event.query():
            ticket.done = True
        else:
            self._jobs.append(job)
            self.following.waiter.add(None, event, job)
        return ticket

    # -- agent's thread

    def bind(self) -> None:
        """Makes the device current in the calling thread, once."""
        if not getattr(self._bound, "done", False):
            driver.bind(self.device)
            self._bound.done = True

    def copy(
        self,
        owner: object,
        fence: Fence,
        sources: Items,
        targets: list[int],
        ticket: Ticket,
        launch: Launch,
        ending: Ending | None = None,
    ) -> torch.cuda.Event:
        """Moves `sources` to the same layers of `targets` by `launch`, a group of layers each time, behind its mark.

        Returns what is over when all has moved, and the ending is through."""
        self.bind()
        lane = self._lane(fence)
        with torch.cuda.stream(lane.stream):
            block_ids = self.upload(sources.blocks, targets)
            for first, end, event in self._groups(fence, sources):
                lane.stream.wait_event(event)
                launch(block_ids, range(first, end), self._programs(fence, end))
            if ending is not None:
                for event in self._moved(ending.after):
                    lane.stream.wait_event(event)
                ending.launch()
        return self._begin(lane, owner, ticket, block_ids, self._mark(fence, sources))

    def _moved(self, tickets: list[Ticket]) -> list[torch.cuda.Event]:
        """Those that aren't through yet."""
        jobs = [job for job in self._jobs if any(job.ticket is ticket for ticket in tickets)]
        return [job.moved for job in jobs if job.moved is not None]

    def _lane(self, fence: Fence) -> Lane:
        return self.overtaking if fence.is_over() else self.following

    @staticmethod
    def _mark(fence: Fence, items: Items) -> torch.cuda.Event:
        assert isinstance(fence, PassFence)
        return fence.behind(items.layers.stop)

    def _programs(self, fence: Fence, end: int) -> int | None:
        """Layers that others follow may take their time: what they take of the GPU, the forward pass lacks."""
        return None if end == self.num_layers or fence.is_over() else FOLLOWING_PROGRAMS

    def _planes_of(self, layers: range) -> tuple[int, int]:
        """The first, and how many."""
        first, end = self._end_plane[layers.start], self._end_plane[layers.stop]
        return first, end - first

    def _groups(self, fence: Fence, items: Items) -> list[tuple[int, int, torch.cuda.Event]]:
        """(first layer, end layer, event) of each launch."""
        assert isinstance(fence, PassFence)
        first, last = items.layers.start, items.layers.stop
        if fence.is_over():
            return [(first, last, fence.events[-1])]
        groups = []
        for marked, event in zip(fence.layers, fence.events, strict=True):
            end = min(marked, last)
            size_bytes = Extent(len(items.blocks), range(first, end)).size_bytes(self.layer_bytes)
            if first < end and (end == last or size_bytes >= _MIN_GROUP_BYTES):
                groups.append((first, end, event))
                first = end
        return groups

    def dense(self, base: int, layers: range) -> PlaneTable:
        """These layers' planes in a buffer at `base`, on the current stream."""
        first, num_planes = self._planes_of(layers)
        planes = dense_planes(self.planes.planes, first, first + num_planes, base)
        return PlaneTable.on_stream(planes, self.device)

    def upload(self, sources: list[int], targets: list[int]) -> torch.Tensor:
        assert len(sources) == len(targets)
        both = torch.frombuffer(array("i", sources + targets), dtype=torch.int32)  # 3 times as fast as of a list
        return both.view(2, -1).pin_memory().to(self.device, non_blocking=True)

    def _begin(
        self, lane: Lane, owner: object, ticket: Ticket, keeps: object, ready: torch.cuda.Event | None = None
    ) -> torch.cuda.Event:
        job = self.add_job(ticket, owner, keeps)
        self._last_copies[lane] = lane.finish(job, ready)
        return self._last_copies[lane]

    def add_job(self, ticket: Ticket, owner: object, keeps: object) -> Job:
        """The caller sees to it that some Waiter ends it."""
        job = Job(ticket, owner, keeps)
        self._jobs.append(job)
        return job

    def fail_jobs(self, owner: object, error: str) -> None:
        """Nothing of this owner moves any more."""
        for job in self._jobs:
            if job.owner is owner:
                job.ticket.error = job.ticket.error or error
                job.is_through = True
        self.wake()

    def poll(self) -> None:
        blocked: list[object] = []
        waiting = []
        for job in self._jobs:
            if job.is_through and not any(owner is job.owner for owner in blocked):
                job.ticket.done = True
            else:
                blocked.append(job.owner)
                waiting.append(job)
        self._jobs = waiting
        endings, self._endings = self._endings, []
        for owner, call in endings:
            if any(job.owner is owner for job in self._jobs):
                self._endings.append((owner, call))
            else:
                self.bind()
                call()

    def when_idle(self, owner: object, call: Callable[[], None]) -> None:
        """Calls it as soon as no job of this owner is in flight: at once, or from `poll`."""
        self._endings.append((owner, call))
        self.poll()

    # -- slots in host memory

    def pin(self, address: int, size_bytes: int) -> None:
        self.bind()
        driver.pin(address, size_bytes)

    def unpin(self, address: int) -> None:
        self.bind()
        driver.unpin(address)

    def gather(self, address: int, items: Items, fence: Fence) -> Ticket:
        ticket = Ticket(items.size_bytes(self.layer_bytes))
        self.bind()
        lane, mark = self._lane(fence), self._mark(fence, items)
        with torch.cuda.stream(lane.stream):
            base = lane.staging(ticket.size_bytes)
            dense = self.dense(base, items.layers)
            block_ids = self.upload(items.blocks, list(range(len(items.blocks))))
            lane.stream.wait_event(mark)
            self.launch(self.planes, dense, block_ids, items.layers, self._programs(fence, items.layers.stop))
            driver.copy_to_host(address, base, ticket.size_bytes, lane.stream)
        self._begin(lane, self, ticket, (dense, block_ids), mark)
        return ticket

    def scatter(self, address: int, items: Items) -> Ticket:
        ticket = Ticket(items.size_bytes(self.layer_bytes))
        self.bind()
        lane = self.overtaking
        with torch.cuda.stream(lane.stream):
            base = lane.staging(ticket.size_bytes)
            driver.copy_from_host(base, address, ticket.size_bytes, lane.stream)
            dense = self.dense(base, items.layers)
            block_ids = self.upload(list(range(len(items.blocks))), items.blocks)
            self.launch(dense, self.planes, block_ids, items.layers)
        self._begin(lane, self, ticket, (dense, block_ids))
        return ticket

    def launch(
        self,
        sources: PlaneTable,
        targets: PlaneTable,
        block_ids: torch.Tensor,
        layers: range,
        num_programs: int | None = None,
        permit: torch.Tensor | None = None,
    ) -> None:
        """One kernel, on the current stream. `permit`: see kernel.copy_blocks; None: always."""
        first, num_planes = self._planes_of(layers)
        copy_blocks(
            sources,
            targets,
            block_ids,
            first_plane=first,
            num_planes=num_planes,
            permit=self.always if permit is None else permit,
            num_programs=num_programs,
        )

    def open_gate(self, address: int, value: int, permit: torch.Tensor) -> None:
        """On the current stream, with permission: see kernel.open_gate."""
        open_gate(address, value, permit, self.scratch[1:])

    def close(self) -> None:
        for lane in (self.following, self.overtaking):
            lane.stream.synchronize()
            lane.close(timeout_s=5.0)
        self._passes.close(timeout_s=5.0)
        for job in self._jobs:
            job.is_through = True
        self.poll()
