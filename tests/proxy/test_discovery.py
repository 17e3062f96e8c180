"""Registrations over real ZMQ sockets."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import zmq
from tests.proxy.scripted import Cluster, ScriptedInstance, cluster, eventually

from twolane.config import ProxySettings
from twolane.errors import ConfigError
from twolane.protocol import Registration
from twolane.proxy.pool import State
from twolane.proxy.service import Service


def send_raw(c: Cluster, *payloads: bytes) -> None:
    """From a DEALER that closes when all is sent."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://127.0.0.1:{c.service.discovery_port}")
        for payload in payloads:
            socket.send(payload)


async def test_instance_is_used_as_soon_as_it_is_healthy() -> None:
    async with cluster(0, 0) as c:
        d = ScriptedInstance("D")
        d.healthy = False
        await c.add(d)
        await eventually(lambda: d.num_probes > 1)
        assert (await c.complete()).status_code == 503
        d.healthy = True
        await eventually(lambda: c.view(d).state is State.READY)
        assert (await c.complete()).status_code == 200
        num_probes = d.num_probes
        assert (await c.complete()).status_code == 200
        assert d.num_probes == num_probes
        await d.stop()


async def test_silent_instance_is_forgotten_and_comes_back_with_a_word() -> None:
    async with cluster(0, 1, registration_expiry_s=0.4) as c:
        await eventually(lambda: len(c.service.pool) == 0)
        assert (await c.complete()).status_code == 503
        c.d.register(c.service.discovery_port)
        await eventually(lambda: len(c.service.pool.ready("D")) == 1)
        assert (await c.complete()).status_code == 200


async def test_leaving_instance_says_so_and_gets_nothing_new() -> None:
    async with cluster(1, 1) as c:
        c.p.register(c.service.discovery_port, leaving=True)
        await eventually(lambda: c.view(c.p).state is State.LEAVING)
        assert (await c.complete()).status_code == 200
        assert not c.p.calls


async def test_garbage_is_ignored_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    good = {"type": "D", "http_address": "127.0.0.1:1", "zmq_address": "127.0.0.1:2", "kind": "twolane", "new": 1}
    bad = [b"", b"\xc1", msgspec.msgpack.encode([1]), msgspec.msgpack.encode(good | {"type": "X"})]
    bad += [msgspec.msgpack.encode(good | {name: "nonsense"}) for name in ("http_address", "zmq_address", "kind")]
    async with cluster(0, 0) as c:
        send_raw(c, *bad * 20, msgspec.msgpack.encode(good))
        await eventually(lambda: len(c.service.pool) == 1)
        assert len([r for r in caplog.records if "registration refused" in r.message]) == 1


async def test_address_off_loopback_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    good = {"type": "D", "http_address": "localhost:1", "zmq_address": "127.0.0.1:2", "kind": "twolane"}
    async with cluster(0, 0) as c:
        far = [good | {"http_address": address} for address in ("10.1.2.3:80", "example.com:80", "0.0.0.0:80")]
        send_raw(c, *map(msgspec.msgpack.encode, far), msgspec.msgpack.encode(good))
        await eventually(lambda: len(c.service.pool) == 1)
        assert [i.address for i in c.service.pool] == ["localhost:1"]
        assert "allowed network" in caplog.text
        assert (await c.stats())["registrations_refused"] == 3


async def test_restarted_instance_with_the_same_identity_is_heard() -> None:
    async with cluster(0, 1) as c:
        twin = ScriptedInstance("D")
        twin.port, twin.control_address, twin.epoch = c.d.port, c.d.control_address, "second"
        twin.register(c.service.discovery_port)  # while the old one's connection is still open
        await eventually(lambda: c.view(c.d).epoch == "second")
        await twin.stop()


async def test_discovery_port_in_use_is_named() -> None:
    async with cluster(0, 0) as c:
        port = c.service.discovery_port
        with pytest.raises(ConfigError, match=rf"discovery port {port} .*pid \d+.*--discovery-port"):
            await Service(ProxySettings(http_port=0, discovery_port=port)).__aenter__()


async def test_only_allowed_networks_may_be_named() -> None:
    async with cluster(0, 0, allowed_networks=("10.1.0.0/16", "fd00::/8")) as c:
        near, far = ("10.1.2.3:80", "[fd00::1]:80"), ("10.2.0.1:80", "127.0.0.1:80", "[::1]:80", "localhost:80")
        pairs = [(a, near[0]) for a in far] + [(near[0], a) for a in far] + [(a, a) for a in near]
        registrations = [Registration("D", http, control, "twolane") for http, control in pairs]
        send_raw(c, *map(msgspec.msgpack.encode, registrations))
        await eventually(lambda: len(c.service.pool) == 2)
        assert {i.address for i in c.service.pool} == set(near)
        assert (await c.stats())["registrations_refused"] == 2 * len(far)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"discovery_host": "0.0.0.0"}, "shared secret"), ({"allowed_networks": ("10.0.0.1/8",)}, "10.0.0.1/8")],  # noqa: S104
)
async def test_open_or_senseless_discovery_is_refused_at_start(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        await Service(ProxySettings(http_port=0, discovery_port=0, **settings)).__aenter__()


async def test_hung_instance_is_found_ejected_and_taken_back() -> None:
    async with cluster(1, 2, health_ready_every_s=0.05, health_timeout_s=0.05) as c:
        victim = c.decodes[0]
        victim.hung = True  # its port still takes connections
        await eventually(lambda: c.view(victim).state is State.EJECTED)
        assert "health probes" in c.view(victim).reason
        assert (await c.complete()).status_code == 200
        assert not victim.calls
        victim.hung = False
        await eventually(lambda: c.view(victim).state is State.READY)
