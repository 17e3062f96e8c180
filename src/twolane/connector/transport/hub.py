"""All transports of one worker, and the choice among them at the handshake."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, Protocol

from twolane.connector.agent import logger
from twolane.connector.messages import TransportOffer
from twolane.connector.transport.base import Gate, Items, ReceiveChannel, SendChannel, Ticket
from twolane.connector.transport.copier import Copier
from twolane.connector.transport.pace import Forecast
from twolane.errors import TransferError


class SendWay(Protocol):
    """One transport, P's half."""

    name: str

    def open(self, data: dict[str, Any], pid: int, host: str) -> tuple[SendChannel, dict[str, Any]]:
        """A channel to the D worker that offered `data`, and what it needs to attach. Raises TransferError."""
        ...

    def poll(self) -> None:
        """What it does beside the copier."""
        return

    def take_refused(self) -> int:
        """Frames that were nobody's, since the last call."""
        return 0

    def close(self) -> None: ...


class ReceiveHalf(Protocol):
    """One transport, D's half towards one P worker. See base.ReceiveChannel."""

    name: str
    direct: bool

    def offer(self) -> dict[str, Any]: ...

    def attach(self, data: dict[str, Any], pid: int) -> None: ...

    def gate(self) -> Gate | None:
        """Where P writes to D's memory by itself."""
        return None

    def read(self, slot: int, items: Items) -> Ticket: ...

    def discard(self, slot: int, size_bytes: int) -> Ticket:  # noqa: ARG002
        """For those where nothing is left of bytes that nobody reads."""
        return Ticket(0, slot, done=True)

    def revoke(self) -> float: ...

    def close(self) -> None: ...


class ReceiveWay(Protocol):
    """One transport, D's half."""

    name: str

    def open(self) -> ReceiveHalf: ...

    def poll(self) -> None:
        """What it does beside the copier."""
        return

    def take_refused(self) -> int:
        """Frames that were nobody's, since the last call."""
        return 0

    def close(self) -> None: ...


class Senders:
    """base.SendTransports over some ways; those the D worker names first are tried first."""

    def __init__(self, copier: Copier, ways: list[SendWay]) -> None:
        self._copier = copier
        self._ways = {way.name: way for way in ways}
        self.begin_pass = copier.begin_pass
        self.layer_done = copier.layer_done
        self.fence = copier.fence
        self.quiesce = copier.quiesce

    @property
    def num_passes(self) -> int:
        return self._copier.num_passes

    @property
    def forecasts(self) -> Sequence[Forecast]:
        return self._copier.forecasts

    def open(self, offers: list[TransportOffer], pid: int, host: str) -> tuple[SendChannel, TransportOffer]:
        reasons = []
        for offer in offers:
            if way := self._ways.get(offer.name):
                try:
                    channel, data = way.open(offer.data, pid, host)
                except TransferError as error:
                    reasons.append(f"{offer.name}: {error}")
                    continue
                for reason in reasons:
                    logger.warning("transport not used %s; %s is", reason, offer.name)
                return channel, TransportOffer(offer.name, data)
        offered, had = ", ".join(offer.name for offer in offers), ", ".join(self._ways)
        raise TransferError("; ".join(reasons) or f"no transport in common (decode: {offered}; prefill: {had})")

    def poll(self) -> None:
        self._copier.poll()
        for way in self._ways.values():
            way.poll()

    def take_refused(self) -> int:
        return sum(way.take_refused() for way in self._ways.values())

    def close(self) -> None:
        for way in self._ways.values():
            way.close()
        self._copier.close()


class Channel:
    """base.ReceiveChannel: one half a transport, until P has chosen."""

    def __init__(self, halves: list[ReceiveHalf]) -> None:
        self._halves = {half.name: half for half in halves}
        self._chosen: ReceiveHalf | None = None

    @property
    def offers(self) -> list[TransportOffer]:
        return [TransportOffer(half.name, half.offer()) for half in self._halves.values()]

    @property
    def direct(self) -> bool:
        return any(half.direct for half in self._halves.values())

    def attach(self, chosen: TransportOffer, pid: int) -> None:
        half = self._halves.get(chosen.name)
        if half is None:
            raise TransferError(f"the prefill worker chose {chosen.name!r}, which was not offered")
        half.attach(chosen.data, pid)
        for other in [name for name in self._halves if name != chosen.name]:
            self._halves.pop(other).close()
        self._chosen = half

    def gate(self) -> Gate | None:
        return next((gate for half in self._halves.values() if (gate := half.gate())), None)

    def read(self, slot: int, items: Items) -> Ticket:
        if self._chosen is None:
            raise TransferError("a push came before the handshake")
        return self._chosen.read(slot, items)

    def discard(self, slot: int, size_bytes: int) -> Ticket:
        if self._chosen is None:
            raise TransferError("a push came before the handshake")
        return self._chosen.discard(slot, size_bytes)

    def revoke(self) -> float:
        return max(half.revoke() for half in self._halves.values())

    def close(self) -> None:
        for half in self._halves.values():
            half.close()


class Receivers:
    """base.ReceiveTransports over some ways, best first."""

    def __init__(self, copier: Copier, ways: list[ReceiveWay]) -> None:
        self._copier = copier
        self._ways = ways
        self.fence = copier.passes

    def open(self, without: Container[str] = ()) -> ReceiveChannel:
        ways = [way for way in self._ways if way.name not in without] or self._ways
        return Channel([way.open() for way in ways])

    def poll(self) -> None:
        self._copier.poll()
        for way in self._ways:
            way.poll()

    def take_refused(self) -> int:
        return sum(way.take_refused() for way in self._ways)

    def close(self) -> None:
        for way in self._ways:
            way.close()
        self._copier.close()
