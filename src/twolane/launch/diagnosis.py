"""`twolane doctor`: gathers the facts for what would be started, has them examined, prints the findings."""

from __future__ import annotations

from rich.console import Console

from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch import control
from twolane.launch.commands import prepare
from twolane.launch.doctor import Finding, examine
from twolane.launch.facts import gather
from twolane.launch.hardware import inspect_machine

WORDS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


def findings(settings: Settings, console: Console) -> list[Finding]:
    """What can't even be planned is a finding, too."""
    try:
        plan = prepare(settings, inspect_machine(), console)
    except ConfigError as error:
        what, _, remedy = str(error).partition(": ")
        return [Finding("error", "settings", what, remedy or "see `twolane config`")]
    running = control.running(control.Files(settings)) is not None
    folders = [settings.log_dir.absolute(), settings.cache_dir.absolute()]
    return examine(gather(plan, folders, running))


def print_findings(found: list[Finding], console: Console) -> None:
    for finding in found:
        console.print(f"{WORDS[finding.level]}  {finding.name}: {finding.text}", markup=False)
        if finding.remedy:
            console.print(f"         {finding.remedy}", markup=False)
    errors, warnings = (sum(f.level == level for f in found) for level in ("error", "warning"))
    console.print(f"{errors} errors, {warnings} warnings", markup=False)
