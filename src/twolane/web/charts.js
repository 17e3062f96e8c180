// The last 15 minutes. Times are counted back from now, so that nobody's clock matters.
import { $, count, h, ms, text } from "./util.js";

const KEPT_S = 900;
const HEIGHT = 132;
const SPANS_S = [180, 360, KEPT_S]; // as wide as there is something to see
// Columns of a sample, as history.Sample has them.
const [AT, TTFT50, TTFT99, ITL50, ITL99, REQUESTS, PIECES, TOKENS, IN_FLIGHT, QUEUED] = Array(10).keys();
const SUMMARY_EVERY_S = 20;

const LATENCY = [
  { label: "p50", colour: "--p", width: 1.8 },
  { label: "p99", colour: "--p99", width: 1.3, dash: [5, 3] },
];
const CHARTS = [
  { title: "Time to first token", short: "TTFT", note: "streams that ended", columns: [TTFT50, TTFT99], series: LATENCY, show: ms },
  { title: "Between tokens", short: "ITL", note: "gaps in streams", columns: [ITL50, ITL99], series: LATENCY, show: ms },
  {
    title: "Throughput",
    columns: [TOKENS, REQUESTS],
    series: [
      { label: "tokens/s", colour: "--d", width: 1.8, fill: true },
      { label: "req/s", colour: "--p", width: 1.3, dash: [5, 3], scale: "y2" },
    ],
    show: count,
  },
  {
    title: "Requests",
    columns: [IN_FLIGHT, QUEUED],
    series: [
      { label: "in flight", colour: "--d", width: 1.8, fill: true, steps: true },
      { label: "waiting", colour: "--p99", width: 1.3, dash: [5, 3], steps: true },
    ],
    show: count,
  },
];

export class Charts {
  #samples = [];
  #charts = [];
  #paused = false;
  #now = 0;

