"""`twolane bench --compare` from the command line to the files it leaves: raw.jsonl, report.json, report.html."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from twolane.bench import lanes
from twolane.bench.compare import Comparison, Grounds
from twolane.bench.document import document
from twolane.bench.html import page
from twolane.bench.journal import Header, Journal, Note, difference
from twolane.bench.options import USUAL_START_S, Asked, Given, check_same, fill
from twolane.bench.progress import Bar
from twolane.bench.service import Interrupt
from twolane.bench.sweep import SIDES
from twolane.config import Settings
from twolane.errors import ConfigError
from twolane.launch import benchmark, control
from twolane.launch.facts import gather
from twolane.launch.hardware import inspect_machine, vllm_folder
from twolane.launch.kv import check_kv
from twolane.launch.model import resolve_model
from twolane.launch.plan import Plan, ServedModel
from twolane.launch.progress import Progress

BUSY_SHARE = 0.5  # of the cores
# Not part of what must be the same when a run goes on: where things lie, and on which ports.
ELSEWHERE = (
    *("log_dir", "state_dir", "cache_dir", "timeout_seconds", "host", "http_proxy_port", "proxy_port"),
    *("prefill_http_port", "decode_http_port", "prefill_kv_port", "decode_kv_port"),
)


def compare_command(
    settings: Settings, given: Given, budget_minutes: float, out: Path | None, resume: Path | None, console: Console
) -> bool:
    """Whether both sides were measured. KeyboardInterrupt when it was interrupted; the files are there all the same."""
    end_s = time.monotonic() + 60 * budget_minutes
    machine = inspect_machine()
    check_kv(settings.kv, machine.engine, vllm_folder())
    model = resolve_model(settings, machine.engine, Progress(console))
    header = header_of(settings, fill(given, machine.engine, settings.decode_args, 60 * budget_minutes), model)
    folder = resume or out or settings.log_dir / time.strftime("compare-%Y%m%d-%H%M%S")
    journal = went_on(resume, header, given) if resume else None
    asked = msgspec.convert((journal.measured.header if journal else header).asked, Asked)
    plans = lanes.both_plans(settings, asked.aggregated_args, folder.absolute(), machine, model)
    lanes.check_length(plans["aggregated"][1], machine, model, asked.input_len + asked.output_len)
    together = room_for(settings, [plan for _, plan in plans.values()], console)
    journal = journal or Journal.begin(folder, header)
    for text in (*(["It was interrupted, and went on later"] if resume else []), *busy(header.about["hardware"])):
        journal.add(Note(text))
    grounds = Grounds(asked, plans, together, end_s, USUAL_START_S[machine.engine])
    try:
        with Interrupt() as interrupt, Bar(console) as bar:
            Comparison(grounds, journal, bar, interrupt).run()
    finally:
        journal.close()
        journal.measured.close()
        shutil.rmtree(folder / "state", ignore_errors=True)  # nothing of it runs any more
        report = write(journal, folder)
        tell(report, folder, console)
    return all(report["points"].values())


def end_leftovers(folder: Path) -> None:
    """What a comparison in this folder that was killed has left running."""
    for side in SIDES:
        control.stop_all(control.Files(Settings(state_dir=folder / "state" / side)))


def busy(hardware: dict[str, Any]) -> list[str]:
    """Said where others compute, too: both sides meet that, but not evenly."""
    load, num_cpus = hardware["load_average"][0], hardware["num_cpus"]
    if load <= BUSY_SHARE * num_cpus:
        return []
    return [f"The machine was busy with other work when this began: load average {load:.1f} on {num_cpus} cores"]


def header_of(settings: Settings, asked: Asked, model: ServedModel) -> Header:
    about = benchmark.surroundings(settings)
    hardware = {name: about["hardware"][name] for name in ("cpu", "num_cpus", "gpus")}
    configuration = {key: value for key, value in about["configuration"].items() if key not in ELSEWHERE}
    key = {
        "model": model_key(model),
        "versions": about["versions"],
        "hardware": hardware,
        "configuration": configuration,
    }
    plain = json.loads(msgspec.json.encode([msgspec.to_builtins(asked), key, about]))
    return Header(*plain)


def model_key(model: ServedModel) -> dict[str, Any]:
    """By name and content, as far as that can be known quickly."""
    folder = Path(model.source)
    config = folder / "config.json"
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.exists() else ""
    return {"names": list(model.names[:1]), "config": digest, "weights_bytes": sizes}


def went_on(folder: Path, now: Header, given: Given) -> Journal:
    """The journal that goes on. ConfigError if anything has changed that would change its figures."""
    journal = Journal.resume(folder)
    then = journal.measured.header
    if changed := difference(now.key, then.key):
        raise ConfigError(f"--resume {folder}: {'; '.join(changed[:3])}: set it back, or begin a new comparison")
    check_same(given, msgspec.convert(then.asked, Asked))
    end_leftovers(folder)
    return journal


def room_for(settings: Settings, plans: list[Plan], console: Console) -> bool:
    """Whether both sides may be up at once. ConfigError if there is no room for each alone."""
    folders = [settings.log_dir.absolute(), settings.cache_dir.absolute()]
    for plan in plans:
        lanes.check_room(lanes.short_of(gather(plan, folders, running=False)))
    if control.running(control.Files(settings)):
        console.print("warning: services run in this folder, and what they do changes the figures: `twolane down`")
    together = not lanes.short_of(gather(lanes.merged(plans), folders, running=False))
    console.print("both sides are up at once" if together else "one side is up at a time: both don't fit into memory")
    return together


def write(journal: Journal, folder: Path) -> dict[str, Any]:
    report = document(journal.measured)
    (folder / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    (folder / "report.html").write_text(page(report))
    return report


def tell(report: dict[str, Any], folder: Path, console: Console) -> None:
    console.print()
    sentences = [outcome["sentence"] for outcome in report["outcomes"]] + [report["failures"]]
    for text in (report["headline"], *(f"  {sentence}" for sentence in filter(None, sentences))):
        console.print(text, markup=False)
    for text in report["notes"]:
        console.print(f"  note: {text}", markup=False)
    for text in report["left_out"]:
        console.print(f"  left out: {text}", markup=False)
    if report["left_out"]:
        console.print(f"  `twolane bench --compare --resume {folder}` goes on there", markup=False)
    console.print(f"saved: {folder / 'report.html'}, report.json and raw.jsonl beside it", markup=False)
