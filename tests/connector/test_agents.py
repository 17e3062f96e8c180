"""Both agents over real sockets and shared memory: who ends up with which bytes, and who frees what, row by row."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import zmq

from tests.connector import agents
from tests.connector.agents import SETTINGS, Decode, Prefill, start_decode, start_prefill
from tests.ports import free_port
from twolane.addresses import split_address
from twolane.connector.messages import Cancel, Credit, Pong
from twolane.connector.plan import Drop, StepPlan
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transport import shm
from twolane.protocol import encode


def assert_equal_blocks(prefill: Prefill, decode: Decode, pairs: list[tuple[int, int]]) -> None:
    for name, tensor in decode.kv.items():
        for source, target in pairs:
            assert torch.equal(tensor[target], prefill.kv[name][source])


def test_chunks_land_while_the_prompt_is_still_computed(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    decode.receive(prefill.address, [20, 21, 22], num_tokens=10)
    prefill.compute([3, 4], num_tokens=5)
    agents.wait_for(lambda: bool(decode.kv["layer.2"][20].any()))
    assert not decode.agent.take_finished(patient=False).req_ids
    prefill.compute([3, 4, 5], num_tokens=11)
    assert decode.wait_finished() == set()
    assert_equal_blocks(prefill, decode, [(3, 20), (4, 21), (5, 22)])
    prefill.finish()
    prefill.wait_freed()
    agents.wait_for(lambda: prefill.free_slots == SETTINGS.num_slots)
    assert prefill.agent.take_counts()["kv_sent_tokens"] == 10
    assert decode.agent.take_counts()["kv_received_tokens"] == 10


def test_an_announce_may_come_before_the_request_or_after_its_end(prefill: Prefill, decode: Decode) -> None:
    decode.receive(prefill.address, [20], num_tokens=4, transfer_id="early")
    time.sleep(0.1)  # so that the announce is there first
    prefill.offer("early", "p1")
    prefill.compute([3], 5, "p1")
    assert decode.wait_finished() == set()
    prefill.offer("late", "p2")
    prefill.compute([6], 5, "p2")
    prefill.finish("p2")
    assert prefill.agent.take_finished({"p2"}) == set(), "blocks are kept for D"
    decode.receive(prefill.address, [25], num_tokens=4, transfer_id="late")
    assert decode.wait_finished() == set()
    assert_equal_blocks(prefill, decode, [(3, 20), (6, 25)])
    prefill.wait_freed("p2")


def test_a_long_prompt_goes_through_few_slots(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    decode.receive(prefill.address, list(range(31, -1, -1)), num_tokens=128)
    prefill.compute(list(range(32)), 129)
    assert decode.wait_finished() == set()
    assert_equal_blocks(prefill, decode, [(i, 31 - i) for i in range(32)])


def test_blocks_in_ds_prefix_cache_are_not_touched(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    prefill.compute([3, 4, 5], 11)
    decode.receive(prefill.address, [22], num_tokens=10, first_block=2)
    assert decode.wait_finished() == set()
    assert_equal_blocks(prefill, decode, [(5, 22)])
    assert decode.agent.take_counts()["kv_received_tokens"] == 2


def test_d_drops_a_transfer_and_nothing_lands_afterwards(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    decode.receive(prefill.address, [20, 21, 22], num_tokens=10)
    prefill.compute([3], 4)
    agents.wait_for(lambda: bool(decode.kv["layer.2"][20].any()))
    decode.agent.begin_step(StepPlan(drop=[Drop("t", prefill.address, "the request ended")]))
    decode.wait_finished()
    for tensor in decode.kv.values():
        tensor.zero_()  # the blocks are somebody else's now
    prefill.compute([3, 4, 5], 11)
    prefill.finish()
    prefill.wait_freed()
    agents.wait_for(lambda: prefill.free_slots == SETTINGS.num_slots)
    assert not any(tensor.any() for tensor in decode.kv.values())


def test_d_drops_before_it_had_blocks_and_p_frees_at_once(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    prefill.compute([3], 4)
    prefill.finish()
    decode.agent.begin_step(StepPlan(drop=[Drop("t", prefill.address, "the request ended")]))
    prefill.wait_freed(timeout_s=0.8)  # before the lease runs out


def test_ps_request_ends_early_and_d_computes_what_is_missing(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    decode.receive(prefill.address, [20, 21, 22], num_tokens=10)
    prefill.compute([3], 4)
    agents.wait_for(lambda: bool(decode.kv["layer.2"][20].any()))
    prefill.finish(ok=False)
    assert decode.wait_finished() == {21, 22}
    prefill.wait_freed()
    assert decode.agent.take_counts()["kv_recomputed_tokens"] == 6


def test_preempted_blocks_are_not_read(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    prefill.compute([3, 4, 5], 11)
    prefill.agent.begin_step(StepPlan(preempted=["p"]))
    for tensor in prefill.kv.values():
        tensor[3:6] = 999.0  # another request's now
    decode.receive(prefill.address, [20, 21, 22], num_tokens=10)
    time.sleep(0.2)
    assert not decode.kv["layer.0"].any()
    prefill.compute([7, 8, 9], 11)
    assert decode.wait_finished() == set()
    assert_equal_blocks(prefill, decode, [(7, 20), (8, 21), (9, 22)])


def test_the_lease_runs_out_when_d_never_comes(prefill: Prefill) -> None:
    prefill.offer()
    prefill.compute([3], 4)
    prefill.finish()
    started_s = time.monotonic()
    prefill.wait_freed()
    assert time.monotonic() - started_s >= SETTINGS.lease_s
    assert prefill.agent.take_counts()["kv_leases_expired"] == 1


def test_d_comes_after_the_lease_and_is_told(prefill: Prefill, decode: Decode) -> None:
    prefill.offer()
    prefill.compute([3], 4)
    prefill.finish()
    prefill.wait_freed()
    decode.receive(prefill.address, [20], num_tokens=4)
    assert decode.wait_finished(timeout_s=0.5) == {20}


def test_a_request_that_never_reaches_p_ends_the_wait(prefill: Prefill, decode: Decode) -> None:
    decode.receive(prefill.address, [20], num_tokens=4)
    assert decode.wait_finished(timeout_s=SETTINGS.lease_s + 1.5) == {20}


def test_no_p_at_the_address_ends_the_wait(decode: Decode) -> None:
    decode.receive(f"127.0.0.1:{free_port()}", [20], num_tokens=4)
    assert decode.wait_finished(timeout_s=SETTINGS.peer_timeout_s + 1.0) == {20}


def test_an_address_that_is_none_ends_the_wait_at_once(decode: Decode) -> None:
    decode.receive("not a host:4000", [20], num_tokens=4)
    assert decode.wait_finished(timeout_s=0.5) == {20}


@pytest.mark.parametrize(("block_ids", "first_block"), [([20, 21], 0), ([], 0), ([20, 21], -1), ([20], 1)])
def test_an_announce_that_does_not_fit_the_prompt_is_refused(
    prefill: Prefill, decode: Decode, block_ids: list[int], first_block: int
) -> None:
    prefill.offer()
    prefill.compute([3], 5)
    decode.receive(prefill.address, block_ids, num_tokens=4, first_block=first_block)
    assert decode.wait_finished() == set(block_ids)
    prefill.finish()
    prefill.wait_freed(timeout_s=0.8)


def test_garbage_and_strangers_disturb_nobody(prefill: Prefill, decode: Decode) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(f"tcp://{prefill.address}")
        for message in (b"", b"\xff" * 100, encode(Credit(0)), encode(Cancel("t", "because")), encode(Pong())):
            stranger.send(message)
            assert b"refused" in stranger.recv()
        stranger.send_multipart([b"two", b"frames"])
        stranger.setsockopt(zmq.LINGER, 0)
    prefill.offer()
    prefill.compute([3], 5)
    decode.receive(prefill.address, [20], num_tokens=4)
    assert decode.wait_finished() == set()


def test_a_prompt_that_differs_is_refused(prefill: Prefill, decode: Decode) -> None:
    prefill.offer(digest=b"other")
    prefill.compute([3], 4)
    decode.receive(prefill.address, [20], num_tokens=4)
    assert decode.wait_finished() == {20}
    assert not decode.kv["layer.0"].any()
    prefill.finish()
    prefill.wait_freed(timeout_s=0.8)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("model", {"model": "other"}),
        ("dtype (KV/model)", {"kv_dtype": "bfloat16"}),
        ("tensor parallelism", {"tp_size": 2}),
        ("block size", {"block_size": 8}),
    ],
)
def test_kv_that_does_not_match_is_refused_and_named_once(
    prefill: Prefill,
    settings: ConnectorSettings,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
) -> None:
    """Once on each side, however many requests come; and P's blocks don't wait for their lease."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    decode = start_decode(settings, **changes)
    try:
        for turn in range(3):
            prefill.offer(f"t{turn}")
            prefill.compute([3], 4)
            decode.receive(prefill.address, [20], num_tokens=4, transfer_id=f"t{turn}")
            assert decode.wait_finished() == {20}
            prefill.finish()
            prefill.wait_freed(timeout_s=0.8)
        errors = [record.getMessage() for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]
        assert len(errors) == 2, errors
        assert all(f"{name}: prefill " in error and "Start both with the same model" in error for error in errors)
        refused = [side.agent.take_counts()["kv_refused_peers"] for side in (decode, prefill)]
        assert refused == [1, 1]
        assert not decode.kv["layer.0"].any()
    finally:
        decode.agent.stop()


