"""Prefill and decode workers in one process, without sockets, threads or a clock: the real sides over queues, engines
that allocate, free and reuse blocks, and memory that is written late. Whatever can go wrong is a call of the test's.

What must never happen is asserted where it would happen: a byte that lands in a block of somebody else, a request that
is reported twice, a block that D uses with anything but its own KV in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from tests.connector.sim_network import Network, SimClient
from tests.connector.sim_transport import (
    BLOCK_SIZE,
    GRACE_S,
    ITEM_BYTES,
    LAYERS,
    LAYOUT,
    NOTHING,
    NUM_BLOCKS,
    SLOT_ITEMS,
    Codes,
    DirectReceive,
    DirectSend,
    Memory,
    SimCopier,
    SimShmReceive,
    SimShmSend,
)
from twolane.connector.decode_side import DecodeSide
from twolane.connector.head_start import LIMIT_S
from twolane.connector.host import host_identity
from twolane.connector.messages import Identity, KVFormat, ToDecode, ToPrefill
from twolane.connector.plan import Advance, Drop, Finish, Offer, Receive, StepPlan
from twolane.connector.prefill_side import PrefillSide
from twolane.connector.settings import ConnectorSettings
from twolane.connector.story import Story
from twolane.connector.transport.base import Ticket
from twolane.connector.transport.hub import Receivers, Senders, SendWay
from twolane.connector.transport.pace import Forecast
from twolane.connector.transport.tcp import TcpSend
from twolane.connector.transport.tcp_receive import TcpReceive

Way = Literal["direct", "shm", "tcp"]  # direct: P writes to D's blocks itself
SETTINGS = ConnectorSettings(lease_s=3.0, peer_timeout_s=2.0, transfer_timeout_s=4.0)
NUM_SLOTS = 4
SLOT_BYTES = SLOT_ITEMS * ITEM_BYTES
FORECAST_S = 0.004  # a token: some are due at once, some later
TURN_S = 0.1  # how often an agent looks at its deadlines, where nothing goes wrong
FORMAT = KVFormat(2, "tiny", "bytes", BLOCK_SIZE, 1, LAYOUT.signature())

# Within this D reports every request and P frees every block, whatever happened before: D waits for a block, then for
# P's word, then for the grace; the lease then begins with D's last word. Two looks at the deadline each.
D_ENDS_WITHIN_S = SETTINGS.transfer_timeout_s + SETTINGS.peer_timeout_s + GRACE_S + 4 * TURN_S
P_ENDS_WITHIN_S = D_ENDS_WITHIN_S + SETTINGS.lease_s + 2 * TURN_S


@dataclass(frozen=True)
class Handoff:
    """One request's two legs. `differs`: the two sides see different prompts."""

    transfer_id: str
    address: str
    num_tokens: int
    first_block: int
    differs: bool

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // BLOCK_SIZE)

    def digest(self, *, on_prefill: bool) -> bytes:
        return f"{self.transfer_id}{'!' if self.differs and on_prefill else ''}".encode()


@dataclass(eq=False)
class Wire:
    """A connection: D's socket to an address. Whoever is P there hears `to_p`."""

    name: str
    address: str
    decode: Decode
    to_p: list[ToPrefill] = field(default_factory=list)
    to_d: list[ToDecode] = field(default_factory=list)
    is_open: bool = True


@dataclass(eq=False)
class PrefillRequest:
    handoff: Handoff
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    is_preempted: bool = True  # its next blocks replace what it had


class Worker:
    """What a prefill and a decode worker have in common: a process that may hang or be dead, and its memory."""

    def __init__(self, world: World, pid: int) -> None:
        self.world = world
        self.pid = pid
        self.is_alive = True
        self.is_hung = False
        self.memory = Memory(self.check_write)
        self.copier = SimCopier(self.memory, world.codes)
        self.free = list(range(NUM_BLOCKS))
        self.watched: dict[bytes | str, int] = {}  # peer -> pid

    @property
    def runs(self) -> bool:
        return self.is_alive and not self.is_hung

    @property
    def identity(self) -> Identity:
        return Identity(f"epoch {self.pid}", self.pid, host_identity())

    def check_write(self, block: int) -> None:
        raise AssertionError(f"a transfer writes to block {block} of a prefill instance")

    def watch(self, peer: bytes | str, pid: int, host: str) -> None:
        if not self.world.workers[pid].is_alive:
            raise ProcessLookupError
        self.watched[peer] = pid

    def unwatch(self, peer: bytes | str) -> None:
        self.watched.pop(peer, None)

    def give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            assert block not in self.free, f"block {block} given back twice"
            self.memory.fill(block, NOTHING)
        self.free += blocks


