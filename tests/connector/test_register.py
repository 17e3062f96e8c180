"""An instance tells the proxy of itself, over a real socket."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.connector.agents import start_decode, start_prefill
from tests.ports import free_port
from twolane.connector.register import changed_much
from twolane.connector.settings import ConnectorSettings, parse_settings, read_secret
from twolane.errors import ConfigError
from twolane.protocol import REGISTER_EVERY_S, Load, Registration, decode_registration, encode


@pytest.fixture
def proxy() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    address = f"127.0.0.1:{free_port()}"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"tcp://{address}")
        yield socket, address


def receive(socket: zmq.Socket[bytes]) -> tuple[bytes, Registration]:
    identity, frame = socket.recv_multipart()
    return identity, decode_registration(frame)


def test_it_registers_at_once_and_says_when_it_leaves(proxy: tuple[zmq.Socket[bytes], str]) -> None:
    socket, address = proxy
    prefill = start_prefill(ConnectorSettings(http_address="127.0.0.1:20003", discovery_address=address))
    identity, registration = receive(socket)
    assert identity.decode() == registration.zmq_address == prefill.address
    assert (registration.type, registration.kind, registration.http_address) == ("P", "twolane", "127.0.0.1:20003")
    assert not registration.leaving
    prefill.agent.stop()
    assert receive(socket)[1] == Registration(
        "P", "127.0.0.1:20003", prefill.address, "twolane", registration.epoch, leaving=True
    )


def test_every_proxy_hears_everything() -> None:
    """Also while another one isn't there, and from then on when it has come."""
    first, second, absent = (f"127.0.0.1:{free_port()}" for _ in range(3))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as one, context.socket(zmq.ROUTER) as other:
        late = context.socket(zmq.ROUTER)
        for socket, address in ((one, first), (other, second)):
            socket.setsockopt(zmq.RCVTIMEO, 30_000)
            socket.bind(f"tcp://{address}")
        where = f"{first},{absent},{second}"
        prefill = start_prefill(ConnectorSettings(http_address="127.0.0.1:20003", discovery_address=where))
        try:
            assert receive(one) == receive(other)
            prefill.agent.tell_load(IDLE)
            for socket in (one, other):
                while receive(socket)[1].load != IDLE:
                    pass
            late.setsockopt(zmq.RCVTIMEO, 30_000)
            late.bind(f"tcp://{absent}")
            assert receive(late)[1].load == IDLE
        finally:
            prefill.agent.stop()
        for socket in (one, other, late):
            while not receive(socket)[1].leaving:
                pass
        late.close(0)


def test_d_tells_the_proxy_why_no_kv_moves(proxy: tuple[zmq.Socket[bytes], str]) -> None:
    socket, address = proxy
    prefill = start_prefill(ConnectorSettings(), model="other")
    decode = start_decode(ConnectorSettings(http_address="127.0.0.1:20005", discovery_address=address))
    try:
        assert not receive(socket)[1].problem
        decode.receive(prefill.address, [20], num_tokens=4)
        assert "model: prefill other, decode tiny" in receive(socket)[1].problem
    finally:
        prefill.agent.stop()
        decode.agent.stop()


def test_a_secret_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        read_secret(str(tmp_path / "nowhere"))
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no secret"):
        read_secret(str(tmp_path / "empty"))


def test_an_unknown_key_is_an_error_that_tells_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"lease_sec.*knows these keys: host, http_address"):
        parse_settings({"lease_sec": 3})


IDLE = Load(free_blocks=100, num_blocks=100, block_size=16, num_running=0, num_waiting=0)


def test_it_tells_its_load_and_a_large_change_at_once(proxy: tuple[zmq.Socket[bytes], str]) -> None:
    socket, address = proxy
    prefill = start_prefill(ConnectorSettings(http_address="127.0.0.1:20003", discovery_address=address))
    try:
        assert receive(socket)[1].load is None, "no step yet"
        busy = msgspec.structs.replace(IDLE, num_running=1, free_blocks=90)
        sent_at_s = time.monotonic()
        for load in (IDLE, busy, IDLE, busy):
            prefill.agent.tell_load(load)
        assert receive(socket)[1].load == busy
        prefill.agent.tell_load(IDLE)
        assert receive(socket)[1].load == IDLE
        assert 0.5 <= time.monotonic() - sent_at_s < REGISTER_EVERY_S, "sooner, but not at every change"
    finally:
        prefill.agent.stop()


@pytest.mark.parametrize(
    ("changes", "much"),
    [
        ({}, False),
        ({"num_running": 11}, False),
        ({"num_running": 13}, True),
        ({"num_running": 7}, True),
        ({"num_running": 9, "num_waiting": 1}, True),
        ({"free_blocks": 40}, False),
        ({"free_blocks": 37}, True),
    ],
)
def test_what_a_large_change_is(changes: dict[str, int], much: bool) -> None:
    told = msgspec.structs.replace(IDLE, num_running=10, free_blocks=50)
    assert changed_much(told, msgspec.structs.replace(told, **changes)) is much


def test_without_a_load_it_is_the_old_connectors_map() -> None:
    """What vLLM's P2pNcclConnector sent and what routers made for it read."""
    fields = {"type": "P", "http_address": "127.0.0.1:1", "zmq_address": "127.0.0.1:2"}
    assert msgspec.msgpack.decode(encode(Registration("P", "127.0.0.1:1", "127.0.0.1:2"))) == fields
    assert decode_registration(msgspec.msgpack.encode(fields)).load is None
