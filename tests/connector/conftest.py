"""A prefill and a decode agent for the tests that need no others; streams of a GPU, where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from tests.connector.agents import SETTINGS, Decode, Prefill, start_decode, start_prefill
from tests.connector.sim_streams import Device, simulated
from twolane.connector.settings import ConnectorSettings


@pytest.fixture(params=["shm", "tcp"])
def settings(request: pytest.FixtureRequest) -> ConnectorSettings:
    """Over each transport that a CPU has."""
    return msgspec.structs.replace(SETTINGS, transport=request.param)


@pytest.fixture
def prefill(settings: ConnectorSettings) -> Iterator[Prefill]:
    made = start_prefill(settings)
    yield made
    made.agent.stop()


@pytest.fixture
def decode(settings: ConnectorSettings) -> Iterator[Decode]:
    made = start_decode(settings)
    yield made
    made.agent.stop()


@pytest.fixture(params=[0, 1, 2])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with simulated(request.param) as made:
        yield made
