"""report.json's content -> one page that needs nothing else: styles, scripts and data are in it. Pure but for reading
our own files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import Any

from twolane.bench.charts import Chart, charts_of, counted_rows
from twolane.bench.power_charts import ENERGY, energy_table, how_often, of_comparison, watts_chart
from twolane.bench.verdict import number

COUNTED = (
    *("", "requests", "failed", "of these timed out", "legs that failed (tried again)", "decoded without P"),
    "prompt tokens from P",
)
METHOD = (
    "Both sides stood behind the same proxy with the same number of instances, on the same GPUs, or without GPUs with "
    "the same number of threads. They were asked the same prompts at the same times (a Poisson process; a new seed a "
    "round and rate), rounds alternating which side is first. No prompt came twice, so no prefix cache helped. TTFT: "
    "request sent to first token, as the client saw it. ITL: every gap between two tokens, pooled. TPOT: first token "
    "to last, over the tokens. A request met the objective if its TTFT and the p99 of its own gaps did; the search "
    "went up until the p99 of all TTFTs or of all gaps did not, or a request failed. The p99 of fewer than 100 "
    "requests is the slowest of them. A difference counts if the rounds' ranges don't overlap and it is larger than "
    "either range: between equal sides that happens by chance in 1 of 5 comparisons with two rounds each, in 1 of 25 "
    "with three, in 1 of 100 with four."
)


def page(report: dict[str, Any]) -> str:
    power = report["power"]
    charts = charts_of(report) + (of_comparison(power) if power else [])
    body = [
        "<main><h1>TwoLane: are two lanes worth it here?</h1>",
        f'<p class="headline">{escape(report["headline"])}</p>',
        _outcomes(report),
        f'<p class="quiet">{escape(_asked(report))}</p>',
        _warnings(report),
        *map(_figure, charts),
        _energy(power) if power else "",
        "<h2>Failures, retries, handoffs</h2>" + _table("Of all whole steps.", COUNTED, counted_rows(report)),
        f"<h2>How it was measured</h2><p>{escape(METHOD)}</p>",
        "<h2>Settings</h2>" + _settings(report),
        "</main>",
    ]
    return _document("TwoLane: comparison", "\n".join(body), charts)


def power_page(report: dict[str, Any]) -> str:
    """Of plain `twolane bench`, whose figures vLLM prints: power over time, and joules a token."""
    power = report["power"]
    chart = watts_chart("power", "Power over time", how_often(power["update_s"]), power["over_time"])
    told = "; ".join(f"{ENERGY[name]}: {number(joules)}" for name, joules in power["joules_per_token"].items())
    where = f"{report['model']} at {report['url']}, {report['at']}; the benchmark's own start is in it"
    body = [
        "<main><h1>TwoLane: power of a benchmark</h1>",
        f'<p class="headline">{escape(told or "No tokens were counted.")}</p>',
        f'<p class="quiet">{escape(where)}</p>',
        _figure(chart),
        "</main>",
    ]
    return _document("TwoLane: power of a benchmark", "\n".join(body), [chart])


def _energy(power: dict[str, Any]) -> str:
    header, rows = energy_table(power)
    return "<h2>Energy</h2>" + _table("Joules: median of the rounds, below it lowest and highest.", header, rows)


def _document(title: str, body: str, charts: Iterable[Chart]) -> str:
    data = json.dumps({chart.name: chart.drawn for chart in charts}).replace("</", "<\\/")
    styles = _own("vendor/uplot/uPlot.min.css") + _own("compare/page.css")
    scripts = _own("vendor/uplot/uPlot.iife.min.js") + "\n" + _own("compare/page.js")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f'<style>{styles}</style></head>\n<body>\n{body}\n<script type="application/json" id="charts">{data}</script>\n'
        f"<script>{scripts}</script></body></html>\n"
    )


def _own(path: str) -> str:
    return files("twolane.web").joinpath(*path.split("/")).read_text(encoding="utf-8")


def _outcomes(report: dict[str, Any]) -> str:
    items = (f'<li class="{o["result"]}">{escape(o["sentence"])}</li>' for o in report["outcomes"])
    return f'<ul class="outcomes">{"".join(items)}</ul>' if report["outcomes"] else ""


def _asked(report: dict[str, Any]) -> str:
    asked, hardware = report["asked"], report["hardware"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['num_cpus']} cores of {hardware['cpu']}, no GPU"
    configuration = report["configuration"]
    lanes = f"{configuration['prefill']}P{configuration['decode']}D"
    total = int(configuration["prefill"]) + int(configuration["decode"])
    engine = next((f"{name} {v}" for name, v in report["versions"].items() if name.startswith("vllm")), "vLLM")
    return (
        f"{report['model']['names'][0]}, {lanes} against {total} plain instances, {engine}, on {where}; prompts of "
        f"{asked['input_len']} tokens, answers of {asked['output_len']}; {report['at']}."
        + (f" Objective: {_objective(report['objective'])}." if report["objective"] else "")
    )


def _objective(objective: dict[str, Any]) -> str:
    limits = f"TTFT {number(objective['ttft_ms'])} ms, ITL {number(objective['itl_ms'])} ms"
    return f"{limits} ({objective['origin']})"


def _warnings(report: dict[str, Any]) -> str:
    told = [
        *filter(None, [report["failures"]]),
        *report["notes"],
        *(f"Left out: {text}" for text in report["left_out"]),
    ]
    if report["cut_requests"]:
        told.append(f"{report['cut_requests']} requests belong to a step that was interrupted, and count nowhere")
    if not told:
        return ""
    return f'<div class="warning"><ul>{"".join(f"<li>{escape(text)}</li>" for text in told)}</ul></div>'


def _figure(chart: Chart) -> str:
    keys = "".join(f'<li><span class="swatch {key.style}"></span>{escape(key.text)}</li>' for key in chart.keys)
    label = escape(f"{chart.title}; the table below has the same figures")
    return (
        f'<section><h2>{escape(chart.title)}</h2><p class="quiet">{escape(chart.about)}</p><figure>'
        f'<ul class="legend">{keys}</ul>'
        f'<div class="chart" data-chart="{chart.name}" role="img" aria-label="{label}"></div></figure>'
        + _table(f"{chart.title}. {chart.caption}", chart.header, chart.rows)
        + "</section>"
    )


def _table(caption: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = "".join(f'<th scope="col">{escape(text)}</th>' if text else "<td></td>" for text in header)
    lines = "".join(f"<tr>{_row(list(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _row(cells: list[str]) -> str:
    return f'<th scope="row">{escape(cells[0])}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in cells[1:])


def _cell(text: str) -> str:
    first, _, second = text.partition("\n")
    return escape(first) + (f"<small>{escape(second)}</small>" if second else "")


def _settings(report: dict[str, Any]) -> str:
    rows = {
        **{f"asked: {name}": value for name, value in report["asked"].items()},
        **report["versions"],
        **report["hardware"],
        **{f"setting: {name}": value for name, value in report["configuration"].items() if value not in ("", "()")},
        "idle, ms": report["idle"],
        "starts, s": report["starts_s"],
    }
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_plain(value))}</td></tr>' for name, value in rows.items()
    )
    table = f'<table class="plain"><caption>Everything that was set</caption><tbody>{lines}</tbody></table>'
    commands = "\n\n".join(" ".join(argv) for side in report["commands"].values() for argv in side)
    return (
        f"<details><summary>Options, versions, hardware, configuration</summary>{table}</details>"
        f'<details><summary>Command lines</summary><pre tabindex="0">{escape(commands)}</pre></details>'
    )


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