  constructor() {
    this.#charts = CHARTS.map((given) => new Chart(given, () => this.#samples));
    $("charts").replaceChildren(...this.#charts.map((chart) => chart.root));
  }

  start(samples, now, windowS) {
    this.#samples = samples;
    text($("trends-hint"), `Each point tells of the ${windowS} seconds before it.`);
    this.#show(now);
  }

  add(sample, now) {
    this.#samples.push(sample);
    while (this.#samples.length && this.#samples[0][AT] < now - KEPT_S) this.#samples.shift();
    if (!this.#paused) this.#show(now);
  }

  pause(paused) {
    this.#paused = paused;
    if (!paused) this.#show(this.#now);
  }

  recolour() {
    for (const chart of this.#charts) chart.recolour();
  }

  #show(now) {
    this.#now = now;
    for (const chart of this.#charts) chart.show(now);
  }
}

class Chart {
  #given;
  #samples;
  #plot = null;
  #summaryAt = -Infinity;

  constructor(given, samples) {
    this.#given = given;
    this.#samples = samples;
    this.values = given.series.map((series) => ({ name: h("span", {}, series.label), value: h("b", {}, "–") }));
    this.box = h("div", { class: "plot", role: "img", "aria-label": `${given.title}: no numbers yet` });
    this.table = h("div", { class: "table-scroll" });
    this.details = h("details", { toggle: () => this.#fillTable() }, h("summary", {}, "Numbers"), this.table);
    const legend = this.values.map(({ name, value }, i) => h("span", { class: "figure" }, h("i", { class: `swatch k${i}`, "data-colour": given.series[i].colour.slice(2) }), name, " ", value));
    this.root = h("figure", { class: "panel chart" }, h("figcaption", {}, h("h3", {}, given.title, given.short ? h("small", {}, ` ${given.short}`) : ""), h("p", {}, ...legend)), this.box, this.details);
    new ResizeObserver(() => this.#resize()).observe(this.box);
  }

  show(now) {
    const { columns, show } = this.#given;
    const rows = this.#samples();
    const last = rows.at(-1) ?? [];
    // Engines that don't tell their count: what passed through the proxy is told instead, by its own name.
    const at = columns.map((column) => (column === TOKENS && last[TOKENS] == null ? PIECES : column));
    if (columns[0] === TOKENS) text(this.values[0].name, at[0] === PIECES ? "pieces/s" : "tokens/s");
    this.columns = at;
    this.now = now;
    const age = now - (rows[0]?.[AT] ?? now);
    this.span = SPANS_S.find((span) => span >= age) ?? KEPT_S;
    this.data = [rows.map((row) => row[AT] - now), ...at.map((column) => rows.map((row) => row[column]))];
    at.forEach((column, i) => text(this.values[i].value, show(last[column])));
    if (this.#plot) this.#plot.setData(this.data);
    else this.#resize();
    if (now - this.#summaryAt >= SUMMARY_EVERY_S) {
      this.#summaryAt = now;
      this.#summarise();
      if (this.details.open) this.#fillTable();
    }
  }

  /** What the curves say, for those who can't see them. */
  #summarise() {
    const parts = this.values.map(({ name }, i) => {
      const known = this.data[i + 1].filter((value) => value != null);
      if (!known.length) return `${name.textContent} has no numbers`;
      const { show } = this.#given;
      return `${name.textContent} now ${show(this.data[i + 1].at(-1))}, between ${show(Math.min(...known))} and ${show(Math.max(...known))}`;
    });
    this.box.setAttribute("aria-label", `${this.#given.title}, last 15 minutes: ${parts.join("; ")}.`);
  }

  /** A row a minute: the last sample of each. */
  #fillTable() {
    if (!this.details.open) return;
    const byMinute = new Map();
    for (const row of this.#samples()) byMinute.set(Math.ceil((this.now - row[AT]) / 60), row);
    const { title, show } = this.#given;
    const head = h("tr", {}, h("th", { scope: "col" }, "When"), ...this.values.map(({ name }) => h("th", { scope: "col", class: "num" }, name.textContent)));
    const rows = [...byMinute].reverse().map(([minutes, row]) => h("tr", {}, h("th", { scope: "row" }, minutes ? `${minutes} min ago` : "now"), ...this.columns.map((column) => h("td", { class: "num" }, show(row[column])))));
    this.table.replaceChildren(h("table", {}, h("caption", { class: "unseen" }, title), h("thead", {}, head), h("tbody", {}, ...rows)));
  }

  #resize() {
    const width = Math.floor(this.box.clientWidth);
    if (!width || !this.data) return;
    if (this.#plot) this.#plot.setSize({ width, height: HEIGHT });
    else this.#plot = new uPlot(this.#options(width), this.data, this.box);
  }

  recolour() {
    this.#plot?.destroy();
    this.#plot = null;
    this.#resize();
  }

  #options(width) {
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const { series, show } = this.#given;
    const quiet = { stroke: colour("--ink2"), font: "11px system-ui, sans-serif", ticks: { show: false }, gap: 3 };
    const axis = { ...quiet, size: 50, values: (_, splits) => splits.map((value) => (value ? show(value) : "0")), splits: nice, grid: { stroke: colour("--line"), width: 1 } };
    const hasSecond = series.some((one) => one.scale === "y2");
    return {
      width,
      height: HEIGHT,
      padding: [8, hasSecond ? 0 : 14, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "trends" }, drag: { x: false, y: false }, points: { size: 6 } },
      hooks: { setCursor: [(plot) => this.#showCursor(plot)] },
      scales: { x: { time: false, range: () => [-this.span, 0] }, y: { range: fromZero }, y2: { range: fromZero } },
      axes: [
        { ...quiet, size: 22, splits: () => [(this.span * -2) / 3, this.span / -3, 0], values: (_, splits) => splits.map((s) => (s ? `${Math.round(s / 60)} min`.replace("-", "−") : "now")), grid: { show: false } },
        axis,
        ...(hasSecond ? [{ ...axis, scale: "y2", side: 1, size: 36, grid: { show: false } }] : []),
      ],
      series: [{}, ...series.map((one) => ({
        stroke: colour(one.colour),
        width: one.width,
        dash: one.dash,
        scale: one.scale ?? "y",
        fill: one.fill ? `${colour(one.colour)}22` : undefined,
        paths: one.steps ? uPlot.paths.stepped({ align: 1 }) : undefined,
        points: { show: false },
      }))],
    };
  }

  #showCursor(plot) {
    const index = plot.cursor.left >= 0 ? plot.cursor.idx : null;
    const at = index ?? this.data[0].length - 1;
    this.values.forEach(({ value }, i) => text(value, this.#given.show(this.data[i + 1][at])));
    this.root.classList.toggle("past", index != null);
  }
}

const fromZero = (_plot, _low, high) => [0, high > 0 ? high * 1.12 : 1];

/** Three lines at most, at round numbers. */
function nice(_plot, _axis, low, high) {
  const rough = (high - low) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough) ?? power;
  const splits = [];
  for (let value = 0; value <= high; value += step) splits.push(+value.toPrecision(12));
  return splits;
}
