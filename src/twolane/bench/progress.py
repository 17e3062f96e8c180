"""How far a comparison is: a bar with the time that is left on a terminal, a line a step otherwise."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from twolane.launch.phases import READY
from twolane.launch.state import ServiceState

REFRESH_HZ = 1  # the client's times matter more


class Bar:
    """Owns the terminal while it measures. Use as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began_s = time.monotonic()
        self._columns = (TextColumn("{task.description}"), BarColumn(), _Left())
        self._progress = Progress(*self._columns, console=console, refresh_per_second=REFRESH_HZ, transient=True)
        self._task = self._progress.add_task("preparing", total=None, ends_s=None)
        self._left_s: float | None = None
        self._shown: dict[str, str] = {}

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays; what isn't indented is what is going on now."""
        elapsed_s = time.monotonic() - self._began_s
        left = "" if self._left_s is None or self._console.is_terminal else f", about {duration(self._left_s)} left"
        self._console.print(f"[{elapsed_s:6.1f} s{left}] {text}", markup=False, highlight=False)
        if not text.startswith(" "):
            self._progress.update(self._task, description=text)

    def left(self, seconds: float) -> None:
        """An estimate, from now on."""
        now_s = time.monotonic()
        elapsed_s = now_s - self._began_s
        self._left_s = max(0.0, seconds)
        total_s = elapsed_s + self._left_s
        self._progress.update(self._task, completed=elapsed_s, total=total_s, ends_s=now_s + self._left_s)

    def services(self, name: str, services: list[ServiceState]) -> None:
        """Called often while they start."""
        for service in services:
            if self._shown.get(service.name, "waiting") != service.phase:
                self._shown[service.name] = service.phase
                if service.phase == READY:
                    self.say(f"  {name}: {service.name} is ready")
                else:
                    self._progress.update(self._task, description=f"{service.name}: {service.phase}")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        ends_s = task.fields["ends_s"]
        if ends_s is None:
            return Text("")
        return Text(f"about {duration(max(0.0, ends_s - time.monotonic()))} left")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
