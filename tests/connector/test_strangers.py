"""Sockets of instances that share a secret: strangers change nothing, are counted, and hear nothing."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from tests.connector.agents import (
    SETTINGS,
    Decode,
    Prefill,
    start_decode,
    start_prefill,
    wait_for,
)
from tests.connector.strangers import MEMBERS_ONLY, RAW, SECRET, Relay, dealer, deployment_keys, raw
from tests.ports import free_port
from twolane import curve
from twolane.connector import sockets
from twolane.connector.messages import Announce, Cancel, Refused, decode_to_decode
from twolane.connector.settings import ConnectorSettings
from twolane.connector.transport.data_sockets import ReceiveLine, ZmqClient, ZmqServer
from twolane.errors import ConfigError
from twolane.protocol import Registration, decode_registration, encode

TRANSFER_ID = "a-transfer-id-that-stands-out"
WAIT_S = 30.0


@pytest.fixture(autouse=True)
def short_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "HANDSHAKE_S", 2.0)


@pytest.fixture
def keyed(tmp_path: Path) -> ConnectorSettings:
    """Over `tcp`, so that data has its sockets too; patient, since the machine may be busy."""
    path = tmp_path / "secret"
    path.write_text(f"# shared\n{SECRET}\n")
    waits = {"lease_s": WAIT_S, "peer_timeout_s": WAIT_S, "transfer_timeout_s": WAIT_S}
    return msgspec.structs.replace(SETTINGS, transport="tcp", registration_secret_file=str(path), **waits)


@contextlib.contextmanager
def running(*agents: Prefill | Decode) -> Iterator[None]:
    try:
        yield
    finally:
        for one in agents:
            one.agent.stop()


def hand_off(prefill: Prefill, decode: Decode, address: str = "", transfer_id: str = TRANSFER_ID) -> set[int]:
    """One transfer of two blocks. Returns the blocks of which nothing came."""
    prefill.offer(transfer_id)
    decode.receive(address or prefill.address, [20, 21], 8, transfer_id)
    prefill.compute([4, 5], 8)
    invalid = decode.wait_finished(WAIT_S)
    prefill.finish()
    prefill.wait_freed(timeout_s=WAIT_S)
    return invalid


def arrived(prefill: Prefill, decode: Decode) -> bool:
    return all(prefill.kv[name][4:6].equal(decode.kv[name][20:22]) for name in decode.kv)


class Counted:
    """Adds up what an agent tells vLLM."""

    def __init__(self, agent: Prefill | Decode) -> None:
        self._agent = agent.agent
        self._total: Counter[str] = Counter()

    def __getitem__(self, name: str) -> int:
        self._total.update({key: value for key, value in self._agent.take_counts().items() if isinstance(value, int)})
        return self._total[name]

    def reaches(self, name: str, number: int) -> None:
        wait_for(lambda: self[name] >= number, WAIT_S)
        assert self[name] == number, name


@pytest.mark.parametrize("what", RAW)
def test_bytes_of_a_stranger_change_nothing_and_are_counted(what: str, keyed: ConnectorSettings) -> None:
    prefill, decode = start_prefill(keyed), start_decode(keyed)
    counted = Counted(prefill)
    with running(prefill, decode), raw(prefill.address, RAW[what]):
        assert hand_off(prefill, decode) == set(), "while the stranger is still connected"
        assert arrived(prefill, decode)
        counted.reaches("kv_refused_connections", 1)
        assert counted["kv_refused_messages"] == counted["kv_ended_connections"] == 0


@pytest.mark.parametrize("who", MEMBERS_ONLY)
def test_messages_of_a_stranger_change_nothing_and_are_counted(who: str, keyed: ConnectorSettings) -> None:
    prefill, decode = start_prefill(keyed), start_decode(keyed)
    counted = Counted(prefill)
    keys, server = MEMBERS_ONLY[who]()
    with running(prefill, decode), dealer(prefill.address, keys, server) as stranger:
        prefill.offer(TRANSFER_ID)
        stranger.send(encode(Cancel(TRANSFER_ID, "mischief")))
        wait_for(lambda: counted["kv_refused_connections"] >= 1, WAIT_S)
        assert not stranger.poll(0), "not a word to him"
        decode.receive(prefill.address, [20, 21], 8, TRANSFER_ID)
        prefill.compute([4, 5], 8)
        assert decode.wait_finished(WAIT_S) == set()
        assert arrived(prefill, decode)


def test_a_recorded_conversation_is_worth_nothing(keyed: ConnectorSettings) -> None:
    prefill, decode = start_prefill(keyed), start_decode(keyed)
    relay, counted = Relay(prefill.address), Counted(prefill)
    with running(prefill, decode):
        assert hand_off(prefill, decode, relay.address) == set()
        recorded = bytes(relay.sent)
        with raw(prefill.address, recorded):
            counted.reaches("kv_refused_connections", 1)
        assert hand_off(prefill, decode, relay.address, "another") == set()
        assert counted["kv_refused_messages"] == 0
    relay.close()


class Ears:
    """Hears P's control and data connections."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefill: Prefill) -> None:
        self.control = Relay(prefill.address)
        self.data: list[Relay] = []
        join = ZmqClient.join

        def through_relay(client: ZmqClient, address: str, token: bytes) -> ReceiveLine:
            self.data.append(Relay(address))
            return join(client, self.data[-1].address, token)

        monkeypatch.setattr(ZmqClient, "join", through_relay)

    def close(self) -> None:
        for relay in (self.control, *self.data):
            relay.close()


