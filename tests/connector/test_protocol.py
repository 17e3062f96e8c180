"""What old proxies say, and addresses."""

from __future__ import annotations

import pytest

from twolane.addresses import rank_address, split_address
from twolane.protocol import HandoffParams, params_from_request_id

UUID = "0123456789abcdef0123456789abcdef"
HEADER = f"___prefill_addr_127.0.0.1:21001___decode_addr_127.0.0.1:22001_{UUID}"


@pytest.mark.parametrize("request_id", [HEADER, f"cmpl-{HEADER}-0", f"chatcmpl-{HEADER}-0-1a2b3c4d"])
def test_a_p2p_nccl_request_id_names_the_other_side(request_id: str) -> None:
    """Whatever vLLM puts around it, also the random suffix that made the old connector hang."""
    assert params_from_request_id(request_id, "P") == HandoffParams(UUID, "127.0.0.1:22001", do_remote_decode=True)
    assert params_from_request_id(request_id, "D") == HandoffParams(UUID, "127.0.0.1:21001", do_remote_prefill=True)


@pytest.mark.parametrize("request_id", ["", "cmpl-1234-0", "___prefill_addr_127.0.0.1:21001___decode_addr_x"])
def test_any_other_request_id_says_nothing(request_id: str) -> None:
    assert params_from_request_id(request_id, "D") is None


@pytest.mark.parametrize(
    ("address", "rank", "expected"),
    [("127.0.0.1:21001", 3, "127.0.0.1:21004"), ("[::1]:21001", 1, "[::1]:21002"), ("host-a:5", 0, "host-a:5")],
)
def test_each_rank_has_its_port(address: str, rank: int, expected: str) -> None:
    assert rank_address(address, rank) == expected


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:0", "host:65536"])
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(ValueError, match="not a host:port address"):
        split_address(address)
