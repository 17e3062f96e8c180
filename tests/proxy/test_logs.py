"""Lines in batches."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from twolane.proxy.logs import BatchingHandler, SecondsFormatter


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(out: io.StringIO) -> Iterator[logging.Logger]:
    made = logging.getLogger("test.batching")
    handler = BatchingHandler(out)
    handler.setFormatter(SecondsFormatter("%(message)s"))
    made.addHandler(handler)
    made.propagate = False
    made.setLevel(logging.INFO)
    yield made
    made.removeHandler(handler)


def test_without_a_loop_every_line_is_written_at_once(logger: logging.Logger, out: io.StringIO) -> None:
    logger.info("one")
    assert out.getvalue() == "one\n"


async def test_lines_are_written_in_order_within_a_moment(logger: logging.Logger, out: io.StringIO) -> None:
    logger.info("one")
    logger.info("two")
    assert out.getvalue() == ""
    await asyncio.sleep(0.2)
    assert out.getvalue() == "one\ntwo\n"


async def test_warning_takes_the_lines_before_it_along(logger: logging.Logger, out: io.StringIO) -> None:
    logger.info("one")
    logger.warning("two")
    assert out.getvalue() == "one\ntwo\n"
    await asyncio.sleep(0.2)
    assert out.getvalue() == "one\ntwo\n"


async def test_end_of_the_process_loses_nothing(logger: logging.Logger, out: io.StringIO) -> None:
    logger.info("one")
    logger.handlers[0].flush()  # what logging.shutdown does
    assert out.getvalue() == "one\n"


def test_time_is_the_standard_formatters() -> None:
    record = logging.LogRecord("n", logging.INFO, "p", 1, "m", None, None)
    mine, standard = SecondsFormatter("%(asctime)s"), logging.Formatter("%(asctime)s")
    for record.created in (1e9, 1e9, 1e9 + 1):
        assert mine.format(record) == standard.format(record)
