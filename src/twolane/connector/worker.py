"""The connector inside a vLLM worker: builds the agent once the KV memory is known, and passes each step on to it."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from typing import Any

import zmq

from twolane.addresses import is_loopback, join_address, rank_address
from twolane.connector.agent import logger
from twolane.connector.arrivals import Finished
from twolane.connector.decode_agent import DecodeAgent
from twolane.connector.decode_side import DecodeSide
from twolane.connector.gpus import gpu_uuids
from twolane.connector.host import host_identity
from twolane.connector.layout import KVLayout, layout_of
from twolane.connector.messages import PROTOCOL_VERSION, Identity, KVFormat
from twolane.connector.plan import StepPlan
from twolane.connector.prefill_agent import PrefillAgent
from twolane.connector.prefill_side import PrefillSide
from twolane.connector.register import Registrar
from twolane.connector.settings import ConnectorSettings, keys_of
from twolane.connector.stats import Counts
from twolane.connector.story import Story
from twolane.connector.transport.select import receivers_for, senders_for
from twolane.curve import Keys, ZmqContext
from twolane.errors import ConfigError
from twolane.protocol import Registration


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker must know of its instance, from vLLM's configuration."""

    is_prefill: bool
    settings: ConnectorSettings
    kv_port: int
    model: str  # identity of architecture and configuration, not a path
    kv_dtype: str
    block_size: int
    num_blocks: int
    tp_size: int
    rank: int

    @property
    def rank_0_address(self) -> str:
        return join_address(self.settings.host, self.kv_port)

    def kv_format(self, layout: KVLayout) -> KVFormat:
        return KVFormat(PROTOCOL_VERSION, self.model, self.kv_dtype, self.block_size, self.tp_size, layout.signature())


def _registrar(facts: WorkerFacts, epoch: str, context: ZmqContext, keys: Keys | None) -> Registrar | None:
    """Rank 0 speaks for the instance."""
    settings = facts.settings
    if facts.rank != 0 or not settings.discovery_address or not settings.http_address:
        return None
    me = Registration(
        type="P" if facts.is_prefill else "D",
        http_address=settings.http_address,
        zmq_address=facts.rank_0_address,
        kind="twolane",
        epoch=epoch,
        name=settings.name,
        gpus=gpu_uuids(facts.tp_size),
    )
    return Registrar(context, settings.discovery_address, me, keys)


def _keys(facts: WorkerFacts) -> Keys | None:
    """Says so, once an instance, if anybody on the network may speak to it. That is left to the user, whose network may
    be his own."""
    keys, host = keys_of(facts.settings), facts.settings.host
    if keys is None and facts.rank == 0 and not is_loopback(host):
        logger.warning(
            "anybody who reaches %s can read and take KV here, and nothing is encrypted: set registration_secret_file, "
            "the same for the proxy and all instances, unless the network is your own (docs/THREATS.md)",
            host,
        )
    return keys


def _story(facts: WorkerFacts, registrar: Registrar | None) -> Story:
    outbox = None if registrar is None else registrar.outbox
    return Story("P" if facts.is_prefill else "D", facts.rank, facts.settings.trace_file, outbox)


def _identity() -> Identity:
    return Identity(epoch=uuid.uuid4().hex, pid=os.getpid(), host=host_identity())


def make_prefill_agent(facts: WorkerFacts, kv_caches: dict[str, Any]) -> PrefillAgent:
    """Raises ConfigError if the layout can't be moved or the control port is taken."""
    keys = _keys(facts)
    layout, me, context = layout_of(kv_caches, facts.num_blocks), _identity(), zmq.Context(io_threads=1)
    registrar = _registrar(facts, me.epoch, context, keys)

    def make_side(agent: PrefillAgent) -> PrefillSide:
        return PrefillSide(
            facts.settings,
            me,
            facts.kv_format(layout),
            senders_for(layout, facts.settings, agent.wake, agent.poller),
            agent,
            _story(facts, registrar),
        )

    address = rank_address(facts.rank_0_address, facts.rank)
    loses = facts.settings.fault == "drop_tenth"
    try:
        return PrefillAgent(make_side, address, registrar, context, keys, loses_tenth=loses)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"control address {address}: {error.strerror}. Another process has the port? Set another kv_port."
        ) from error


