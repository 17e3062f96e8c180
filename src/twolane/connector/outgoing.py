"""P's side of one transfer, apart from sockets, threads and tensors: who owns the blocks, and until when.

    offered    the request (queued or computing)       until it ends
    held       the transfer (request done, not all sent)  until the last byte is read, CANCEL, D's death or the lease
    over       nobody: it has ended and no push is in flight; reported to vLLM's scheduler, which frees the blocks

Time comes in as an argument (monotonic seconds), decisions go out as values. Not thread-safe: the side that owns it is
guarded by its agent's lock. docs/ARCHITECTURE.md draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from twolane.connector.messages import Announce
from twolane.connector.parts import Cursor, Part
from twolane.connector.transport.base import Extent, Fence, Items
from twolane.errors import TransferError


@dataclass(frozen=True)
class Computing:
    """A forward pass by its number, and how many tokens of a prompt are valid before and after it."""

    number: int
    num_before: int
    num_after: int


@dataclass
class Outgoing:
    """P's side of a transfer."""

    req_id: str
    transfer_id: str
    digest: bytes
    block_size: int
    num_layers: int
    story: bool = False  # see protocol.HandoffParams
    block_ids: list[int] = field(default_factory=list)
    num_valid_tokens: int = 0
    computing: Computing | None = None  # the latest pass for it
    told_soon_s: float = 0.0  # when D was told that it ends
    computed_at_s: float = 0.0  # when the last forward pass for it was launched to its end
    fence: Fence = field(default_factory=Fence)  # behind which the last of them are
    announce: Announce | None = None
    peer: bytes | None = None  # whose announce it is
    cursor: Cursor = field(init=False)  # up to where pushes were begun
    open_fence: Fence | None = None  # behind which the cursor's open blocks are
    in_flight: int = 0  # pushes begun and not done: they read the blocks
    turn: int = 0  # when it last began a push; who waited longest goes first
    done_at_s: float | None = None  # the request ended and its prompt was computed
    ended: str | None = None  # why nothing more will be sent; "" for success

    def __post_init__(self) -> None:
        self.cursor = Cursor(self.num_layers)

    # -- events

    def advance(self, block_ids: list[int], fence: Fence, *, replace: bool, num_valid_tokens: int) -> None:
        """A chunk was launched; behind the fence the first `num_valid_tokens` tokens have their KV."""
        self.block_ids = list(block_ids) if replace else self.block_ids + block_ids
        self.num_valid_tokens = num_valid_tokens
        self.fence = fence
        if replace:
            self.open_fence = None

    def retract(self) -> None:
        """The request was preempted: its blocks belong to others now. What was sent stays sent; what is in flight is
        read before others write (SendTransports.quiesce)."""
        self.block_ids = []
        self.num_valid_tokens = 0
        self.open_fence = None

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

    def begun(self, part: Part) -> None:
        """It is being read from P's blocks."""
        fence = self.push_fence
        self.cursor.pass_by(part)
        self.open_fence = fence if self.cursor.layer else None
        self.in_flight += 1

    def done(self) -> None:
        """A push was read to its end, or failed."""
        self.in_flight -= 1
        if self.announce is not None and self.in_flight == 0 and self.cursor.block == self.num_blocks:
            self.end("")

    def end(self, reason: str) -> None:
        if self.ended is None:
            self.ended = reason

    # -- decisions

    def next_size(self) -> tuple[int, int]:
        """Of how many blocks from the cursor on, and from which layer, the next part can be sent now: of those that are
        final. A block is final when all slots D needs are valid."""
        if self.ended is not None or self.announce is None:
            return 0, 0
        num_final, open_ = self._num_final(self.num_valid_tokens) - self.cursor.block, self.cursor.num_open
        if num_final < open_:
            return 0, 0
        return open_ or num_final, self.cursor.layer

    @property
    def is_ready(self) -> bool:
        """Whether something can be sent now."""
        return self.next_size()[0] > 0

    def _num_final(self, num_valid_tokens: int) -> int:
        """How many of the announced blocks, from the first, hold all that D needs of them, with so many valid
        tokens."""
        assert self.announce is not None
        if num_valid_tokens >= self.announce.num_tokens:
            return self.num_blocks
        return max(0, num_valid_tokens // self.block_size - self.announce.first_block)

    @property
    def push_fence(self) -> Fence:
        """Behind which the next part is."""
        return self.open_fence or self.fence

    def next_part(self, extent: Extent) -> Part:
        """That much from the cursor on."""
        return Part(self.cursor.block, *extent)

    def is_last(self, part: Part) -> bool:
        """Nothing is left to be sent behind it."""
        return part.first_block + part.num_blocks == self.num_blocks and part.layers.stop == self.num_layers

    def sources(self, part: Part) -> Items:
        """In P's blocks."""
        assert self.announce is not None
        return part.of(self.block_ids[self.announce.first_block :])

    def targets(self, part: Part) -> Items:
        """In D's blocks."""
        assert self.announce is not None
        return part.of(self.announce.block_ids)

    def ends_with(self, number: int) -> bool:
        """Whether that forward pass computes the last of what D needs, and a push of all else was begun."""
        one = self.computing
        if self.announce is None or self.ended is not None or one is None or one.number != number:
            return False
        return one.num_after >= self.announce.num_tokens and self.cursor.block >= self._num_final(one.num_before)

    def lease_over(self, now_s: float, last_word_s: float, lease_s: float) -> bool:
        """Whether blocks were held for `lease_s` since the request ended and since D's last word."""
        if self.done_at_s is None or self.ended is not None:
            return False
        return now_s - max(self.done_at_s, last_word_s) > lease_s

    @property
    def is_over(self) -> bool:
        """Nobody reads its blocks any more, and nobody will."""
        return self.ended is not None and self.in_flight == 0

    @property
    def num_blocks(self) -> int:
        return len(self.announce.block_ids) if self.announce is not None else 0

    @property
    def num_tokens(self) -> int:
        """Tokens that this transfer moves in all."""
        if self.announce is None:
            return 0
        return self.announce.num_tokens - self.announce.first_block * self.block_size
