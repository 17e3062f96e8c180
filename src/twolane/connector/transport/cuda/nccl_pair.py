"""The thread of one NCCL communicator: makes it, uses it, and sees to it that nothing of it is left."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

import torch

from twolane.connector.agent import logger
from twolane.connector.transport.base import Wake
from twolane.connector.transport.cuda import driver
from twolane.connector.transport.cuda.nccl_library import Communicator, NcclError

Post = Callable[[Communicator, torch.cuda.Stream], None]
Then = Callable[[torch.cuda.Stream], None]

_POLL_S = 5e-5  # how often a call in progress is looked at


class Pair:
    """`call(post, then)` makes the thread run `post(communicator, stream)`, wait until NCCL has put that on the stream
    (a call to a non-blocking communicator returns before), and run `then(stream)`; in order.

    Ends on `end`, on the first error, or when the other rank is lost. `error` then says why, before the abort: a
    receive that is aborted ends like any other, and what lies behind it on the stream still runs. `is_over`: nothing
    does any more, and `buffers` aren't kept any longer. `wake` is called when it is joined, and when it is over.
    `spare`: streams that no pair uses any more. torch has 32, which it gives out again and again: a new one each time
    would at last be one that copies for others, and those would wait for this pair's other rank.
    """

    def __init__(
        self,
        name: bytes,
        rank: int,
        device: torch.device,
        buffers: tuple[torch.Tensor, ...],
        spare: SimpleQueue[torch.cuda.Stream],
        wake: Wake,
    ) -> None:
        self.error = ""
        self.is_joined = False
        self.is_over = False
        self._device = device
        self._name, self._rank = name, rank
        self._spare = spare
        self._wake = wake
        self._posts: SimpleQueue[tuple[Post, Then]] = SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(buffers,), name="twolane-nccl", daemon=True)
        self._thread.start()

    def call(self, post: Post, then: Then) -> None:
        if not self.error:
            self._posts.put((post, then))

    def end(self) -> None:
        """Soon: an abort may take a second."""
        self._ending.set()

    def join(self, timeout_s: float) -> None:
        self.end()
        self._thread.join(timeout_s)

    def _run(self, _buffers: tuple[torch.Tensor, ...]) -> None:
        communicator = stream = None
        try:
            driver.bind(self._device)
            communicator = Communicator(self._name, self._rank)
            self._settle(communicator)
            stream = self._take_stream()
            self.is_joined = True
            self._wake()
            self._serve(communicator, stream)
        except (NcclError, driver.DriverError, RuntimeError) as error:
            self.error = str(error)
            logger.log(logging.DEBUG if self._ending.is_set() else logging.ERROR, "nccl: %s", error)
        finally:
            self.error = self.error or "closed"
            if communicator is not None:
                communicator.abort()
            with contextlib.suppress(RuntimeError):  # the context is lost, which the engine finds out too
                if stream is not None:
                    stream.synchronize()
                    self._spare.put(stream)
            self._posts = SimpleQueue()  # they keep buffers, and whoever keeps this
            self.is_over = True
            self._wake()

    def _take_stream(self) -> torch.cuda.Stream:
        try:
            return self._spare.get_nowait()
        except Empty:
            return torch.cuda.Stream(self._device, priority=-1)

    def _serve(self, communicator: Communicator, stream: torch.cuda.Stream) -> None:
        while not self._ending.is_set():
            try:
                post, then = self._posts.get(timeout=0.05)
            except Empty:
                communicator.is_settled()  # tells of a lost rank
                continue
            post(communicator, stream)
            self._settle(communicator)
            then(stream)
            del post, then

    def _settle(self, communicator: Communicator) -> None:
        while not communicator.is_settled():
            if self._ending.is_set():
                raise NcclError("given up while the other rank was awaited")
            time.sleep(_POLL_S)