def make_decode_agent(facts: WorkerFacts, kv_caches: dict[str, Any]) -> DecodeAgent:
    """Raises ConfigError if the layout can't be moved."""
    keys = _keys(facts)
    layout, me, context = layout_of(kv_caches, facts.num_blocks), _identity(), zmq.Context(io_threads=1)
    registrar = _registrar(facts, me.epoch, context, keys)

    def make_side(agent: DecodeAgent) -> DecodeSide:
        return DecodeSide(
            facts.settings,
            me,
            facts.kv_format(layout),
            facts.rank,
            receivers_for(layout, facts.settings, agent.wake, agent.poller),
            agent,
            _story(facts, registrar),
        )

    return DecodeAgent(make_side, registrar, context, keys)


class WorkerSide:
    """One of the two agents, behind the calls that vLLM's model runner makes. Engine's thread."""

    def __init__(self, facts: WorkerFacts) -> None:
        self._facts = facts
        self._prefill: PrefillAgent | None = None
        self._decode: DecodeAgent | None = None
        self._plan = StepPlan()
        self._is_idle = False
        self._may_start_early = False
        self._invalid_block_ids: set[int] = set()
        self._due: list[str] = []

    def register(self, kv_caches: dict[str, Any]) -> None:
        if self._facts.is_prefill:
            self._prefill = make_prefill_agent(self._facts, kv_caches)
        else:
            self._decode = make_decode_agent(self._facts, kv_caches)
        self._agent.start()

    @property
    def _agent(self) -> PrefillAgent | DecodeAgent:
        agent = self._prefill or self._decode
        assert agent is not None, "register_kv_caches comes before the first step"
        return agent

    def begin_step(self, plan: StepPlan) -> None:
        self._agent.check()
        self._plan, self._is_idle, self._may_start_early = plan, not plan.num_tokens, plan.may_start_early
        self._agent.begin_step(plan)
        if plan.started and self._decode is not None:
            self._decode.hold_started(plan.started)
        self._agent.tell_load(plan.load)

    def end_forward(self) -> None:
        """The forward pass was launched. Called once or several times a step; the second time there is no plan."""
        plan, self._plan = self._plan, StepPlan()
        if self._prefill is not None and plan.advance:
            self._prefill.end_step(plan.advance)
        elif self._decode is not None:
            self._decode.end_step()

    def end_layer(self, layer_name: str) -> None:
        """The forward pass of this layer was launched."""
        if self._prefill is not None and self._plan.advance:
            self._prefill.layer_done(layer_name)

    def take_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """(sent, received), as vLLM's get_finished returns them."""
        if self._prefill is not None:
            return self._prefill.take_finished(finished_req_ids), set()
        assert self._decode is not None
        self._decode.await_started()  # where no forward pass was said to be launched
        finished: Finished = self._decode.take_finished(patient=self._is_idle, may_start_early=self._may_start_early)
        self._invalid_block_ids |= finished.invalid_block_ids
        if self._may_start_early:
            self._due += self._decode.take_due()
        return set(), finished.req_ids

    def take_due(self) -> list[str]:
        """Requests whose last byte is due, since the last call (head_start.py)."""
        due, self._due = self._due, []
        return due

    def take_invalid_blocks(self) -> set[int]:
        invalid, self._invalid_block_ids = self._invalid_block_ids, set()
        return invalid

    def take_counts(self) -> Counts:
        return self._agent.take_counts()

    def stop(self) -> None:
        if self._prefill or self._decode:
            self._agent.stop()
