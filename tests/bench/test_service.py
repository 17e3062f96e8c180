"""Ctrl+C in a benchmark: heard wherever it comes, and never lost."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from twolane.bench.service import SIGNALS, Interrupt
from twolane.errors import StartError


async def raises_one_and_waits(number: signal.Signals) -> None:
    signal.raise_signal(number)
    await asyncio.sleep(60)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_asynchronous_ends_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    began_s = time.monotonic()
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        interrupt.run(raises_one_and_waits(number))
    assert time.monotonic() - began_s < 30
    assert signal.getsignal(number) == before


class Destroyed:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_one_that_comes_in_a_destructor_is_heard() -> None:
    with Interrupt() as interrupt:
        interrupt.check()
        Destroyed()
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


def test_errors_come_out_as_they_are() -> None:
    async def fails() -> None:
        raise StartError("no")

    with Interrupt() as interrupt, pytest.raises(StartError, match="no"):
        interrupt.run(fails())
