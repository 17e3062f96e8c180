"""What one worker counted. Cumulative; the connector reports the differences to vLLM's metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Owner: an agent, under its lock. Each field is exported as `twolane_{field}_total`."""

    kv_sent_transfers: int = 0
    kv_sent_tokens: int = 0
    kv_sent_bytes: int = 0
    kv_send_failures: int = 0
    kv_leases_expired: int = 0
    kv_dropped_messages: int = 0
    kv_received_transfers: int = 0
    kv_received_tokens: int = 0
    kv_received_bytes: int = 0
    kv_receive_failures: int = 0
    kv_recomputed_tokens: int = 0

    def since(self, earlier: Counters) -> dict[str, int]:
        """What was added, fields without a change left out."""
        now, then = asdict(self), asdict(earlier)
        return {key: now[key] - then[key] for key in now if now[key] != then[key]}

    def copy(self) -> Counters:
        return Counters(**asdict(self))


HELP = {
    "kv_sent_transfers": "Transfers of which this prefill instance sent every byte.",
    "kv_sent_tokens": "Tokens whose KV this prefill instance sent.",
    "kv_sent_bytes": "Bytes of KV this prefill instance sent.",
    "kv_send_failures": "Transfers this prefill instance gave up, whatever the cause.",
    "kv_leases_expired": "Transfers whose decode instance never came back; their blocks were freed.",
    "kv_dropped_messages": "Messages this prefill instance lost on purpose: a fault for tests.",
    "kv_received_transfers": "Transfers of which every byte landed in this decode instance's blocks.",
    "kv_received_tokens": "Tokens whose KV landed in this decode instance's blocks.",
    "kv_received_bytes": "Bytes of KV that landed in this decode instance's blocks.",
    "kv_receive_failures": "Transfers that failed; this decode instance computed what was missing.",
    "kv_recomputed_tokens": "Prompt tokens this decode instance computed because a transfer failed.",
}