@pytest.mark.parametrize("has_secret", [True, False])
def test_who_listens_in_between_hears_nothing_where_there_is_a_secret(
    has_secret: bool, keyed: ConnectorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = keyed if has_secret else msgspec.structs.replace(keyed, registration_secret_file="")
    prefill, decode = start_prefill(settings), start_decode(settings)
    ears = Ears(monkeypatch, prefill)
    with running(prefill, decode):
        assert hand_off(prefill, decode, ears.control.address) == set()
        assert arrived(prefill, decode)
    control, data = ears.control.heard, b"".join(relay.heard for relay in ears.data)
    kv = next(iter(prefill.kv.values()))[4].numpy().tobytes()
    assert len(data) > len(kv)
    told = {"transfer": TRANSFER_ID.encode() in control, "digest": b"prompt" in control, "kv": kv[:64] in data}
    assert set(told.values()) == {not has_secret}, told
    assert SECRET.encode() not in control + data
    assert deployment_keys().public not in control + data
    ears.close()


def test_what_a_member_says_is_checked_and_counted(keyed: ConnectorSettings) -> None:
    prefill, decode = start_prefill(keyed), start_decode(keyed)
    counted = Counted(prefill)
    words = encode(Announce("t", 8, 0, [1, 2], b"digest"))
    with running(prefill, decode), dealer(prefill.address, deployment_keys()) as member:
        for frames in ([words[:-3]], [words + b"x"], [b""], [words, words]):
            member.send_multipart(frames)
        counted.reaches("kv_refused_messages", 4)
        refusals = [decode_to_decode(member.recv()) for _ in range(3)]
        assert all(isinstance(one, Refused) for one in refusals)
        assert counted["kv_ended_connections"] == 0
        assert hand_off(prefill, decode) == set()
        member.send(bytes(sockets.MAX_CONTROL_BYTES + 1000))
        wait_for(lambda: counted["kv_ended_connections"] >= 1, WAIT_S)
        assert hand_off(prefill, decode, transfer_id="another") == set()
        assert (counted["kv_refused_messages"], counted["kv_refused_connections"]) == (4, 0)


@pytest.mark.parametrize("what", ["garbage", "an oversized command", "one byte"])
def test_a_stranger_at_the_data_socket_is_counted_too(what: str) -> None:
    server = ZmqServer("127.0.0.1", WAIT_S, None, deployment_keys())
    client = ZmqClient(WAIT_S, None, deployment_keys())
    token, num_refused = b"t" * 32, 0
    line = server.admit(token)
    with raw(server.address, RAW[what]), dealer(server.address, None) as stranger:
        stranger.send(token)
        deadline_s = time.monotonic() + WAIT_S
        while num_refused < 2:
            assert time.monotonic() < deadline_s
            server.poll()
            num_refused += server.take_refused()
        receiving = client.join(server.address, token)
        while not line.is_joined:  # by whom, the bytes below tell
            assert time.monotonic() < deadline_s
            server.poll()
        line.send(b"head", memoryview(b"data" * 1000))
        while (head := receiving.next_head()) is None:
            assert time.monotonic() < deadline_s
        into = bytearray(4000)
        assert (head, receiving.take(memoryview(into)), bytes(into[:4])) == (b"head", 4000, b"data")
        receiving.close()
    client.close()
    server.close()


Change = Callable[[ConnectorSettings, Path], ConnectorSettings]


def without_secret(settings: ConnectorSettings, tmp_path: Path) -> ConnectorSettings:
    return msgspec.structs.replace(settings, registration_secret_file="")


def with_another(settings: ConnectorSettings, tmp_path: Path) -> ConnectorSettings:
    path = tmp_path / "other"
    path.write_text("guess\n")
    return msgspec.structs.replace(settings, registration_secret_file=str(path))


def same(settings: ConnectorSettings, tmp_path: Path) -> ConnectorSettings:
    return settings


@pytest.mark.parametrize(
    ("of_prefill", "of_decode"), [(same, without_secret), (without_secret, same), (same, with_another)]
)
def test_unlike_secrets_end_in_one_clear_word(
    of_prefill: Change,
    of_decode: Change,
    keyed: ConnectorSettings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """D computes the prompt soon (nothing here waits for the peer's timeout), and says why, once."""
    with proxy_socket() as (proxy, address):
        registering = msgspec.structs.replace(
            of_decode(keyed, tmp_path), http_address="127.0.0.1:1", discovery_address=address, peer_timeout_s=600.0
        )
        prefill, decode = start_prefill(of_prefill(keyed, tmp_path)), start_decode(registering)
        counted = Counted(decode)
        with running(prefill, decode):
            for _ in range(2):
                decode.receive(prefill.address, [20, 21], 8)
                assert decode.wait_finished(WAIT_S) == {20, 21}
            counted.reaches("kv_refused_peers", 2)
            errors = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
            about_p = [error for error in errors if prefill.address in error]
            assert len(about_p) == 1, errors
            assert "registration_secret_file" in about_p[0]
            if of_decode is without_secret:  # else this proxy is none for it
                wait_for(lambda: prefill.address in registered(proxy).problem, WAIT_S)


@contextlib.contextmanager
def proxy_socket() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as made:
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        port = made.bind_to_random_port("tcp://127.0.0.1")
        yield made, f"127.0.0.1:{port}"


def registered(proxy: zmq.Socket[bytes]) -> Registration:
    return decode_registration(proxy.recv_multipart()[-1])


@pytest.mark.parametrize("has_secret", [True, False])
def test_an_instance_binds_its_own_address_only(has_secret: bool, keyed: ConnectorSettings) -> None:
    settings = msgspec.structs.replace(keyed, host="127.0.0.2")
    if not has_secret:
        settings = msgspec.structs.replace(settings, registration_secret_file="")
    before = listening()
    prefill, decode = start_prefill(settings), start_decode(settings)
    with running(prefill, decode):
        assert hand_off(prefill, decode) == set()
        assert {host for host, _ in listening() - before} == {"127.0.0.2"}
        assert len(listening() - before) == 2  # control and data


def listening() -> set[tuple[str, int]]:
    sockets_of_mine = psutil.Process().net_connections("tcp")
    return {tuple(one.laddr) for one in sockets_of_mine if one.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(("host", "warns"), [("0.0.0.0", True), ("127.0.0.1", False)])  # noqa: S104
def test_a_control_address_for_everybody_is_warned_of(host: str, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    prefill = start_prefill(msgspec.structs.replace(SETTINGS, host=host), port=free_port())
    prefill.agent.stop()
    assert ("registration_secret_file" in caplog.text) is warns


def test_a_libzmq_without_curve_is_named(monkeypatch: pytest.MonkeyPatch, keyed: ConnectorSettings) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    with pytest.raises(ConfigError, match="built without CURVE"):
        start_prefill(keyed)
