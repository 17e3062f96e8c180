"""Open files: as many as the system lets us have, and what we do before they run out.

At the limit nothing works any more: connections can't be accepted, instances can't be reached and would be taken for
dead. So requests are refused while some descriptors are left, and connections a little later.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable
from time import monotonic

from twolane.errors import TooBusyError

logger = logging.getLogger(__name__)

_A_REQUEST = 2  # sockets beside the client's: to D, and to P for a while
_RESERVE = 256  # for probes, the engines' numbers, our own files, and to tell clients why
_COMPLAIN_EVERY_S = 10.0


def raise_limit() -> int:
    """This process's limit on open files, which is the hard one from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # more than the kernel gives to anybody
        return soft
    return hard


class Descriptors:
    """Knows the limit; `count` says how many sockets are open, or about to be."""

    def __init__(self, limit: int, count: Callable[[], int]) -> None:
        self.limit = limit
        self._count = count
        reserve = min(_RESERVE, limit // 4)
        self._most_for_requests = limit - reserve - _A_REQUEST
        self._most_for_clients = limit - reserve // 2
        self._complain_after = 0.0

    @property
    def num_requests(self) -> int:
        """So many can be served at once, if each comes over a connection of its own and P has long been through."""
        return self._most_for_requests // 2

    def check_request(self) -> None:
        """Raises TooBusyError if there isn't room for one more."""
        if self._count() > self._most_for_requests:
            raise self._full()

    def check_client(self) -> None:
        """Raises TooBusyError if one connection more is too many."""
        if self._count() > self._most_for_clients:
            raise self._full()

    def _full(self) -> TooBusyError:
        now = monotonic()
        if now >= self._complain_after:
            self._complain_after = now + _COMPLAIN_EVERY_S
            logger.warning(
                'open files run out sockets=%d limit=%d remedy="raise the hard limit: LimitNOFILE, ulimit -n"',
                self._count(),
                self.limit,
            )
        return TooBusyError("the proxy has as many connections open as it may have; try again later")
