"""The state machines of one transfer, both sides, apart from sockets, threads and tensors.

Time comes in as an argument (monotonic seconds), decisions go out as values. Neither class is thread-safe: the agent
that owns it holds its lock.

P, `Outgoing`: who owns the blocks and until when
    OFFERED    the request (queued or computing)       until it ends
    HELD       the transfer (request done, not all sent)  until the last byte is read, CANCEL, D's death or the lease
    RETIRED    nobody; reported to vLLM's scheduler, which frees them
D, `Incoming`: the request owns its blocks throughout; the transfer alone may write to them
    WAITING    until the last block landed, ABORT, P's death, a deadline, or the request's end
    LANDED / FAILED   no write can land any more; reported to vLLM's scheduler
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from twolane.errors import TransferError
from twolane.protocol import Announce


@dataclass(frozen=True)
class ItemRange:
    """Items [first, first + count) of a transfer; see protocol.Push."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


@dataclass
class Outgoing:
    """P's side of a transfer."""

    req_id: str
    transfer_id: str
    digest: bytes
    block_size: int
    items_per_block: int
    block_ids: list[int] = field(default_factory=list)
    num_valid_tokens: int = 0
    computed_at_s: float = 0.0  # the end of the last forward pass that computed some of the prompt
    announce: Announce | None = None
    peer: bytes | None = None  # whose announce it is
    next_item: int = 0
    done_at_s: float | None = None  # the request ended and its prompt was computed
    ended: str | None = None  # why nothing more will be sent; "" for success

    # -- events

    def advance(self, block_ids: list[int], *, replace: bool, num_valid_tokens: int) -> None:
        self.block_ids = list(block_ids) if replace else self.block_ids + block_ids
        self.num_valid_tokens = num_valid_tokens

    def retract(self) -> None:
        """The request was preempted: its blocks belong to others now. What was sent stays sent."""
        self.block_ids = []
        self.num_valid_tokens = 0

    def accept(self, announce: Announce, peer: bytes) -> None:
        """D asks for its blocks. Raises TransferError where the two sides don't speak of the same prompt."""
        if self.announce is not None:
            raise TransferError("announced twice")
        num_blocks = -(-announce.num_tokens // self.block_size) - announce.first_block
        if announce.first_block < 0 or len(announce.block_ids) != max(0, num_blocks):
            raise TransferError(f"{len(announce.block_ids)} blocks announced where {num_blocks} are needed")
        if announce.digest != self.digest:
            raise TransferError("the two sides see different prompts (tokenizer, template or adapter differ)")
        self.announce, self.peer = announce, peer
        if not announce.block_ids:
            self.end("")

    def computed(self, now_s: float) -> None:
        """The request ended on P with its whole prompt computed: the lease begins."""
        self.done_at_s = now_s

    def end(self, reason: str) -> None:
        if self.ended is None:
            self.ended = reason

    # -- decisions

    def next_push(self, max_items: int) -> ItemRange | None:
        """What can be sent now: items whose blocks are final. A block is final when all slots D needs are valid."""
        if self.ended is not None or self.announce is None:
            return None
        count = min(self._final_blocks() * self.items_per_block - self.next_item, max_items)
        return ItemRange(self.next_item, count) if count > 0 else None

    def _final_blocks(self) -> int:
        """How many of the announced blocks, from the first, hold all that D needs of them."""
        assert self.announce is not None
        if self.num_valid_tokens >= self.announce.num_tokens:
            return len(self.announce.block_ids)
        return max(0, self.num_valid_tokens // self.block_size - self.announce.first_block)

    def source_blocks(self, push: ItemRange) -> list[tuple[int, int]]:
        """P's (block id, layer) of each item."""
        assert self.announce is not None
        return _items(self.block_ids[self.announce.first_block :], push, self.items_per_block)

    def sent(self, push: ItemRange) -> None:
        """The items were read from P's blocks."""
        assert self.announce is not None
        self.next_item = push.end
        if self.next_item == len(self.announce.block_ids) * self.items_per_block:
            self.end("")

    def lease_over(self, now_s: float, last_word_s: float, lease_s: float) -> bool:
        """Whether blocks were held for `lease_s` since the request ended and since D's last word."""
        if self.done_at_s is None or self.ended is not None:
            return False
        return now_s - max(self.done_at_s, last_word_s) > lease_s

    @property
    def num_tokens(self) -> int:
        """Tokens that this transfer moves in all."""
        if self.announce is None:
            return 0
        return self.announce.num_tokens - self.announce.first_block * self.block_size


class IncomingState(enum.Enum):
    WAITING = "waiting"
    LANDED = "landed"
    FAILED = "failed"


@dataclass
class Incoming:
    """D's side of a transfer."""

    req_id: str
    transfer_id: str
    num_tokens: int
    first_block: int
    block_ids: list[int]
    items_per_block: int
    block_size: int
    announced_at_s: float
    progress_at_s: float
    next_item: int = 0
    state: IncomingState = IncomingState.WAITING
    reason: str = ""

    @property
    def num_items(self) -> int:
        return len(self.block_ids) * self.items_per_block

    def target_blocks(self, push: ItemRange) -> list[tuple[int, int]]:
        """D's (block id, layer) of each item. Raises TransferError on a gap, a repetition or an overrun."""
        if push.first != self.next_item or push.count < 1 or push.end > self.num_items:
            raise TransferError(
                f"items {push.first}+{push.count} came where {self.next_item} of {self.num_items} were due"
            )
        return _items(self.block_ids, push, self.items_per_block)

    def landed(self, push: ItemRange, now_s: float) -> None:
        """The items are in D's blocks."""
        self.next_item = push.end
        self.progress_at_s = now_s
        if self.next_item == self.num_items:
            self.state = IncomingState.LANDED

    def fail(self, reason: str) -> None:
        if self.state is IncomingState.WAITING:
            self.state, self.reason = IncomingState.FAILED, reason

    def overdue(self, now_s: float, transfer_timeout_s: float) -> bool:
        return self.state is IncomingState.WAITING and now_s - self.progress_at_s > transfer_timeout_s

    def invalid_blocks(self) -> list[int]:
        """Blocks of which not every byte landed: D must compute these itself."""
        return self.block_ids[self.next_item // self.items_per_block :]

    @property
    def landed_tokens(self) -> int:
        """Tokens whose KV landed, of those that were asked for."""
        if self.state is IncomingState.LANDED:
            return self.num_tokens - self.first_block * self.block_size
        return self.next_item // self.items_per_block * self.block_size


def _items(block_ids: list[int], push: ItemRange, items_per_block: int) -> list[tuple[int, int]]:
    return [(block_ids[item // items_per_block], item % items_per_block) for item in range(push.first, push.end)]
