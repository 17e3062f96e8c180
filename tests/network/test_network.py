"""A prefill and a decode agent on two hosts (network namespaces), and what networks do to them. No engine."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count

import pytest

from tests.connector.agents import BLOCK_SIZE, Memory, wait_for
from tests.contract.target import TargetProcess
from tests.gpu.peers import DecodePeer, PrefillPeer
from tests.network.hosts import Network, Weather, made_in, why_not
from twolane.config import ProxySettings
from twolane.connector import host
from twolane.connector.settings import ConnectorSettings
from twolane.errors import UpstreamConnectionError
from twolane.proxy import upstream
from twolane.proxy.http_client import HttpClient, request_bytes

NO_HOSTS = why_not()
pytestmark = pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS)
MEMORY = Memory(width=128)  # 12 KiB a block
BLOCKS = list(range(MEMORY.num_blocks))
NUM_TOKENS = MEMORY.num_blocks * BLOCK_SIZE
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    made = Network(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def processes(network: Network) -> Iterator[tuple[TargetProcess, TargetProcess]]:
    """P's on the first host, D's on the second."""
    made = [
        TargetProcess(partial(made_in, one.namespace, peer))
        for one, peer in zip(network.hosts, (PrefillPeer, DecodePeer), strict=True)
    ]
    yield made[0], made[1]
    for process in made:
        process.stop()


class Lanes:
    """A P and a D, with `auto`: they find out that they are on two hosts."""

    def __init__(self, network: Network, processes: tuple[TargetProcess, TargetProcess], **deadlines: float) -> None:
        self.prefill, self.decode = processes
        settings = [
            ConnectorSettings(host=one.address, slot_bytes=64 << 10, num_slots=4, **deadlines)  # type: ignore[arg-type]
            for one in network.hosts
        ]
        self.address = self.prefill.start(settings[0], MEMORY)
        self.decode.start(settings[1], MEMORY)

    def begin(self, transfer_id: str, num_computed: int = NUM_TOKENS) -> None:
        """P's block i goes to D's block i from the end."""
        self.prefill.offer(transfer_id)
        self.decode.receive(self.address, BLOCKS[::-1], NUM_TOKENS, transfer_id)
        self.prefill.compute(BLOCKS, num_computed, transfer_id)

    def end(self, transfer_id: str) -> list[int]:
        """Once both sides have their blocks back: those of D's that hold nothing."""
        _, invalid = self.decode.wait_reported([transfer_id], DEADLINE_S)
        self.prefill.finish([transfer_id], DEADLINE_S)
        return list(invalid)

    def check_contents(self, but_for: list[int]) -> None:
        pairs = [(MEMORY.num_blocks - 1 - block, block) for block in BLOCKS if block not in but_for]
        assert not self.decode.wrong(pairs)
        self.decode.zero()


@pytest.fixture
def lanes(
    request: pytest.FixtureRequest, network: Network, processes: tuple[TargetProcess, TargetProcess]
) -> Iterator[Lanes]:
    network.weather = Weather()
    made = Lanes(network, processes, **getattr(request, "param", {}))
    yield made
    network.weather = Weather()
    made.prefill.end()
    made.decode.end()


@pytest.mark.parametrize("border", [["--net"], ["--ipc"], ["--user"], ["--pid", "--fork"], []], ids=" ".join)
def test_a_containers_border_makes_another_host(border: list[str]) -> None:
    program = f"import runpy; print(runpy.run_path({host.__file__!r})['host_identity']())"
    there = subprocess.run(
        ["unshare", *border, sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert (there.stdout.strip() == host.host_identity()) == (not border)


def test_the_proxy_finds_out_that_an_instances_host_is_gone(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the answer's deadline: nothing comes, not even an end of the connection."""
    times = ((socket.TCP_USER_TIMEOUT, 2000), (socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1))
    monkeypatch.setattr(upstream, "LOST_HOST", times)
    server = network.hosts[1].call(lambda: socket.create_server((network.hosts[1].address, 0)))
    address = f"{network.hosts[1].address}:{server.getsockname()[1]}"

    async def ask() -> None:
        async with asyncio.TaskGroup() as tasks:
            client = HttpClient(ProxySettings(), tasks)
            request = request_bytes("GET", b"/health", address, b"")
            answer = asyncio.ensure_future(client.fetch(address, request, 2 * DEADLINE_S))
            connection, _ = await asyncio.to_thread(server.accept)
            with server, connection:
                assert await asyncio.to_thread(connection.recv, 1000) == request
                network.weather = Weather(is_cut=True)
                with pytest.raises(UpstreamConnectionError, match="timed out"):
                    await answer
            await client.close()

    try:
        network.hosts[0].call(lambda: asyncio.run(ask()))
    finally:
        network.weather = Weather()


def test_two_hosts_on_one_machine_use_tcp_and_every_byte_arrives(lanes: Lanes) -> None:
    for number in range(3):
        lanes.begin(f"t{number}")
        assert lanes.end(f"t{number}") == []
        lanes.check_contents(but_for=[])
    assert lanes.prefill.channels() == ["TcpSendChannel"]
    assert lanes.decode.received_bytes() == 3 * MEMORY.num_blocks * BLOCK_SIZE * MEMORY.width * 2 * 4 * MEMORY.layers


@pytest.mark.parametrize("lanes", [{"peer_timeout_s": 30.0, "lease_s": 60.0}], indirect=True)
def test_100_ms_and_1_percent_loss_slow_a_transfer_down_and_no_more(lanes: Lanes, network: Network) -> None:
    network.weather = Weather(delay_s=0.1, loss=0.01)
    lost = network.num_lost
    lanes.begin("t")
    assert lanes.end("t") == []
    lanes.check_contents(but_for=[])
    assert network.num_lost > lost, "or nothing was tried"


@pytest.mark.parametrize("lanes", [{"peer_timeout_s": 3.0, "lease_s": 3.0, "transfer_timeout_s": 30.0}], indirect=True)
def test_a_cut_link_ends_the_transfer_on_both_sides_and_a_healed_one_works_again(
    lanes: Lanes, network: Network
) -> None:
    network.weather = Weather(delay_s=0.05)
    lanes.begin("t")
    lanes.decode.wait_received(1)
    network.weather = Weather(is_cut=True)
    invalid = lanes.end("t")
    assert invalid, "it was cut in mid-transfer"
    lanes.check_contents(but_for=invalid)
    network.weather = Weather()

    numbers = count()

    def lands_again() -> bool:
        """What meets the old connection fails once more, as soon as P or D finds out."""
        lanes.begin(name := f"u{next(numbers)}")
        return not lanes.end(name)

    wait_for(lands_again, DEADLINE_S)
    lanes.check_contents(but_for=[])
    wait_for(lambda: lanes.prefill.free_slots() == 4, DEADLINE_S)
