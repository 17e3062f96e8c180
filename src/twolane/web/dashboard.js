// Puts the parts together: events from the proxy go to the picture, the charts, the table and the log.
import { Charts } from "./charts.js";
import { Flow } from "./flow.js";
import { Lanes } from "./lanes.js";
import { Logs } from "./logs.js";
import { Requests } from "./requests.js";
import { Stream } from "./stream.js";
import { $, clock, h, span, text } from "./util.js";

const HEALTH = { ok: "● ok", degraded: "▲ degraded", unavailable: "■ unavailable", draining: "◆ draining" };
const ANNOUNCE_AFTER_MS = 100;
const THEMES = { auto: "light", light: "dark", dark: "auto" };

const said = [];
/** For who can't see it. What comes at once is told in one message: of several in a row the last alone would be read. */
const announce = (what) => {
  if (said.push(what) === 1) setTimeout(() => text($("announce"), said.splice(0).join(" ")), ANNOUNCE_AFTER_MS);
};
const logs = new Logs();
const lanes = new Lanes((name) => logs.open(name), announce);
const flow = new Flow(lanes);
const charts = new Charts();
const requests = new Requests((role, address) => lanes.nameOf(role, address));
let paused = false;
let lostAt = null;
let started = null;
let version = "";

const on = {
  event(name, data) {
    if (name === "hello") hello(data);
    if (data.instances) state(data);
    if (name === "sample") charts.add(data.sample, data.now);
    if (name === "flow") moved(data);
  },

  live() {
    document.body.dataset.link = "live";
    text($("link"), "live");
    $("banner").hidden = true;
    $("key-form").hidden = true;
    $("board").hidden = false;
    if (lostAt) announce("The proxy is back.");
    lostAt = null;
  },

  lost(why, pauseMs) {
    lostAt ??= new Date();
    document.body.dataset.link = "lost";
    text($("link"), "not connected");
    const kept = started ? ` What you see is from ${clock(lostAt)}.` : "";
    text($("banner-text"), `${why}.${kept} Trying again in ${Math.max(1, Math.round(pauseMs / 1000))} s.`);
    $("banner").hidden = false;
    flow.clear();
  },

  needsKey(wasWrong) {
    document.body.dataset.link = "locked";
    text($("link"), "locked");
    $("board").hidden = true;
    $("banner").hidden = true;
    $("key-form").hidden = false;
    text($("key-wrong"), wasWrong ? "The proxy doesn't know this key." : "");
    $("key").setAttribute("aria-invalid", String(wasWrong));
    $("key").focus();
    $("key").select();
  },
};

function hello(data) {
  started = Date.now() - data.uptime_s * 1000;
  version = data.version;
  charts.start(data.samples, data.now, data.window_s);
  lanes.update(data.instances, data.power);
  requests.start(data.ended, data.now);
  flow.start(data.open);
}

function about() {
  text($("about"), `TwoLane ${version}, up for ${span((Date.now() - started) / 1000)}. Numbers for machines: /stats`);
}

function state(data) {
  text($("says"), data.says.text);
  const notes = $("notes");
  if ([...notes.children].map((note) => note.textContent).join("\n") !== data.says.notes.join("\n"))
    notes.replaceChildren(...data.says.notes.map((note) => h("li", {}, note)));
  const health = $("health");
  health.hidden = false;
  health.dataset.status = data.says.status;
  text(health, HEALTH[data.says.status] ?? data.says.status);
  text($("proxy-flight"), data.in_flight);
  text($("proxy-queued"), data.queued);
  document.title = data.says.status === "ok" ? "TwoLane" : `${data.says.status} - TwoLane`;
  about();
  lanes.update(data.instances, data.power);
  logs.names(data.instances.map((instance) => instance.name));
}

function moved(data) {
  if (paused) flow.clear();
  else flow.move(data.moved, data.gone, data.ended);
  requests.add(data.ended, data.now);
}

const stream = new Stream(on);
$("retry").addEventListener("click", () => stream.tryNow());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  stream.useKey($("key").value.trim());
});

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  text($("pause"), paused ? "Resume" : "Pause");
  charts.pause(paused);
  requests.pause(paused);
});

const shownTheme = () => document.documentElement.dataset.theme ?? "auto";
const showTheme = () => text($("theme"), `Theme: ${shownTheme()}`);
$("theme").addEventListener("click", () => {
  const next = THEMES[shownTheme()];
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("twolane-theme", next);
  } catch {
    // It lasts for as long as the page does.
  }
  showTheme();
  charts.recolour();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.recolour());
showTheme();
stream.run();
