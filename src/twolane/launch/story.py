"""`twolane trace`: a request's story as the proxy tells it, drawn as a timeline."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from twolane.errors import TwoLaneError

ANSWER_TIMEOUT_S = 10.0
BAR_WIDTH = 40

WORDS = {
    "received": "the request is whole",
    "admitted": "its turn came",
    "prefill_sent": "P's leg is on its way",
    "decode_sent": "D's leg is on its way",
    "prefill_accepted": "P's scheduler took it up, its first step begins",
    "allocated": "D's scheduler gave it blocks",
    "announced": "D told P where they are",
    "announce_heard": "P knows",
    "prefill_computed": "P computed the last layer",
    "prefill_answered": "P's answer is whole",
    "pushed": "P pushed the last byte",
    "landed": "the last byte is in D's blocks",
    "first_step": "D's first step with it was launched",
    "first_byte": "the first byte from D",
    "last_token": "D's scheduler has the last token",
    "last_byte": "the client has the last byte",
}
STAGES = (  # name, from, to
    ("queue", "received", "admitted"),
    ("P's queue", "prefill_sent", "prefill_accepted"),
    ("prefill", "prefill_accepted", "prefill_computed"),
    ("handoff", "prefill_computed", "landed"),
    ("first token", "landed", "first_byte"),
    ("decode", "first_byte", "last_byte"),
)
_NOT_TOLD = ("to first byte", "decode_sent", "first_byte")  # where the engines told nothing


class NoStoryError(TwoLaneError):
    """There is no story to show; the message says why, and what to do."""


@dataclass(frozen=True)
class Asked:
    """The proxy, as this process reaches it."""

    address: str
    key: str = ""

    def get(self, path: str) -> Any:
        """The parsed answer. Raises NoStoryError."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        connection = http.client.HTTPConnection(self.address, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            status, body = answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoStoryError(
                f"no proxy answers at {self.address} ({error}): start one with `twolane up`, "
                "or name its port with --http-proxy-port"
            ) from error
        finally:
            connection.close()
        if status != 200:
            raise NoStoryError(_why(status, body))
        return body

    def story(self, wanted: str) -> dict[str, Any]:
        """Of the newest request that has ended and that instances worked on, if `wanted` is empty."""
        found: dict[str, Any] = self.get(f"/stats/requests/{quote(wanted or self._newest(), safe='')}")
        return found

    def _newest(self) -> str:
        for record in reversed(self.get("/stats").get("recent", [])):
            if record["attempts"] and record["admitted_ms"] is not None:
                return str(record["transfer_id"] or record["request_id"])
        raise NoStoryError("the proxy has answered no request yet: send one, such as by `twolane test`, and ask again")


def _why(status: int, body: Any) -> str:
    said = body["error"]["message"] if isinstance(body, dict) and "error" in body else f"status {status}"
    if status == 401:
        return f"the proxy wants a key ({said}): give one with --api-key"
    return f"{said}. `twolane trace` without an id shows the newest; the proxy's /stats lists the last hundred"


def stages_of(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(name, start, end) in ms, as far as both ends are known."""
    at_ms = {event["name"]: float(event["ms"]) for event in events}
    stages = STAGES if "landed" in at_ms else (*STAGES, _NOT_TOLD)
    known = [(name, at_ms[start], at_ms[end]) for name, start, end in stages if start in at_ms and end in at_ms]
    return sorted(known, key=lambda stage: stage[1])


def print_story(story: Mapping[str, Any], out: Console) -> None:
    events = story["events"]
    out.print(f"request {story['request_id']}, transfer {story['transfer_id'] or '-'}", markup=False)
    lanes = f"prefill {story['prefill'] or '-'}, decode {story['decode'] or '-'}"
    alone = f", D alone because: {story['alone_because']}" if story["alone_because"] else ""
    total = "running" if story["total_ms"] is None else f"{story['total_ms']:.2f} ms"
    out.print(f"{story['route']}, {lanes}{alone}", markup=False)
    out.print(f"{story['outcome']}, status {story['status']}, {total}, attempts {story['attempts']}\n", markup=False)
    out.print(_timeline(events))
    if stages := stages_of(events):
        out.print()
        out.print(_bars(stages, max(float(event["ms"]) for event in events)))


def _timeline(events: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("ms", "+ms"):
        table.add_column(name, justify="right")
    for name in ("by", "event", ""):
        table.add_column(name)
    before_ms = 0.0
    for event in events:
        ms = float(event["ms"])
        words = WORDS.get(event["name"], "")
        table.add_row(f"{ms:.2f}", f"{ms - before_ms:.2f}", event["by"], event["name"], words)
        before_ms = ms
    return table


def _bars(stages: Sequence[tuple[str, float, float]], total_ms: float) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, start_ms, end_ms in stages:
        bar = Bar(max(total_ms, 1e-3), start_ms, end_ms, width=BAR_WIDTH)
        table.add_row(name, f"{end_ms - start_ms:>10.2f} ms", bar)
    return table