def test_a_p_that_comes_back_with_the_right_kv_is_used(decode: Decode, settings: ConnectorSettings) -> None:
    """At the same address, where KV did not match before."""
    wrong = start_prefill(settings, model="other")
    decode.receive(wrong.address, [20], num_tokens=4)
    assert decode.wait_finished() == {20}
    wrong.agent.stop()
    right = start_prefill(settings, port=split_address(wrong.address)[1])
    try:
        decode.receive(right.address, [20], num_tokens=4, transfer_id="u")  # D's Hello was for the other P
        assert decode.wait_finished() == {20}
        right.offer("v")
        right.compute([3], 4)
        agents.wait_for(lambda: not decode.agent._side._peers.all())
        decode.receive(right.address, [21], num_tokens=4, transfer_id="v")
        assert decode.wait_finished() == set()
    finally:
        right.agent.stop()


def test_a_transfer_id_used_twice_disturbs_nobody(prefill: Prefill, decode: Decode) -> None:
    prefill.offer("t", "p")
    prefill.offer("t", "p2")
    prefill.compute([3], 4)
    decode.receive(prefill.address, [20], num_tokens=4)
    assert decode.wait_finished() == set()
    for req_id in ("p", "p2"):
        prefill.finish(req_id)
        prefill.wait_freed(req_id)


