"""A prefill and a decode agent for the tests that need no others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.connector.agents import SETTINGS, Decode, Prefill, start_decode, start_prefill


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    made = start_prefill(SETTINGS)
    yield made
    made.agent.stop()


@pytest.fixture
def decode() -> Iterator[Decode]:
    made = start_decode(SETTINGS)
    yield made
    made.agent.stop()
