"""Streams of copies on the GPU, and the threads that wait for their ends."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from twolane.connector.transport.base import Ticket, Wake


@dataclass(eq=False)
class Job:
    """A ticket and what must happen on the GPU before it is done. Jobs of one `owner` are done in order."""

    ticket: Ticket
    owner: object
    keeps: object  # what the GPU still reads
    is_through: bool = False
    moved: torch.cuda.Event | None = None  # over when the GPU is through with it


def event_now(device: torch.device) -> torch.cuda.Event:
    """On the current stream. Who waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Waiter:
    """A thread that waits for events of one stream, one after the other, without holding the interpreter."""

    def __init__(self, name: str, device: torch.device, wake: Wake) -> None:
        self._device = device
        self._wake = wake
        self._queue: SimpleQueue[tuple[torch.cuda.Event | None, torch.cuda.Event, Job] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, ready: torch.cuda.Event | None, done: torch.cuda.Event, job: Job) -> None:
        """`ready`: behind what the job waits on the GPU, where it does."""
        self._queue.put((ready, done, job))

    def close(self, timeout_s: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while (waiting := self._queue.get()) is not None:
            ready, done, job = waiting
            try:
                if ready is not None:
                    ready.synchronize()
                    job.ticket.ready_at_s = time.monotonic()
                done.synchronize()
            except RuntimeError as error:  # torch's CUDA errors: the context is lost, the engine will find out too
                job.ticket.error = f"GPU copy failed: {error}"
            job.ticket.done_at_s = time.monotonic()
            job.is_through = True
            self._wake()


class Lane:
    """A stream of copies with its waiter and, once slots are used, a dense buffer on the way to host memory."""

    def __init__(self, name: str, device: torch.device, wake: Wake) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.waiter = Waiter(f"twolane-{name}", device, wake)
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def staging(self, size_bytes: int) -> int:
        """Where the dense buffer lies, which has at least that size. On this lane's stream, so that a buffer it
        replaces is kept until the copies before are through."""
        if self._buffer.numel() < size_bytes:
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self._buffer.device)
        return int(self._buffer.data_ptr())

    def finish(self, job: Job, ready: torch.cuda.Event | None) -> torch.cuda.Event:
        """Everything of the job is on the stream."""
        done = torch.cuda.Event(blocking=True)
        done.record(self.stream)
        job.moved = done
        self.waiter.add(ready, done, job)
        return done

    def close(self, timeout_s: float) -> None:
        self.waiter.close(timeout_s)
