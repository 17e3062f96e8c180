"""P's table of transfers: which request offers what, which announces came early, which transfers are over.

Pure: no sockets, no clock. Owner: PrefillAgent, under its lock.
"""

from __future__ import annotations

from dataclasses import dataclass

from twolane.connector.messages import Announce
from twolane.connector.outgoing import Outgoing
from twolane.connector.plan import Offer


@dataclass(frozen=True)
class Early:
    """An Announce that came before the request itself was seen on P."""

    announce: Announce
    peer: bytes
    came_at_s: float
    until_s: float


class Offers:
    """Mutable state: transfers by request and by id, early announces, and why each ended transfer ended.

    What has ended is remembered for `memory_s`, so that a late word about it gets an answer instead of a wait.
    """

    def __init__(self, block_size: int, num_layers: int, memory_s: float) -> None:
        self._block_size = block_size
        self._num_layers = num_layers
        self._memory_s = memory_s
        self._by_req: dict[str, Outgoing] = {}
        self._by_id: dict[str, Outgoing] = {}
        self._early: dict[str, Early] = {}
        self._gone: dict[str, tuple[str, float]] = {}  # transfer_id -> (why, remembered until)
        self._finished: set[str] = set()  # requests that vLLM named as finished, not yet taken

    def add(self, offer: Offer) -> tuple[Outgoing, Early | None]:
        """A request came in. Returns its transfer, ended already if nobody wants it, and the announce that waits."""
        sizes = (self._block_size, self._num_layers)
        outgoing = Outgoing(offer.req_id, offer.transfer_id, offer.digest, *sizes, offer.story)
        self._by_req[offer.req_id] = outgoing
        if offer.transfer_id in self._by_id:
            outgoing.end("transfer_id used twice")
            return outgoing, None
        self._by_id[offer.transfer_id] = outgoing
        if gone := self._gone.pop(offer.transfer_id, None):
            outgoing.end(gone[0])
        return outgoing, self._early.pop(offer.transfer_id, None)

    def of_request(self, req_id: str) -> Outgoing | None:
        return self._by_req.get(req_id)

    def of_transfer(self, transfer_id: str) -> Outgoing | None:
        return self._by_id.get(transfer_id)

    def all(self) -> list[Outgoing]:
        return list(self._by_id.values())

    def why_gone(self, transfer_id: str) -> str | None:
        gone = self._gone.get(transfer_id)
        return gone[0] if gone else None

    def announce_early(self, announce: Announce, peer: bytes, now_s: float) -> None:
        self._early[announce.transfer_id] = Early(announce, peer, now_s, now_s + self._memory_s)

    def cancel(self, transfer_id: str, reason: str, now_s: float) -> Outgoing | None:
        """D doesn't want it, whether P has seen the request or not. Returns the transfer if P has."""
        self._early.pop(transfer_id, None)
        outgoing = self._by_id.get(transfer_id)
        if outgoing is not None:
            outgoing.end(reason)
        else:
            self._remember(transfer_id, reason, now_s)
        return outgoing

    def why_not(self, transfer_id: str, peer: bytes) -> str | None:
        """Why this peer waits for the transfer in vain; None if it doesn't."""
        early = self._early.get(transfer_id)
        if early is not None and early.peer == peer:
            return None
        outgoing = self._by_id.get(transfer_id)
        if outgoing is not None and not outgoing.is_over and outgoing.peer == peer:
            return None
        if outgoing is not None and outgoing.ended is not None:
            return outgoing.ended or "already sent"
        return self.why_gone(transfer_id) or "no announce of it came"

    def take_finished(self, finished_req_ids: set[str], now_s: float) -> set[str]:
        """Requests that vLLM named as finished, now or before, and whose transfer is over: each once."""
        self._finished |= finished_req_ids & self._by_req.keys()
        over = {req_id for req_id in self._finished if self._by_req[req_id].is_over}
        self._finished -= over
        for req_id in over:
            outgoing = self._by_req.pop(req_id)
            if self._by_id.get(outgoing.transfer_id) is outgoing:
                del self._by_id[outgoing.transfer_id]
                self._remember(outgoing.transfer_id, outgoing.ended or "already sent", now_s)
        return over

    def forget_peer(self, peer: bytes) -> list[Outgoing]:
        """The peer is gone: drops its early announces, returns the open transfers it had announced."""
        self._early = {key: early for key, early in self._early.items() if early.peer != peer}
        return [outgoing for outgoing in self._by_id.values() if outgoing.peer == peer and outgoing.ended is None]

    def expire(self, now_s: float) -> list[Early]:
        """Forgets what is old; returns the early announces whose request never came."""
        self._gone = {key: gone for key, gone in self._gone.items() if gone[1] >= now_s}
        overdue = [early for early in self._early.values() if early.until_s < now_s]
        for early in overdue:
            del self._early[early.announce.transfer_id]
        return overdue

    @property
    def is_empty(self) -> bool:
        """No transfer is open and no announce waits."""
        return not (self._by_req or self._by_id or self._early)

    def _remember(self, transfer_id: str, reason: str, now_s: float) -> None:
        self._gone[transfer_id] = (reason, now_s + self._memory_s)
