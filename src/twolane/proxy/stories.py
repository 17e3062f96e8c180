"""The stories of the last requests: the proxy's own moments, and what both engines tell of each transfer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from twolane.errors import NotFoundError
from twolane.protocol import LANES, Role, Story, StoryEvent, clock_identity

if TYPE_CHECKING:
    from twolane.proxy.stats import RequestRecord

NUM_KEPT = 1000

# By role and the engine's own word (connector.story.Event); what isn't here isn't kept. Where the transport doesn't
# know when the last layer was through, as on the CPU, the pass is through when it was launched.
ENGINE_EVENTS: dict[tuple[Role, str], str] = {
    ("P", "scheduled"): "prefill_accepted",
    ("P", "launched"): "prefill_launched",
    ("P", "computed"): "prefill_computed",
    ("P", "announced"): "announce_heard",
    ("P", "pushed"): "pushed",
    ("D", "allocated"): "allocated",
    ("D", "announce_sent"): "announced",
    ("D", "landed"): "landed",
    ("D", "stepped"): "first_step",
    ("D", "ended"): "last_token",
}
# Also in which order those stand that have the same time.
ORDER = (
    *("received", "admitted", "prefill_sent", "decode_sent", "prefill_accepted", "allocated", "announced"),
    *("announce_heard", "prefill_computed", "prefill_answered", "pushed", "landed", "first_step", "first_byte"),
    *("last_token", "last_byte"),
)
BY = {name: LANES[role] for (role, _), name in ENGINE_EVENTS.items()}


@dataclass(frozen=True)
class Moment:
    """`by`: whose clock saw it: proxy, prefill or decode. `at_s`: monotonic."""

    name: str
    by: str
    at_s: float


@dataclass
class Heard:
    """What came of the engines' words."""

    events: int = 0  # kept
    unknown: int = 0  # of no request that is kept, or not from the instance that has it
    impossible: int = 0  # before the request came, or in the future
    other_clock: int = 0  # from a machine whose times can't be compared with ours
    dropped_by_engines: int = 0  # never sent, as they say themselves


class Stories:
    """Owns the records of the last `num_kept` requests that have ended, and finds those in flight by their transfer."""

    def __init__(self, num_kept: int = NUM_KEPT) -> None:
        self._num_kept = num_kept
        self._ended: deque[RequestRecord] = deque()
        self._by_transfer: dict[str, RequestRecord] = {}
        self._clock = clock_identity()
        self._heard = Heard()

    def begins(self, record: RequestRecord, transfer_id: str) -> None:
        """An attempt: what is known of an earlier one is no longer this request's story."""
        if record.transfer_id:
            self._by_transfer.pop(record.transfer_id, None)
            record.engine_moments = None
        record.transfer_id = transfer_id
        if transfer_id:
            self._by_transfer[transfer_id] = record

    def ended(self, record: RequestRecord) -> None:
        self._ended.append(record)
        if len(self._ended) > self._num_kept:
            self._by_transfer.pop(self._ended.popleft().transfer_id, None)

    def recent(self, count: int) -> list[RequestRecord]:
        """The last that ended, oldest first."""
        return list(islice(self._ended, max(0, len(self._ended) - count), None))

    def hear(self, story: Story, now: float) -> None:
        """Keeps what can be true; counts the rest."""
        heard = self._heard
        heard.dropped_by_engines += story.num_dropped
        if story.clock != self._clock:
            heard.other_clock += len(story.events)
            return
        for event in story.events:
            name = ENGINE_EVENTS.get((story.role, event.event))
            record = self._by_transfer.get(event.transfer_id)
            if record is None or not _has(record, story):
                heard.unknown += 1
            elif name is None:
                continue
            elif not record.started_at <= event.at_s <= now:
                heard.impossible += 1
            else:
                heard.events += 1
                _keep(record, name, event)

    def find(self, wanted: str) -> RequestRecord | None:
        """By transfer id, or by request id: of several with the same one, the newest that has ended."""
        known = self._by_transfer.get(wanted)
        if known is not None:
            return known
        return next((record for record in self._all() if record.request_id == wanted), None)

    def _all(self) -> Iterator[RequestRecord]:
        yield from reversed(self._ended)
        yield from reversed(self._by_transfer.values())

    def story(self, wanted: str) -> dict[str, Any]:
        """Raises NotFoundError."""
        record = self.find(wanted)
        if record is None:
            raise NotFoundError(
                f"no request is known as {wanted!r}, neither by its request id nor by its transfer id: "
                f"the last {self._num_kept} requests are kept, and {len(self._ended)} are there"
            )
        return record.as_dict() | {"events": [_as_dict(moment, record) for moment in moments_of(record)]}

    def as_dict(self) -> dict[str, int]:
        return asdict(self._heard) | {"kept": len(self._ended)}


def _has(record: RequestRecord, story: Story) -> bool:
    return story.http_address == (record.prefill if story.role == "P" else record.decode)


def _keep(record: RequestRecord, name: str, event: StoryEvent) -> None:
    """Said twice, the later counts: a prompt's last chunk is launched after its first."""
    moments = record.engine_moments
    if moments is None:
        moments = record.engine_moments = {}
    moments[name] = max(event.at_s, moments.get(name, event.at_s))


def moments_of(record: RequestRecord) -> list[Moment]:
    """All that is known, in order of time."""
    told = dict(record.engine_moments or {})
    launched = told.pop("prefill_launched", None)
    if launched is not None:
        told.setdefault("prefill_computed", launched)
    moments = [Moment(name, BY[name], at_s) for name, at_s in told.items()]
    return sorted([*_own(record), *moments], key=lambda moment: (moment.at_s, ORDER.index(moment.name)))


def _own(record: RequestRecord) -> Iterable[Moment]:
    own = {
        "received": record.started_at,
        "admitted": record.admitted_at,
        "prefill_sent": record.prefill_sent_at,
        "decode_sent": record.decode_sent_at,
        "prefill_answered": record.prefill_done_at,
        "first_byte": record.first_byte_at,
        "last_byte": record.ended_at if record.outcome in {"ok", "rejected"} else None,
    }
    return [Moment(name, "proxy", at_s) for name, at_s in own.items() if at_s is not None]


def _as_dict(moment: Moment, record: RequestRecord) -> dict[str, object]:
    return {"name": moment.name, "by": moment.by, "ms": record.ms(moment.at_s)}
