"""What crosses process borders, typed: registration, handoff parameters, and the control messages between workers.

Everything on a ZMQ socket is one msgpack frame. The registration map is a superset of the one that vLLM's
P2pNcclConnector (0.9.2 to 0.23.0) sent, so that its instances work with our proxy and ours with other routers.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

Role = Literal["P", "D"]
LANES: dict[Role, Literal["prefill", "decode"]] = {"P": "prefill", "D": "decode"}  # as people and metrics call them
Kind = Literal["twolane", "nixl", "p2pnccl"]
Transport = Literal["auto", "cuda_ipc", "shm", "nccl", "tcp"]  # auto: the first of the others that a pair can use

PROTOCOL_VERSION = 6
REGISTER_EVERY_S = 3.0
LOAD_VALID_S = 2.5 * REGISTER_EVERY_S  # an instance's own word about its load


class Load(msgspec.Struct, frozen=True):
    """What an instance has to do and what room it has, after its engine's last step."""

    free_blocks: int
    num_blocks: int  # KV blocks in all
    block_size: int  # slots a block
    num_running: int  # requests that have their blocks; on D also those whose KV has not landed yet
    num_waiting: int  # requests that have none, for want of blocks or because it isn't their turn


class Registration(msgspec.Struct, frozen=True, omit_defaults=True):
    """An instance says that it is there: every 3 s (sooner when its load changed much), from a DEALER whose identity is
    its `zmq_address`; no reply.

    `type`, `http_address` and `zmq_address` are all that a P2pNcclConnector instance sends; unknown keys are ignored.
    """

    type: Role
    http_address: str  # host:port of the OpenAI server
    zmq_address: str  # host:port; for kind twolane the control address of rank 0, rank r listens on port + r
    kind: Kind = "p2pnccl"
    epoch: str = ""  # new at every start of the instance
    leaving: bool = False  # last words at a clean stop
    problem: str = ""  # why KV can't move here, in words; empty: no trouble known
    load: Load | None = None  # None: not known
    name: str = ""  # what people call it, such as decode-2; empty: it has none
    gpus: list[str] = []  # UUIDs, one a tensor-parallel rank; empty: none, or not known


class HandoffParams(msgspec.Struct, frozen=True):
    """`kv_transfer_params` of a request body, as the proxy writes it and the connector reads it.

    P gets `do_remote_decode`, D gets `do_remote_prefill` (vLLM looks at these two names itself, for its metrics);
    `remote_address` is the other side's control address. `story`: where this instance registers somebody wants to hear
    what happens to the transfer, and when. Unknown keys are ignored.
    """

    transfer_id: str
    remote_address: str
    do_remote_prefill: bool = False
    do_remote_decode: bool = False
    story: bool = False


MAX_STORY_EVENTS = 256  # a message
MAX_STORY_ID_LENGTH = 128  # what has a longer transfer_id has no story: a message must stay small


class StoryEvent(msgspec.Struct, frozen=True, array_like=True):
    """`event`: see connector.story.Event. `at_s`: CLOCK_MONOTONIC of the machine that `Story.clock` names."""

    transfer_id: str
    event: str
    at_s: float


class Story(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type", tag="story"):
    """What an instance did for transfers whose HandoffParams asked for a story: from rank 0, on the socket that its
    registrations go through; no reply. Never sent to a proxy that didn't ask, since other routers know registrations
    alone."""

    role: Role
    http_address: str  # as in its registration
    clock: str  # see `clock_identity`
    events: Annotated[list[StoryEvent], msgspec.Meta(max_length=MAX_STORY_EVENTS)]
    num_dropped: Annotated[int, msgspec.Meta(ge=0)] = 0  # events before these that nobody will hear of


def clock_identity() -> str:
    """The same for two processes only if CLOCK_MONOTONIC says the same to both."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/time').readlink()}"


# How the proxies of P2pNcclConnector (vLLM 0.9.2 to 0.23.0) tell both sides about each other: in X-Request-Id,
# a header that vLLM makes part of the engine's request id, with something before it and behind it.
P2P_MARK = "___prefill_addr_"
_P2P_REQUEST_ID = re.compile(P2P_MARK + r"(?P<P>[^_]+)___decode_addr_(?P<D>[^_]+)_(?P<id>[0-9a-f]{32})")


def params_from_request_id(request_id: str, role: Role) -> HandoffParams | None:
    """What a P2pNcclConnector proxy says in a request id, to the instance of this role; None if it says nothing."""
    match = _P2P_REQUEST_ID.search(request_id)
    if match is None:
        return None
    return HandoffParams(
        transfer_id=match["id"],
        remote_address=match["D" if role == "P" else "P"],
        do_remote_prefill=role == "D",
        do_remote_decode=role == "P",
    )


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

encode = msgspec.msgpack.Encoder().encode
encode_json = msgspec.json.Encoder().encode
decode_to_prefill = msgspec.msgpack.Decoder(ToPrefill).decode
decode_to_decode = msgspec.msgpack.Decoder(ToDecode).decode
decode_registration = msgspec.msgpack.Decoder(Registration).decode
_decode_story = msgspec.msgpack.Decoder(Story).decode


class _Heading(msgspec.Struct):
    type: str


_decode_heading = msgspec.msgpack.Decoder(_Heading).decode


def decode_from_instance(frame: bytes) -> Registration | Story:
    """What comes in on the discovery socket. Raises msgspec.MsgspecError."""
    return _decode_story(frame) if _decode_heading(frame).type == "story" else decode_registration(frame)


def split_address(address: str) -> tuple[str, int]:
    """`host:port` -> (host, port). IPv6 hosts come in brackets. Raises ValueError, which names the address."""
    host, sep, port = address.rpartition(":")
    if not sep or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"not a host:port address: {address!r}")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def rank_address(address: str, rank: int) -> str:
    """The control address of worker `rank`, from that of rank 0."""
    host, port = split_address(address)
    return join_address(host, port + rank)
