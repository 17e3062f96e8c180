"""Messages are numbered on each connection, both ways: what comes late or twice counts as lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from twolane.connector.messages import Message

M = TypeVar("M", bound=Message)


@dataclass(eq=False)
class Numbering:
    """Of the messages on one connection, both ways."""

    heard: int = 0  # number of the last message
    said: int = 0

    def stamp(self, message: M) -> M:
        """The next message, with its number."""
        self.said += 1
        return msgspec.structs.replace(message, number=self.said)

    def is_news(self, message: Message) -> bool:
        """False for one that comes late or twice: it counts as lost. One without a number is always news."""
        if not message.number:
            return True
        is_news = message.number > self.heard
        self.heard = max(self.heard, message.number)
        return is_news
