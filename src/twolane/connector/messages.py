"""What P's and D's workers of the same rank say to each other, typed: one msgpack frame each on a ZMQ socket."""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL_VERSION = 6


class KVFormat(msgspec.Struct, frozen=True):
    """What both sides must agree on, to the letter, before a byte moves. Compared field by field at the handshake."""

    protocol: int
    model: str
    kv_dtype: str
    block_size: int  # slots a block
    tp_size: int
    regions: list[tuple[int, int]]  # per layer, in layer order: (pieces a block, bytes a piece)

    def in_words(self) -> dict[str, str]:
        layers = ", ".join(f"{self.regions.count(r)} layers of {r[0]} x {r[1]} B" for r in dict.fromkeys(self.regions))
        return {
            "connector's protocol": str(self.protocol),
            "model": self.model,
            "dtype (KV/model)": self.kv_dtype,
            "block size": str(self.block_size),
            "tensor parallelism": str(self.tp_size),
            "KV layout of a block": layers,
        }

    def difference_from(self, prefill: KVFormat) -> str:
        """What differs between D's format (self) and P's, in words, with the remedy; empty if nothing does."""
        if self == prefill:
            return ""
        mine, theirs = self.in_words(), prefill.in_words()
        differing = [
            f"{name}: prefill {theirs[name]}, decode {mine[name]}" for name in mine if mine[name] != theirs[name]
        ]
        what = "; ".join(differing) or "the order of the layers"
        return f"the KV caches don't match ({what}). Start both with the same model and settings."


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`number` counts what one side says on a connection: what comes late or twice is as good as lost. 0: always
    heard."""

    number: int = 0


# --- control messages, D's worker to P's worker (same rank) -----------------------------------------------------------


class Identity(msgspec.Struct, frozen=True):
    """A worker: which process, on which host, in which life."""

    epoch: str  # new at every start
    pid: int
    host: str  # machine identity, so that the other side knows whether the pid means anything to it


class TransportOffer(msgspec.Struct, frozen=True):
    """A transport by name, with what the other side needs to use it."""

    name: str
    data: dict[str, Any] = {}


class Hello(Message, frozen=True, tag="hello"):
    """First message on a connection: what D is and what it can receive with, best first. P answers Welcome or
    Mismatch."""

    me: Identity
    format: KVFormat
    transports: list[TransportOffer]


class GateWord(msgspec.Struct, frozen=True, array_like=True):
    """Word `index` of D's gates (transport `cuda_ipc`); P sets it to `value` once the last byte is in D's blocks."""

    index: int
    value: int


class Announce(Message, frozen=True, tag="announce"):
    """D has blocks waiting. P writes blocks `first_block ...` of the prompt into `block_ids` in that order.

    `num_tokens`: how many tokens of the prompt D needs in all (it computes the rest itself).
    `digest`: of the prompt's token ids; P refuses if its own differs, since a wrong token is worse than a slow one.
    `gate`: on which D's GPU may wait for the last byte; nothing to a P whose transport has none.
    """

    transfer_id: str
    num_tokens: int
    first_block: int
    block_ids: list[int]
    digest: bytes
    gate: GateWord | None = None


class Credit(Message, frozen=True, tag="credit"):
    """D is done with a slot: exactly one for every Push, also for one that D threw away."""

    slot: int


class Cancel(Message, frozen=True, tag="cancel"):
    """D doesn't want this transfer (any more). P frees its blocks and answers Abort once it writes no more."""

    transfer_id: str
    reason: str


class Ping(Message, frozen=True, tag="ping"):
    """D asks for a word. `waiting`: transfers of which D has heard nothing for a while; P answers Abort for those that
    it isn't going to send, so that a lost message is found out within a ping. Then Pong."""

    waiting: list[str] = []


# --- control messages, P's worker to D's worker -----------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """The handshake is good; this transport it shall be."""

    me: Identity
    transport: TransportOffer


class Mismatch(Message, frozen=True, tag="mismatch"):
    """The handshake is over, but no KV can move. The connection stays, so that D's Cancels free P's blocks at once."""

    me: Identity
    reason: str


class Refused(Message, frozen=True, tag="refused"):
    """P doesn't understand, or doesn't know who is speaking. D begins anew."""

    reason: str


class Push(Message, frozen=True, tag="push"):
    """`num_layers` layers from `first_layer` on, of `num_blocks` blocks from the `first_block`th announced on, lie in
    `slot` (block by block, layers inside a block), or in D's blocks if there is none.

    Blocks go in announced order, and all layers of some before the first layer of the next.
    `computed_at_s`: P's CLOCK_MONOTONIC when it last computed something of the prompt; in the last push its last layer.
    That clock is the host's: D may compare it with its own where P's host is its own host, and nowhere else.
    """

    transfer_id: str
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int
    slot: int | None
    computed_at_s: float = 0.0


class Soon(Message, frozen=True, tag="soon"):
    """P computes the end of the prompt now, and expects to be through at `at_s` on its CLOCK_MONOTONIC. A forecast: D
    may use it where P's host is its own, and nothing may depend on it."""

    transfer_id: str
    at_s: float


class Abort(Message, frozen=True, tag="abort"):
    """P writes nothing more for this transfer, and nothing is on its way. D recomputes what has not landed.

    Also the answer to every Cancel: only now may D's blocks go to others.
    """

    transfer_id: str
    reason: str


class Pong(Message, frozen=True, tag="pong"):
    pass


ToPrefill = Hello | Announce | Credit | Cancel | Ping
ToDecode = Welcome | Mismatch | Refused | Push | Soon | Abort | Pong

decode_to_prefill = msgspec.msgpack.Decoder(ToPrefill).decode
decode_to_decode = msgspec.msgpack.Decoder(ToDecode).decode
