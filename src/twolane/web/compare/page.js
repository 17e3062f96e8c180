"use strict";
// Draws the charts of a report. What they show stands in a table below each, so nothing is lost without this.
const charts = JSON.parse(document.getElementById("charts").textContent);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const HEIGHT = 270;
let drawn = [];

function seriesOf(line) {
  if (line.hidden) return { stroke: "transparent", points: { show: false }, width: 0, spanGaps: true };
  const stroke = colour(line.colour);
  return {
    label: line.label, stroke, width: line.width ?? 2, dash: line.dash, spanGaps: true,
    points: { show: line.points ?? true, size: 6, fill: colour("paper"), stroke },
  };
}

function axis(label, more) {
  return { stroke: colour("quiet"), grid: { stroke: colour("grid"), width: 1 }, ticks: { stroke: colour("grid") },
    label, labelSize: 20, labelFont: "13px system-ui, sans-serif", font: "12px system-ui, sans-serif", ...more };
}

// A band between two of the lines: the lowest and the highest round.
const translucent = (name) => `color-mix(in srgb, ${colour(name)} 18%, transparent)`;

function limits(chart) {
  return [(plot) => {
    for (const limit of chart.limits) {
      const y = plot.valToPos(limit, "y", true);
      if (y < plot.bbox.top || y > plot.bbox.top + plot.bbox.height) continue;
      const context = plot.ctx;
      context.save();
      context.strokeStyle = colour("limit");
      context.lineWidth = 2 * devicePixelRatio;
      context.setLineDash([2 * devicePixelRatio, 4 * devicePixelRatio]);
      context.beginPath();
      context.moveTo(plot.bbox.left, y);
      context.lineTo(plot.bbox.left + plot.bbox.width, y);
      context.stroke();
      context.restore();
    }
  }];
}

function yRange(chart) {
  const values = [...chart.lines.flatMap((line) => line.values), ...chart.limits].filter((value) => value !== null);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return chart.log ? [low / 1.3, high * 1.3] : [0, high * 1.1 || 1];
}

const short = (value) => (value >= 1000 ? value.toLocaleString("en") : String(+value.toPrecision(3)));

function xOf(chart) {
  if (!chart.rates) return { scale: { time: false }, axis: axis(chart.xLabel) };
  const [low, high] = [chart.x[0] / 1.15, chart.x[chart.x.length - 1] * 1.15];
  return {
    scale: { time: false, distr: 3, log: 2, range: [low, high] },
    axis: axis(chart.xLabel, { splits: () => chart.x, filter: (_, splits) => splits, values: (_, v) => v.map(short) }),
  };
}

// Ticks of a logarithmic axis: 1, 2 and 5 of each power of ten.
function ticks(_, __, low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
  return found.filter((value) => value >= low && value <= high);
}

function draw(place) {
  const chart = charts[place.dataset.chart];
  const x = xOf(chart);
  const logarithmic = chart.log ? { splits: ticks, filter: (_, splits) => splits } : {};
  const y = axis(chart.yLabel, { size: 60, values: (_, v) => v.map(short), ...logarithmic });
  const options = {
    width: place.clientWidth, height: HEIGHT, legend: { show: false }, cursor: { show: false },
    scales: { x: x.scale, y: { distr: chart.log ? 3 : 1, range: yRange(chart) } },
    axes: [x.axis, y],
    series: [{}, ...chart.lines.map(seriesOf)],
    bands: chart.bands.map((band) => ({ series: band.series, fill: translucent(band.colour) })),
    hooks: { draw: limits(chart) },
  };
  return new uPlot(options, [chart.x, ...chart.lines.map((line) => line.values)], place);
}

function drawAll() {
  drawn.forEach((plot) => plot.destroy());
  drawn = [...document.querySelectorAll(".chart")].map(draw);
}

drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("beforeprint", drawAll);
addEventListener("afterprint", drawAll);
let waiting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(drawAll);
});
