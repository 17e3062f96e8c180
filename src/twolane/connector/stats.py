"""What one worker counted since it was last asked; the connector passes it on to vLLM's metrics."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

# Counter name -> number; failure counter -> cause -> number; histogram -> seconds of each observation.
Counts = dict[str, int | dict[str, int] | list[float]]


class Cause(enum.StrEnum):
    """Why a transfer failed: closed, since it is a metric's label. The log line has the details."""

    MISMATCH = "mismatch"  # KV formats, prompts, or numbers of blocks differ
    DUPLICATE = "duplicate"  # the transfer_id is in use
    UNREACHABLE = "unreachable"  # the other side's address is none, or its transport can't be attached
    PEER_DIED = "peer_died"
    PEER_SILENT = "peer_silent"  # no word for peer_timeout_s; also where nobody listens
    TIMED_OUT = "timed_out"  # no block for transfer_timeout_s
    ABORTED = "aborted"  # the other side gave it up, and counts why; or it connected anew
    ENDED_EARLY = "ended_early"  # P: its request ended before the prompt was computed
    CANCELLED = "cancelled"  # D doesn't want it any more: mostly, its client left
    LEASE_EXPIRED = "lease_expired"  # P: D never came for the blocks
    PROTOCOL = "protocol"  # a message that makes no sense: unreadable, or a gap in what was pushed


@dataclass
class Counters:
    """Owner: a side, under its agent's lock; its parts count here too. Fields that end in `_seconds` are histograms,
    the others `..._total`."""

    kv_sent_transfers: int = 0
    kv_sent_tokens: int = 0
    kv_sent_bytes: int = 0
    kv_send_failures: dict[str, int] = field(default_factory=dict)
    kv_leases_expired: int = 0
    kv_dropped_messages: int = 0
    kv_received_transfers: int = 0
    kv_received_tokens: int = 0
    kv_received_bytes: int = 0
    kv_receive_failures: dict[str, int] = field(default_factory=dict)
    kv_recomputed_tokens: int = 0
    kv_head_starts: int = 0
    kv_refused_peers: int = 0
    kv_refused_frames: int = 0
    kv_refused_messages: int = 0
    kv_refused_connections: int = 0
    kv_ended_connections: int = 0
    kv_computed_to_sent_seconds: list[float] = field(default_factory=list)
    kv_computed_to_landed_seconds: list[float] = field(default_factory=list)
    kv_first_block_seconds: list[float] = field(default_factory=list)
    kv_wait_seconds: list[float] = field(default_factory=list)

    def send_failed(self, cause: Cause) -> None:
        self.kv_send_failures[cause.value] = self.kv_send_failures.get(cause.value, 0) + 1

    def receive_failed(self, cause: Cause) -> None:
        self.kv_receive_failures[cause.value] = self.kv_receive_failures.get(cause.value, 0) + 1

    def take(self) -> Counters:
        """What was counted since the last call."""
        taken = Counters()
        taken.__dict__, self.__dict__ = self.__dict__, taken.__dict__
        return taken

    def nonzero(self) -> Counts:
        return {name: value for name, value in vars(self).items() if value}


HELP = {
    "kv_sent_transfers": "Transfers of which this prefill instance sent every byte.",
    "kv_sent_tokens": "Tokens whose KV this prefill instance sent.",
    "kv_sent_bytes": "Bytes of KV this prefill instance sent.",
    "kv_send_failures": "Transfers that this prefill instance didn't send to the end, by cause.",
    "kv_leases_expired": "Transfers whose decode instance never came back; their blocks were freed.",
    "kv_dropped_messages": "Messages this prefill instance lost on purpose: a fault for tests.",
    "kv_received_transfers": "Transfers of which every byte landed in this decode instance's blocks.",
    "kv_received_tokens": "Tokens whose KV landed in this decode instance's blocks.",
    "kv_received_bytes": "Bytes of KV that landed in this decode instance's blocks.",
    "kv_receive_failures": "Transfers that this decode instance didn't receive to the end, by cause.",
    "kv_recomputed_tokens": "Prompt tokens this decode instance computed because a transfer failed.",
    "kv_head_starts": "Requests that this decode instance took up before their last byte was there, and waited for it.",
    "kv_refused_peers": "Connections on which no KV can move: the KV caches don't match, or P refuses D's key.",
    "kv_refused_frames": "Data frames and connections (transport tcp) that were nobody's, or not what was due.",
    "kv_refused_messages": "Control messages that were not understood; they change nothing.",
    "kv_refused_connections": "Control connections without the deployment's key, or that never said who they are.",
    "kv_ended_connections": "Control connections that ended: D left, a link was cut, a message was too long.",
    "kv_computed_to_sent_seconds": "From P's last layer to the last byte read out of P's blocks.",
    "kv_computed_to_landed_seconds": "From P's last layer to the last byte in D's blocks; P and D on one host only.",
    "kv_first_block_seconds": "From D's announce to the first bytes in D's blocks.",
    "kv_wait_seconds": "From D's announce to the last byte in D's blocks: how long the request waited.",
}
BY_CAUSE = frozenset(("kv_send_failures", "kv_receive_failures"))
# Upper bounds, in seconds. A handoff's tail takes fractions of a millisecond; a wait has P's queue and prefill in it.
_TAIL = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)
_WAIT = (1e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BUCKETS = {
    "kv_computed_to_sent_seconds": _TAIL,
    "kv_computed_to_landed_seconds": _TAIL,
    "kv_first_block_seconds": _WAIT,
    "kv_wait_seconds": _WAIT,
}


def add_up(into: Counts, more: Counts) -> None:
    """Adds `more` to `into`, which may come from another step or another worker."""
    for name, value in more.items():
        have = into.get(name)
        if isinstance(value, int):
            into[name] = value + (have if isinstance(have, int) else 0)
        elif isinstance(value, list):
            into[name] = [*(have if isinstance(have, list) else ()), *value]
        else:
            mine = dict(have) if isinstance(have, dict) else {}
            into[name] = mine | {cause: count + mine.get(cause, 0) for cause, count in value.items()}


def summary(counts: Counts) -> dict[str, int | float]:
    """One number a name, for a log line."""
    flat: dict[str, int | float] = {}
    for name, value in counts.items():
        if isinstance(value, int):
            flat[name] = value
        elif isinstance(value, list):
            stem = name.removesuffix("_seconds")
            flat[f"{stem}_mean_ms"] = round(sum(value) / len(value) * 1e3, 3)
            flat[f"{stem}_max_ms"] = round(max(value) * 1e3, 3)
        else:
            flat |= {f"{name}_{cause}": count for cause, count in value.items()}
    return flat
