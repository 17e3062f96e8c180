"""Both workers of a transfer, for tests between two processes: one here, the other in a contract.target.TargetProcess.

What a method takes and returns can be pickled. Transfer t is P's request p-t and D's request d-t.
"""

from __future__ import annotations

import logging
import multiprocessing
import time

import torch

from tests.connector.agents import BLOCK_SIZE, DIGEST, Decode, Memory, Prefill, start_decode, start_prefill
from twolane.connector.agent import logger
from twolane.connector.plan import Drop, Receive, StepPlan
from twolane.connector.settings import ConnectorSettings

CLOCK_HZ = 1.8e9  # of a GPU, about: for torch.cuda._sleep


def warm_up() -> None:
    """What takes seconds in a new process, while others do the same. A child says nothing of each transfer that fails:
    they are many, on purpose."""
    if multiprocessing.parent_process() is not None:
        logger.setLevel(logging.ERROR)
    if torch.cuda.is_available():
        torch.cuda.init()
        from twolane.connector.transport.cuda import ways  # noqa: F401


def flood_ids(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]


class PrefillPeer:
    """A P with KV in all of its blocks."""

    _prefill: Prefill

    def __init__(self) -> None:
        warm_up()

    def start(self, settings: ConnectorSettings, memory: Memory) -> str:
        self._memory = memory
        self._sent_bytes = 0
        self._prefill = start_prefill(settings, memory=memory)
        return self._prefill.address

    def offer(self, transfer_id: str) -> None:
        self._prefill.offer(transfer_id, f"p-{transfer_id}")

    def compute(self, block_ids: list[int], num_tokens: int, transfer_id: str, busy_s: float = 0.0) -> None:
        """`busy_s`: how long the GPU computes at it."""
        if busy_s and self._memory.device != "cpu":
            torch.cuda._sleep(int(busy_s * CLOCK_HZ))
        self._prefill.compute(block_ids, num_tokens, f"p-{transfer_id}")

    def flood(self, prefix: str, count: int) -> None:
        """Many transfers of all blocks, all computed."""
        for transfer_id in flood_ids(prefix, count):
            self.offer(transfer_id)
            self.compute(list(range(self._memory.num_blocks)), self._memory.num_blocks * BLOCK_SIZE, transfer_id)

    def finish(self, transfer_ids: list[str], timeout_s: float) -> float:
        """Ends the requests; seconds until all blocks are P's again."""
        started_s, waiting = time.monotonic(), {f"p-{one}" for one in transfer_ids}
        for transfer_id in transfer_ids:
            self._prefill.finish(f"p-{transfer_id}")
        while waiting:
            self._prefill.agent.check()
            waiting -= self._prefill.agent.take_finished(set(waiting))
            assert time.monotonic() - started_s < timeout_s, f"{len(waiting)} requests keep their blocks"
            time.sleep(0.002)
        return time.monotonic() - started_s

    def sent_bytes(self) -> int:
        """In all, as D was told."""
        more = self._prefill.agent.take_counts().get("kv_sent_bytes", 0)
        assert isinstance(more, int)
        self._sent_bytes += more
        return self._sent_bytes

    def free_slots(self) -> int:
        return self._prefill.free_slots

    def channels(self) -> list[str]:
        """By which transport each D is reached."""
        return [type(peer.channel).__name__ for peer in self._prefill.agent._side._peers._by_name.values()]

    def check(self) -> None:
        """Raises if the agent died or the GPU's context is lost."""
        self._prefill.agent.check()
        if self._memory.device != "cpu":
            torch.cuda.synchronize(self._memory.device)

    def end(self) -> None:
        self._prefill.agent.stop()
        del self._prefill


class DecodePeer:
    """A D with zeros in all of its blocks."""

    _decode: Decode

    def __init__(self) -> None:
        warm_up()

    def start(self, settings: ConnectorSettings, memory: Memory) -> None:
        self._memory = memory
        self._received_bytes = 0
        self._decode = start_decode(settings, memory=memory)
        self._reported: set[str] = set()
        self._invalid: set[int] = set()

    def receive(self, address: str, block_ids: list[int], num_tokens: int, transfer_id: str) -> None:
        self._receive([Receive(f"d-{transfer_id}", transfer_id, address, num_tokens, 0, block_ids, DIGEST)])

    def _receive(self, receives: list[Receive]) -> None:
        self._decode.agent.begin_step(StepPlan(receive=receives))

    def flood(self, address: str, prefix: str, count: int) -> None:
        """P's block i goes to block i from the end, in all of them: the later ones write what the first one wrote."""
        blocks = list(range(self._memory.num_blocks - 1, -1, -1))
        num_tokens = self._memory.num_blocks * BLOCK_SIZE
        self._receive(
            [Receive(f"d-{one}", one, address, num_tokens, 0, blocks, DIGEST) for one in flood_ids(prefix, count)]
        )

    def drop(self, address: str, transfer_id: str) -> None:
        self._decode.agent.begin_step(StepPlan(drop=[Drop(transfer_id, address, "the request ended")]))

    def poll(self) -> set[str]:
        """Requests that were reported so far."""
        self._decode.agent.check()
        finished = self._decode.agent.take_finished(patient=False)
        self._reported |= finished.req_ids
        self._invalid |= finished.invalid_block_ids
        return self._reported

    def wait_reported(self, transfer_ids: list[str], timeout_s: float) -> tuple[float, list[int]]:
        """(seconds, blocks of theirs that hold nothing)"""
        started_s, wanted = time.monotonic(), {f"d-{one}" for one in transfer_ids}
        while not wanted <= self.poll():
            assert time.monotonic() - started_s < timeout_s, f"{len(wanted - self._reported)} requests wait in vain"
            time.sleep(0.002)
        invalid, self._invalid = sorted(self._invalid), set()
        self._reported -= wanted
        return time.monotonic() - started_s, invalid

    def received_bytes(self) -> int:
        more = self._decode.agent.take_counts().get("kv_received_bytes", 0)
        assert isinstance(more, int)
        self._received_bytes += more
        return self._received_bytes

    def wait_received(self, num_bytes: int, timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.received_bytes() < num_bytes:
            self._decode.agent.check()
            assert time.monotonic() < deadline_s, f"{self._received_bytes} of {num_bytes} bytes came"
            time.sleep(0.001)

    def zero(self) -> None:
        """These blocks are somebody else's now."""
        for tensor in self._decode.kv.values():
            tensor.zero_()
        self.check()

    def written(self) -> list[int]:
        """Blocks that aren't zero."""
        found: set[int] = set()
        for tensor in self._decode.kv.values():
            found.update(tensor.flatten(1).any(1).nonzero().flatten().tolist())
        return sorted(found)

    def wrong(self, pairs: list[tuple[int, int]]) -> list[int]:
        """Of (P's block, D's block) those of D that aren't what P has."""
        sources = [source for source, _ in pairs]
        targets = [target for _, target in pairs]
        found: set[int] = set()
        for name, tensor in self._memory.make(fill=True).items():
            differs = (self._decode.kv[name][targets] != tensor[sources]).flatten(1).any(1)
            found.update(target for target, is_wrong in zip(targets, differs.tolist(), strict=True) if is_wrong)
        return sorted(found)

    def check(self) -> None:
        """Raises if the agent died or the GPU's context is lost."""
        self._decode.agent.check()
        if self._memory.device != "cpu":
            torch.cuda.synchronize(self._memory.device)

    def end(self) -> None:
        self._decode.agent.stop()
        del self._decode
