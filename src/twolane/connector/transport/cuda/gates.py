"""D's gates: words of its GPU's memory, on which that GPU waits for the last byte of a transfer (base.Gate).

D launches the step that reads the bytes before they are there, and P's own kernel sets it going: no thread of either
side has a part in it. A P that dies or hangs opens nothing; D does then, when it knows of the end, and in any case
after HELD_AT_MOST_S.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import torch

from twolane.connector.messages import GateWord
from twolane.connector.transport.cuda import driver
from twolane.connector.transport.cuda.kernel import gate_value

NUM_GATES = 1024
GATES_BYTES = 8 * NUM_GATES

# Longer than any way to give a transfer up (head_start.LIMIT_S, a grace). All who could open a gate may themselves wait
# for a GPU that stands before it: some of CUDA's calls wait for everything.
HELD_AT_MOST_S = 5.0


class Gates:
    """Mutable state: which words are free, and which are held. The stream is ours alone: a gate opens while all others
    wait. Used under the agent's lock, but for the thread that looks after those that are held too long."""

    def __init__(self, base: int, device: torch.device, stream: torch.cuda.Stream) -> None:
        """`base`: of GATES_BYTES of this device's memory, all zero. Raises driver.DriverError where a GPU can't wait
        for a word."""
        self._base = base
        self._device = device
        self._stream = stream
        self._free = list(range(NUM_GATES))
        self._values = itertools.count(1)
        self._held: set[GateWord] = set()
        self._watched: SimpleQueue[tuple[GateWord, float] | None] = SimpleQueue()
        self._closing = threading.Event()
        driver.write_word(self._address(0), gate_value(0), stream)
        driver.wait_word(self._address(0), gate_value(0), stream)
        self._thread = threading.Thread(target=self._watch, name="twolane-gates", daemon=True)
        self._thread.start()

    def _address(self, index: int) -> int:
        return self._base + 8 * index

    def take(self, is_kept: Callable[[], bool]) -> WordGate | None:
        """None: all are taken. `is_kept`: whether P opens gates."""
        if not self._free:
            return None
        return WordGate(self, GateWord(self._free.pop(0), next(self._values)), is_kept)

    def close(self) -> None:
        self._closing.set()
        self._watched.put(None)
        self._thread.join()

    # -- of the gates

    def hold(self, word: GateWord) -> None:
        """Engine's thread."""
        self._held.add(word)
        self._watched.put((word, time.monotonic() + HELD_AT_MOST_S))
        stream = torch.cuda.current_stream(self._device)
        driver.wait_word(self._address(word.index), gate_value(word.value), stream)

    def give_back(self, word: GateWord) -> None:
        if word in self._held:
            self._open(word)
            self._held.discard(word)
        self._free.append(word.index)

    def _open(self, word: GateWord) -> None:
        driver.bind(self._device)
        driver.write_word(self._address(word.index), gate_value(word.value), self._stream)

    # -- its own thread

    def _watch(self) -> None:
        """Words come in the order of their deadlines."""
        while (watched := self._watched.get()) is not None:
            word, end_s = watched
            self._closing.wait(max(0.0, end_s - time.monotonic()))
            if word in self._held:
                self._open(word)


class WordGate:
    """base.Gate."""

    def __init__(self, gates: Gates, word: GateWord, is_kept: Callable[[], bool]) -> None:
        self.word = word
        self._gates = gates
        self._is_kept = is_kept

    @property
    def is_kept(self) -> bool:
        return self._is_kept()

    def hold(self) -> None:
        self._gates.hold(self.word)

    def close(self) -> None:
        self._gates.give_back(self.word)
