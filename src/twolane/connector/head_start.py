"""D's head start: vLLM takes a request up some milliseconds before its last byte, and waits for that byte where the
forward pass would begin.

vLLM needs a while from hearing that a request's KV is there until it computes with it: it sleeps 1 ms after a step
that computed nothing, hears of a step one step later, and takes up the request with all its token ids. All of that can
happen while P computes its last layers. P says when it will be through (messages.Soon), D's workers say that it is
soon, and the scheduler takes the request up as if the KV were there (`HeadStarts.commit`); the step that computes with
waits (DecodeAgent.hold_started): the GPU does, at a gate that P's last kernel opens, where P writes to its memory
(transport/cuda/gates.py), so that the launch is over by then, too; else the engine's thread before the launch. Only an
engine that computes nothing else does so: no stream waits for another's KV.

If the KV doesn't come, the step computes with what isn't there. Its token must not get out, and nor must that of the
step behind it, which vLLM has launched by then: take_back.TakesBack sees to that, and without it there is no head
start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

# What vLLM does per token of the prompt when it takes the request up: 1.5 ms for 8,192 ids (docs/LOG.md), and more.
PER_TOKEN_S = 0.3e-6
OVERDUE_S = 0.05  # so late, a forecast is worth nothing
LIMIT_S = 1.0  # how long a step waits for the last byte before P's permission is revoked
GIVE_UP_S = 30.0  # and how long then until nothing can land any more: longer than any grace
POOR_WAIT_S = 0.05  # a P that let D wait so long gives no head start
POOR_FOR_S = 10.0  # for so long


class HeadStarts:
    """In the scheduler: who was taken up early. Each request passes through once.

    told       some of the ranks expect its KV soon
    committed  all do: vLLM believes that it is there
    over       it landed, or failed; the workers say `received`, as always, and vLLM doesn't hear it a second time
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._told: Counter[str] = Counter()
        self._committed: dict[str, bool] = {}  # whether the request has ended: then its blocks wait for the workers
        self.is_allowed = False

    def commit(self, told: Counter[str], received: set[str], waiting: Container[str]) -> set[str]:
        """One step's output. Returns what vLLM is to hear as received. `told`: how many ranks said that it is soon.
        `waiting`: requests that wait for KV."""
        heard = {req_id for req_id in received if self._committed.pop(req_id, True)}
        for req_id in received:
            self._told.pop(req_id, None)
        for req_id, count in told.items():
            self._told[req_id] += count
            if self._told[req_id] == self._num_ranks:
                del self._told[req_id]
                if req_id in waiting and req_id not in received:
                    self._committed[req_id] = False
                    heard.add(req_id)
        return heard

    def started(self, req_ids: list[str]) -> list[str]:
        """Those whose step begins now and must wait for the last byte."""
        return [req_id for req_id in req_ids if req_id in self._committed]

    def ended(self, req_id: str) -> bool:
        """The request has ended. Whether P may still write to its blocks: they are free when the workers say so."""
        self._told.pop(req_id, None)
        if req_id not in self._committed:
            return False
        self._committed[req_id] = True
        return True
