"""A streamed completion, timed by the client's clock."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any

from twolane.errors import StartError


@dataclass(frozen=True)
class Timed:
    """One answer. `ttft_s`: request sent to first token."""

    text: str
    usage: dict[str, int]
    ttft_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first."""
        return max(0, self.usage.get("completion_tokens", 0) - 1) / max(1e-9, self.total_s - self.ttft_s)


def stream(address: str, path: str, body: dict[str, Any], timeout_s: float) -> Timed:
    """StartError unless a whole stream comes: status 200, usage, and the last word."""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    began_s = time.monotonic()
    first_s, events, done = 0.0, [], False
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise StartError(f"status {answer.status}: {answer.read(500)!r}")
        for line in answer:
            if line.startswith(b"data: {"):
                first_s = first_s or time.monotonic()
                events.append(json.loads(line[6:]))
            done = done or line.startswith(b"data: [DONE]")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise StartError(f"no whole answer: {error!r}") from error
    finally:
        connection.close()
    return _timed(events, done, first_s - began_s, time.monotonic() - began_s)


def _timed(events: list[dict[str, Any]], done: bool, ttft_s: float, total_s: float) -> Timed:
    usages = [event["usage"] for event in events if event.get("usage")]
    if not done or not usages:
        raise StartError(f"the stream ended after {len(events)} events without its last word: {str(events[-1:])[:300]}")
    pieces = [
        choice.get("text") or choice.get("delta", {}).get("content") or "" for e in events for choice in e["choices"]
    ]
    return Timed("".join(pieces), usages[-1], ttft_s, total_s)
