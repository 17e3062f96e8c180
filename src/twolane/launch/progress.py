"""Shows long steps: one live line or table on a terminal, otherwise a plain line at every change and every 5 s."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from twolane.launch.phases import READY
from twolane.launch.state import ServiceState

LINE_EVERY_S = 5.0


class Progress:
    """Owns the terminal while something is going on."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, what: str, usual_s: float) -> Iterator[None]:
        """Around one long step. Says what is going on, for how long, and how long it usually takes."""
        began_s = time.monotonic()
        done = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(what, usual_s, done), daemon=True)
        ticker.start()
        try:
            yield
        finally:
            done.set()
            ticker.join()
        self.console.print(f"{what}: done in {time.monotonic() - began_s:.0f} s", highlight=False)

    def _tick(self, what: str, usual_s: float, done: threading.Event) -> None:
        began_s = time.monotonic()

        def line() -> str:
            return f"{what} ... {time.monotonic() - began_s:.0f} s (usually {usual_s:.0f} s)"

        if self.console.is_terminal:
            with self.console.status(line()) as status:
                while not done.wait(0.2):
                    status.update(line())
            return
        self.console.print(line(), highlight=False)
        while not done.wait(LINE_EVERY_S):
            self.console.print(line(), highlight=False)


class ServicesView:
    """Shows the services as they start. Call `update` often, inside `with`."""

    def __init__(self, console: Console, usual_s: float) -> None:
        self._console = console
        self._usual_s = usual_s
        self._began_s = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._shown: dict[str, str] = {}
        self._line_at_s = self._began_s

    def __enter__(self) -> ServicesView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, services: list[ServiceState]) -> None:
        if self._live:
            self._live.update(self._table(services))
            return
        elapsed_s = time.monotonic() - self._began_s
        changed = [service for service in services if self._shown.get(service.name) != service.phase]
        for service in changed:
            self._shown[service.name] = service.phase
            self._console.print(f"[{elapsed_s:5.1f} s] {service.name}: {service.phase}", highlight=False, markup=False)
        if changed:
            self._line_at_s = time.monotonic()
        elif time.monotonic() - self._line_at_s > LINE_EVERY_S:
            self._line_at_s = time.monotonic()
            waiting = ", ".join(f"{s.name}: {s.phase}" for s in services if s.phase != READY)
            self._console.print(
                f"[{elapsed_s:5.1f} s] {waiting} (usually {self._usual_s:.0f} s)", highlight=False, markup=False
            )

    def _table(self, services: list[ServiceState]) -> Table:
        elapsed_s = time.monotonic() - self._began_s
        table = Table(box=None, pad_edge=False, title=f"starting ... {elapsed_s:.0f} s (usually {self._usual_s:.0f} s)")
        for name in ("service", "state", "since", "log"):
            table.add_column(name)
        for service in services:
            style = "green" if service.phase == READY else "yellow"
            since = f"{max(0.0, time.time() - service.since):.0f} s" if service.since else ""
            table.add_row(service.name, f"[{style}]{service.phase}[/]", since, service.log)
        return table
