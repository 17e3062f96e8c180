"""A prefill and a decode agent over small KV memories, as a worker would build them; no vLLM needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.ports import free_port
from twolane.connector.decode_agent import DecodeAgent
from twolane.connector.plan import Advance, Finish, Offer, Receive, StepPlan
from twolane.connector.prefill_agent import PrefillAgent
from twolane.connector.settings import ConnectorSettings
from twolane.connector.worker import WorkerFacts, make_decode_agent, make_prefill_agent

SETTINGS = ConnectorSettings(slot_bytes=4096, num_slots=4, lease_s=1.0, peer_timeout_s=1.0, transfer_timeout_s=2.0)
NUM_BLOCKS = 32
BLOCK_SIZE = 4
LAYERS = 3
DIGEST = b"prompt"


@dataclass(frozen=True)
class Memory:
    """What a worker's KV looks like. `width`: floats a token and half. Filled, it is the same in every process."""

    device: str = "cpu"
    num_blocks: int = NUM_BLOCKS
    layers: int = LAYERS
    width: int = 8

    def make(self, *, fill: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator(self.device).manual_seed(3)
        shape = (self.num_blocks, 2, BLOCK_SIZE, self.width)
        return {
            f"layer.{i}": torch.randn(*shape, generator=generator, device=self.device)
            if fill
            else torch.zeros(*shape, device=self.device)
            for i in range(self.layers)
        }


DEFAULT_MEMORY = Memory()


def facts(settings: ConnectorSettings, *, is_prefill: bool, port: int, **changes: Any) -> WorkerFacts:
    made = WorkerFacts(
        is_prefill=is_prefill,
        settings=settings,
        kv_port=port,
        model="tiny",
        kv_dtype="float32",
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        tp_size=1,
        rank=0,
    )
    return replace(made, **changes)


@dataclass
class Prefill:
    agent: PrefillAgent
    address: str
    kv: dict[str, torch.Tensor]

    def offer(self, transfer_id: str = "t", req_id: str = "p", digest: bytes = DIGEST, *, story: bool = False) -> None:
        self.agent.begin_step(StepPlan(offer=[Offer(req_id, transfer_id, digest, story)]))

    def compute(self, block_ids: list[int], num_tokens: int, req_id: str = "p") -> None:
        advance = [Advance(req_id, block_ids, True, num_tokens)]
        self.agent.begin_step(StepPlan(advance=advance))
        self.agent.end_step(advance)

    def finish(self, req_id: str = "p", *, ok: bool = True) -> None:
        self.agent.begin_step(StepPlan(finish=[Finish(req_id, ok)]))

    def wait_freed(self, req_id: str = "p", timeout_s: float = 5.0) -> None:
        wait_for(lambda: self.agent.take_finished({req_id}) == {req_id}, timeout_s)

    @property
    def free_slots(self) -> int:
        ways = self.agent._side._transports._ways.values()  # type: ignore[attr-defined]
        return int(min(way.free_slots for way in ways))


@dataclass
class Decode:
    agent: DecodeAgent
    kv: dict[str, torch.Tensor]

    def receive(
        self,
        prefill_address: str,
        block_ids: list[int],
        num_tokens: int,
        transfer_id: str = "t",
        first_block: int = 0,
        *,
        story: bool = False,
    ) -> None:
        receive = Receive("d", transfer_id, prefill_address, num_tokens, first_block, block_ids, DIGEST, story)
        self.agent.begin_step(StepPlan(receive=[receive]))

    def wait_finished(self, timeout_s: float = 5.0) -> set[int]:
        """Invalid blocks of the one request, once it is reported."""
        invalid: set[int] = set()

        def reported() -> bool:
            finished = self.agent.take_finished(patient=False)
            invalid.update(finished.invalid_block_ids)
            return finished.req_ids == {"d"}

        wait_for(reported, timeout_s)
        return invalid


def start_prefill(
    settings: ConnectorSettings, port: int = 0, *, memory: Memory = DEFAULT_MEMORY, **changes: Any
) -> Prefill:
    port, kv = port or free_port(), memory.make(fill=True)
    made = facts(settings, is_prefill=True, port=port, num_blocks=memory.num_blocks, **changes)
    agent = make_prefill_agent(made, kv)
    agent.start()
    return Prefill(agent, made.rank_0_address, kv)


def start_decode(settings: ConnectorSettings, *, memory: Memory = DEFAULT_MEMORY, **changes: Any) -> Decode:
    kv = memory.make(fill=False)
    made = facts(settings, is_prefill=False, port=free_port(), num_blocks=memory.num_blocks, **changes)
    agent = make_decode_agent(made, kv)
    agent.start()
    return Decode(agent, kv)


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Polls what an engine's step would ask for."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)
