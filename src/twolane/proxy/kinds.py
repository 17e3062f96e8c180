"""The three kinds of instance: what each kind's legs say, and in which order they are sent. Pure.

A P and a D of different kinds are never paired.
"""

from __future__ import annotations

import os
import uuid
from typing import ClassVar, Protocol

import msgspec

from twolane.errors import UpstreamError
from twolane.protocol import HandoffParams, Kind
from twolane.proxy.body import SplitBody
from twolane.proxy.pool import Instance


class Handover(Protocol):
    """The rules of one kind. `transfer_id` names the attempt in our log and, in some form, in both legs."""

    prefill_first: ClassVar[bool]  # D's leg needs P's whole answer
    decodes_alone: ClassVar[bool]  # D can compute a prompt itself
    reads_prefill: ClassVar[bool]  # P's answer holds something for D

    def transfer_id(self, prefill: Instance, decode: Instance) -> str: ...

    def request_id(self, transfer_id: str, request_id: str) -> str:
        """`X-Request-Id` of both legs; `request_id` is the client's."""

    def for_prefill(self, body: SplitBody, transfer_id: str, prefill: Instance, decode: Instance) -> bytes: ...

    def for_decode(
        self, body: SplitBody, transfer_id: str, prefill: Instance, decode: Instance, answer: bytes
    ) -> bytes:
        """`answer` is P's, if `reads_prefill`. Raises UpstreamError if it makes no sense."""


class TwoLane:
    """Both legs at once, each with the transfer's id and the other side's control address."""

    prefill_first: ClassVar[bool] = False
    decodes_alone: ClassVar[bool] = True
    reads_prefill: ClassVar[bool] = False

    def transfer_id(self, _prefill: Instance, _decode: Instance) -> str:
        return os.urandom(16).hex()

    def request_id(self, _transfer_id: str, request_id: str) -> str:
        return request_id

    def for_prefill(self, body: SplitBody, transfer_id: str, prefill: Instance, decode: Instance) -> bytes:
        story = _tells_us(prefill)
        params = HandoffParams(transfer_id, decode.control_address, do_remote_decode=True, story=story)
        return body.for_prefill(params)

    def for_decode(
        self, body: SplitBody, transfer_id: str, prefill: Instance, decode: Instance, _answer: bytes
    ) -> bytes:
        story = _tells_us(decode)
        params = HandoffParams(transfer_id, prefill.control_address, do_remote_prefill=True, story=story)
        return body.for_decode(params)


def _tells_us(instance: Instance) -> bool:
    """It registers here, so here its stories come. One that a flag named may register at a proxy that would choke."""
    return bool(instance.epoch)


class _NixlAnswer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")


class Nixl:
    """vLLM's NixlConnector: P answers where its blocks are, and D is told so, unchanged."""

    prefill_first: ClassVar[bool] = True
    decodes_alone: ClassVar[bool] = True
    reads_prefill: ClassVar[bool] = True

    _PARAMS = msgspec.Raw(
        b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
        b'"remote_host":null,"remote_port":null}'
    )

    def transfer_id(self, _prefill: Instance, _decode: Instance) -> str:
        return os.urandom(16).hex()

    def request_id(self, _transfer_id: str, request_id: str) -> str:
        return request_id

    def for_prefill(self, body: SplitBody, _transfer_id: str, _prefill: Instance, _decode: Instance) -> bytes:
        # The connector keeps P's blocks only if the request ended by its length, so its one token mustn't be an end.
        return body.for_prefill(self._PARAMS, ignore_eos=True)

    def for_decode(
        self, body: SplitBody, _transfer_id: str, prefill: Instance, _decode: Instance, answer: bytes
    ) -> bytes:
        try:
            params = msgspec.json.decode(answer, type=_NixlAnswer).kv_transfer_params
        except msgspec.MsgspecError as error:
            raise UpstreamError(f"prefill instance {prefill.address} answered with no JSON object: {error}") from error
        if bytes(params) == b"null":  # P kept nothing, as for a prompt shorter than a block
            return body.for_decode_alone()
        return body.for_decode(params)


class P2pNccl:
    """vLLM's P2pNcclConnector, 0.9.2 to 0.23.0: both addresses are read out of the request id.

    An instance raises on a request id without them, and D waits for ever for KV that nobody sends. So D is never
    asked alone, and a body that can't be split goes to P with all its prompts and choices.
    """

    prefill_first: ClassVar[bool] = True
    decodes_alone: ClassVar[bool] = False
    reads_prefill: ClassVar[bool] = False

    def transfer_id(self, prefill: Instance, decode: Instance) -> str:
        addresses = f"___prefill_addr_{prefill.control_address}___decode_addr_{decode.control_address}"
        return f"{addresses}_{uuid.uuid4().hex}"

    def request_id(self, transfer_id: str, _request_id: str) -> str:
        return transfer_id

    def for_prefill(self, body: SplitBody, _transfer_id: str, _prefill: Instance, _decode: Instance) -> bytes:
        return body.for_prefill_of_all() if body.whole_because else body.for_prefill()

    def for_decode(
        self, body: SplitBody, _transfer_id: str, _prefill: Instance, _decode: Instance, _answer: bytes
    ) -> bytes:
        return body.for_decode_alone()


HANDOVERS: dict[Kind, Handover] = {"twolane": TwoLane(), "nixl": Nixl(), "p2pnccl": P2pNccl()}