def test_a_transport_that_d_cannot_attach_is_not_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's P: its shared memory can't be opened. The next request goes over `tcp`."""

    def refuse(path: str, size_bytes: int) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(shm, "_map_file", refuse)
    prefill, decode = start_prefill(SETTINGS), start_decode(SETTINGS)
    try:
        for number, invalid in enumerate(({20}, set())):
            prefill.offer(f"t{number}", f"p{number}")
            decode.receive(prefill.address, [20], num_tokens=4, transfer_id=f"t{number}")
            prefill.compute([3], 5, f"p{number}")
            assert decode.wait_finished(timeout_s=30) == invalid
        assert_equal_blocks(prefill, decode, [(3, 20)])
    finally:
        prefill.agent.stop()
        decode.agent.stop()


def _prefill_process(settings: ConnectorSettings, pipe: Connection) -> None:
    prefill = start_prefill(settings)
    prefill.offer()
    prefill.compute([3], 4)
    pipe.send((os.getpid(), prefill.address))
    pipe.recv()


def test_p_killed_in_mid_transfer_ends_the_wait_at_once(decode: Decode, settings: ConnectorSettings) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_prefill_process, args=(settings, theirs))
    child.start()
    try:
        pid, address = ours.recv()
        decode.receive(address, [20, 21], num_tokens=8)
        agents.wait_for(lambda: bool(decode.kv["layer.2"][20].any()))
        os.kill(pid, signal.SIGKILL)
        assert decode.wait_finished(timeout_s=0.5) == {21}, "by the pidfd, not by a deadline"
    finally:
        child.kill()
        child.join()


def _decode_process(settings: ConnectorSettings, address: str, pipe: Connection) -> None:
    decode = start_decode(settings)
    decode.receive(address, [20, 21], num_tokens=8)
    agents.wait_for(lambda: bool(decode.kv["layer.2"][20].any()))
    pipe.send(os.getpid())
    pipe.recv()


def test_d_killed_in_mid_transfer_frees_ps_blocks_at_once(prefill: Prefill, settings: ConnectorSettings) -> None:
    prefill.offer()
    prefill.compute([3], 4)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=_decode_process, args=(settings, prefill.address, theirs)
    )
    child.start()
    try:
        pid = ours.recv()
        os.kill(pid, signal.SIGKILL)
        prefill.finish()
        prefill.wait_freed(timeout_s=0.5)
        agents.wait_for(lambda: prefill.free_slots == SETTINGS.num_slots)
    finally:
        child.kill()
        child.join()


def test_200_transfers_leave_nothing_behind(prefill: Prefill, decode: Decode) -> None:
    for index in range(200):
        req_id, transfer_id = f"p{index}", f"t{index}"
        prefill.offer(transfer_id, req_id)
        decode.receive(prefill.address, [20, 21], num_tokens=8, transfer_id=transfer_id)
        prefill.compute([3, 4], 9, req_id)
        prefill.finish(req_id)
        assert decode.wait_finished() == set()
        prefill.wait_freed(req_id)
    agents.wait_for(lambda: prefill.free_slots == SETTINGS.num_slots)
    assert prefill.agent._side._offers.is_empty
    assert decode.agent._side.arrivals.is_empty