class Prefill(Worker):
    """P: side, engine and memory."""

    def __init__(self, world: World, pid: int, address: str, way: Way) -> None:
        super().__init__(world, pid)
        self.address = address
        self.way = way
        self.shm = SimShmSend(LAYOUT, self.copier, slot_bytes=0, num_slots=NUM_SLOTS)
        self.tcp = TcpSend(
            self.copier,
            world.network.serve,
            LAYOUT.layer_bytes,
            slot_bytes=SLOT_BYTES,
            num_slots=NUM_SLOTS,
            chunk_bytes=ITEM_BYTES,
        )
        made: dict[Way, SendWay] = {"direct": DirectSend(self.copier), "shm": self.shm, "tcp": self.tcp}
        ways = [made[way]]
        self.side = PrefillSide(SETTINGS, self.identity, FORMAT, Senders(self.copier, ways), self, Story("P", 0))
        self.running: dict[str, PrefillRequest] = {}
        self.held: dict[str, list[int]] = {}  # ended; the transfer has the blocks
        self.plan = StepPlan()
        self.ended_now: set[str] = set()

    # -- Links

    def send(self, peer: bytes, message: ToDecode) -> None:
        wire = self.world.wires.get(peer.decode().partition("/")[0])
        if wire is not None and wire.is_open and wire.decode.is_alive and peer == self.name_of(wire):
            wire.to_d.append(message)

    def name_of(self, wire: Wire) -> bytes:
        """A socket that connects again has another name."""
        return f"{wire.name}/{self.pid}".encode()

    # -- engine

    def arrive(self, handoff: Handoff, req_id: str) -> None:
        self.running[req_id] = PrefillRequest(handoff)
        self.plan.offer.append(Offer(req_id, handoff.transfer_id, handoff.digest(on_prefill=True)))

    def end(self, req_id: str) -> None:
        """Its prompt is computed to the end, or the client has left."""
        request = self.running.pop(req_id)
        is_computed = request.num_computed > request.handoff.num_tokens
        self.plan.finish.append(Finish(req_id, is_computed))
        self.held[req_id] = request.blocks
        self.ended_now.add(req_id)

    @property
    def computed(self) -> list[str]:
        return [name for name, one in self.running.items() if one.num_computed > one.handoff.num_tokens]

    def step(self, compute: str = "", num_tokens: int = 0, preempt: str = "") -> None:
        """One engine step, with a chunk of one request. Preempted blocks are overwritten in the same step."""
        if request := self.running.get(preempt):
            self.plan.preempted.append(preempt)
            taken, request.blocks, request.num_computed, request.is_preempted = request.blocks, [], 0, True
        else:
            taken = []
        advance = self._chunk(self.running[compute], compute, num_tokens) if compute in self.running else []
        plan, self.plan = self.plan, StepPlan()
        self.side.begin_step(plan, self.world.now_s)
        self.give_back(taken)
        self._forward(self.running.get(compute))
        self.copier.forecasts = [Forecast(self.copier.num_passes, self.world.now_s + num_tokens * FORECAST_S)]
        self.side.foretell(self.world.now_s)
        if advance:
            self.side.end_step(advance, self.world.now_s)
        ended, self.ended_now = self.ended_now, set()
        for req_id in self.side.take_finished(ended, self.world.now_s):
            self.give_back(self.held.pop(req_id))  # KeyError: reported twice, or before it ended

    def _chunk(self, request: PrefillRequest, req_id: str, num_tokens: int) -> list[Advance]:
        valid = min(request.num_computed + num_tokens, request.handoff.num_tokens + 1)
        needed = -(-valid // BLOCK_SIZE) - len(request.blocks)
        if valid == request.num_computed or needed > len(self.free):
            return []
        new = [self.free.pop() for _ in range(needed)]
        request.blocks += new
        request.num_computed = valid
        replace, request.is_preempted = request.is_preempted, False
        return [Advance(req_id, list(request.blocks) if replace else new, replace, valid)]

    def _forward(self, request: PrefillRequest | None) -> None:
        for index, block in enumerate(request.blocks if request else []):
            assert request is not None
            valid = min(BLOCK_SIZE, request.num_computed - index * BLOCK_SIZE)
            prompt = request.handoff.digest(on_prefill=True).decode()
            self.memory.fill(block, (prompt, index, valid))

    # -- agent

    def turn(self) -> None:
        self.side.tick(self.world.now_s)
        while self.side.push_next(self.world.now_s):
            self.side.settle(self.world.now_s)
        self.side.settle(self.world.now_s)

    def on_death(self, peer: bytes | str) -> None:
        assert isinstance(peer, bytes)
        self.side.on_peer_death(peer)

    def check_nothing_left(self) -> None:
        assert not self.held, f"never given back: {self.held}"
        assert sorted(self.free) == list(range(NUM_BLOCKS))
        assert self.shm.free_slots == self.tcp.free_slots == NUM_SLOTS, "a slot stays lent"
        side = self.side
        assert side._offers.is_empty
        assert not side._flights
        assert not side._farewells
        assert not side._offers._gone, "remembered for ever"
        assert not any(peer.lent for peer in side._peers._by_name.values())


class Decode(Worker):
    """D: side, engine and memory."""

    def __init__(self, world: World, pid: int) -> None:
        super().__init__(world, pid)
        self.direct = DirectReceive(self.memory)
        self.client = SimClient(world.network)
        self.tcp = TcpReceive(LAYOUT, self.copier, self.client, slot_bytes=SLOT_BYTES, num_slots=NUM_SLOTS)
        receivers = Receivers(self.copier, [self.direct, SimShmReceive(LAYOUT, self.copier), self.tcp])
        self.side = DecodeSide(SETTINGS, self.identity, FORMAT, 0, receivers, self, Story("D", 0))
        self.sockets: dict[str, Wire] = {}
        self.blocks: dict[str, list[int]] = {}  # of every request
        self.waiting: dict[str, Handoff] = {}  # until it is reported
        self.dropped: set[str] = set()
        self.plan = StepPlan()
        self.steps: list[tuple[StepPlan, Ticket]] = []  # the agent hasn't heard of them
        self.awaits: list[str] = []  # a step computes with these as soon as nothing is written to their blocks
        self.awaits_since_s = 0.0
        self.num_head_starts = 0

    # -- Links

    def connect(self, address: str) -> None:
        self.sockets[address] = self.world.wire(address, self)

    def send(self, address: str, message: ToPrefill) -> None:
        if wire := self.sockets.get(address):
            wire.to_p.append(message)

    def disconnect(self, address: str) -> None:
        self.unwatch(address)
        self.sockets.pop(address).is_open = False

    # -- engine

    def arrive(self, handoff: Handoff, req_id: str) -> bool:
        """Whether there was room for it."""
        if handoff.num_blocks > len(self.free):
            return False
        blocks = self.blocks[req_id] = [self.free.pop() for _ in range(handoff.num_blocks)]
        self.waiting[req_id] = handoff
        self.plan.receive.append(
            Receive(
                req_id,
                handoff.transfer_id,
                handoff.address,
                handoff.num_tokens,
                handoff.first_block,
                blocks[handoff.first_block :],
                handoff.digest(on_prefill=False),
            )
        )
        return True

    def drop(self, req_id: str) -> None:
        """The client left. A request that waits keeps its blocks until it is reported."""
        if handoff := self.waiting.get(req_id):
            if req_id not in self.dropped:
                self.dropped.add(req_id)
                self.plan.drop.append(Drop(handoff.transfer_id, handoff.address, "the client left"))
        else:
            self.give_back(self.blocks.pop(req_id))

    def step(self) -> None:
        """One engine step: requests that don't wait write to their blocks, sooner or later."""
        if self.awaits and not self._may_go_on():
            return
        plan, self.plan = self.plan, StepPlan()
        if plan.receive or plan.drop:
            self.steps.append((plan, self.side.fence()))
        running = [(req_id, blocks) for req_id, blocks in self.blocks.items() if req_id not in self.waiting]
        if running:
            self.copier.launch(lambda: self._decode_into(running))
        finished = self.side.arrivals.take_finished()
        for req_id in finished.req_ids:
            handoff = self.waiting.pop(req_id)  # KeyError: reported twice
            if req_id in self.dropped:
                self.dropped.remove(req_id)
                self.give_back(self.blocks.pop(req_id))
            else:
                self._check_contents(handoff, self.blocks[req_id], finished.invalid_block_ids)
        if not running and (due := self.side.arrivals.take_due(self.world.now_s)):
            self.awaits, self.awaits_since_s = due, self.world.now_s
            self.num_head_starts += len(due)

    def _may_go_on(self) -> bool:
        """As DecodeAgent.await_started, which has the engine's thread wait."""
        if early := self.side.arrivals.open_of(self.awaits):
            if self.world.now_s > self.awaits_since_s + LIMIT_S:
                self.side.give_up(early, self.world.now_s)
            return False
        self.side.arrivals.started_early([], self.world.now_s - self.awaits_since_s, self.world.now_s)
        self.awaits = []
        return True

    def _decode_into(self, running: list[tuple[str, list[int]]]) -> None:
        """A pass that was launched for these requests; by now their blocks may be others'."""
        for req_id, blocks in running:
            for block in blocks:
                prompts = {self.memory.items.get((block, layer), NOTHING)[0] for layer in range(LAYERS)}
                landed = [name for name in self.blocks if name != req_id and name.removeprefix("d-") in prompts]
                assert not landed, f"a forward pass overwrites what has landed for {landed} in block {block}"
                self.memory.fill(block, ("decoded", block, 0))

    def _check_contents(self, handoff: Handoff, blocks: list[int], invalid: set[int]) -> None:
        """What D is about to compute with."""
        for index in range(handoff.first_block, handoff.num_blocks):
            if (block := blocks[index]) in invalid:
                continue
            for layer in range(LAYERS):
                prompt, number, valid = self.memory.items.get((block, layer), NOTHING)
                assert (prompt, number) == (handoff.transfer_id, index), f"block {block} of {handoff}"
                assert valid >= min(BLOCK_SIZE, handoff.num_tokens - index * BLOCK_SIZE)

    def check_write(self, block: int) -> None:
        if self.is_alive:
            owners = [req_id for req_id in self.waiting if block in self.blocks[req_id]]
            assert owners, f"bytes land in block {block}, which waits for none"

    # -- agent

    def turn(self) -> None:
        steps, self.steps = self.steps, []
        for plan, gate in steps:
            self.side.begin_step(plan, gate, self.world.now_s)
        self.side.settle(self.world.now_s)
        self.side.tick(self.world.now_s)

    def on_death(self, peer: bytes | str) -> None:
        assert isinstance(peer, str)
        self.side.on_peer_death(peer, self.world.now_s)

    def check_nothing_left(self) -> None:
        assert not self.waiting, f"never reported: {self.waiting}"
        assert not self.plan.receive
        assert not self.steps
        assert not self.awaits
        side = self.side
        assert side.arrivals.is_empty
        assert not side._gates
        assert not side._peers._revoked
        assert not any(peer.transfers or peer.reads for peer in side._peers.all())
        for req_id in list(self.blocks):
            self.drop(req_id)
        assert sorted(self.free) == list(range(NUM_BLOCKS))


class World:
    """All workers, the wires between them, and the time."""

    def __init__(self, ways: list[Way], num_decodes: int) -> None:
        """A P for each of `ways`, which it sends by."""
        self.now_s = 1000.0
        self.codes = Codes()
        self.network = Network()
        self.workers: dict[int, Worker] = {}
        self.wires: dict[str, Wire] = {}
        self._numbers = count(1)
        self.prefills = [self._add_prefill(f"p:{number}", way) for number, way in enumerate(ways, 1)]
        self.decodes: list[Decode] = []
        for _ in range(num_decodes):
            self.add_decode()

    def _add_prefill(self, address: str, way: Way) -> Prefill:
        made = Prefill(self, next(self._numbers), address, way)
        self.workers[made.pid] = made
        return made

    def add_decode(self) -> Decode:
        made = Decode(self, next(self._numbers))
        self.workers[made.pid] = made
        self.decodes.append(made)
        return made

    def handoff(self, prefill: int, num_tokens: int, first_block: int = 0, *, differs: bool = False) -> Handoff:
        name, address = f"t{next(self._numbers)}", self.prefills[prefill].address
        first_block = min(first_block, (num_tokens - 1) // BLOCK_SIZE)
        return Handoff(name, address, num_tokens, first_block, differs)

    def wire(self, address: str, decode: Decode) -> Wire:
        made = Wire(f"w{next(self._numbers)}", address, decode)
        self.wires[made.name] = made
        return made

    # -- messages

    def deliver_to_p(self, wire: Wire, index: int = 0) -> None:
        """To whoever is P at that address by now."""
        prefill = next(one for one in self.prefills if one.address == wire.address)
        if prefill.runs:
            prefill.side.on_message(prefill.name_of(wire), wire.to_p.pop(index), self.now_s)
        elif not wire.decode.is_alive:
            wire.to_p.pop(index)

    def deliver_to_d(self, wire: Wire, index: int = 0) -> None:
        if not wire.is_open or not wire.decode.is_alive:
            wire.to_d.clear()
        elif wire.decode.runs:
            wire.decode.side.on_message(wire.address, wire.to_d.pop(index), self.now_s)

    # -- life and death

    def kill(self, worker: Worker) -> None:
        """Its GPU finishes what it has begun; nobody hears of it yet."""
        worker.is_alive = False
        worker.copier.ops = [op for op in worker.copier.ops if op.begun_at_s is not None]
        if isinstance(worker, Prefill):
            worker.copier.ops = [op for op in worker.copier.ops if not op.touches.start]
            worker.shm.close()
            worker.tcp.close()
        elif isinstance(worker, Decode):
            del DirectReceive.targets[id(worker.direct)]
            worker.copier.ops.clear()
            worker.client.close()

    def restart(self, worker: Worker) -> None:
        """A new process in the place of a dead one."""
        if isinstance(worker, Prefill):
            self.prefills[self.prefills.index(worker)] = self._add_prefill(worker.address, worker.way)
        elif isinstance(worker, Decode):
            self.decodes.remove(worker)
            self.add_decode()

    def deaths(self) -> Iterator[tuple[Worker, bytes | str]]:
        """(who should hear of it, who died)"""
        for worker in (*self.prefills, *self.decodes):
            for peer, pid in list(worker.watched.items()) if worker.runs else []:
                if not self.workers[pid].is_alive:
                    yield worker, peer

    def tell_deaths(self) -> None:
        for worker, peer in list(self.deaths()):
            if peer in worker.watched:
                worker.unwatch(peer)
                assert isinstance(worker, Prefill | Decode)
                worker.on_death(peer)

    # -- time

    def pass_time(self, seconds: float) -> None:
        """A kernel that has begun is through within the grace."""
        self.now_s += seconds
        for worker in self.workers.values():
            for op in list(worker.copier.ops):
                if op.begun_at_s is not None and not op.through and self.now_s >= op.begun_at_s + GRACE_S:
                    op.advance(self.now_s)

    def move_all(self) -> None:
        for worker in self.workers.values():
            for op in list(worker.copier.ops):
                op.advance(self.now_s)
                op.advance(self.now_s)
        self.network.move_all()

    def deliver_all(self) -> None:
        for wire in list(self.wires.values()):
            for _ in range(len(wire.to_p)):
                self.deliver_to_p(wire)
            for _ in range(len(wire.to_d)):
                self.deliver_to_d(wire) if wire.to_d else None
            if not wire.is_open and not wire.to_p:
                del self.wires[wire.name]

    def calm(self, rounds: int) -> None:
        """Everything goes as it should for a while."""
        for _ in range(rounds):
            workers: list[Prefill | Decode] = [*self.prefills, *self.decodes]
            for worker in workers:
                if worker.runs:
                    self._go_on(worker)
                    worker.turn()
            self.deliver_all()
            self.move_all()
            self.tell_deaths()
            self.pass_time(TURN_S)

    @staticmethod
    def _go_on(worker: Prefill | Decode) -> None:
        if isinstance(worker, Prefill):
            for name in worker.computed:
                worker.end(name)
            for name in worker.running:
                worker.step(name, BLOCK_SIZE)
        worker.step()

    def close(self) -> None:
        for worker in self.workers.values():
            if worker.is_alive:
                worker.copier.ops.clear()
                self.kill(worker)
            if isinstance(worker, Decode):
                worker.side.close()
