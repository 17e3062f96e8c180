"""What crosses between the proxy and the instances, typed: registrations, stories and handoff parameters.

On ZMQ sockets each is one msgpack frame; connector/messages.py has what the workers say to each other. The registration
map is a superset of the one that vLLM's P2pNcclConnector (0.9.2 to 0.23.0) sent, so that its instances work with our
proxy and ours with other routers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

Role = Literal["P", "D"]
LANES: dict[Role, Literal["prefill", "decode"]] = {"P": "prefill", "D": "decode"}  # as people and metrics call them
Kind = Literal["twolane", "nixl", "p2pnccl"]
Transport = Literal["auto", "cuda_ipc", "shm", "nccl", "tcp"]  # auto: the first of the others that a pair can use

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


encode = msgspec.msgpack.Encoder().encode
encode_json = msgspec.json.Encoder().encode
decode_registration = msgspec.msgpack.Decoder(Registration).decode
_decode_story = msgspec.msgpack.Decoder(Story).decode


class _Heading(msgspec.Struct):
    type: str


_decode_heading = msgspec.msgpack.Decoder(_Heading).decode


def decode_from_instance(frame: bytes) -> Registration | Story:
    """What comes in on the discovery socket. Raises msgspec.MsgspecError."""
    return _decode_story(frame) if _decode_heading(frame).type == "story" else decode_registration(frame)
