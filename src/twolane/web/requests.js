// The latest requests, newest first; each opens to its story.
import { tell } from "./story.js";
import { $, clock, h, ms, text } from "./util.js";

const MAX_ROWS = 50;
const SHOW_EVERY_MS = 1000;
const OUTCOMES = {
  ok: ["●", "ok"],
  rejected: ["■", "rejected"],
  too_busy: ["▲", "too busy"],
  no_instance: ["▲", "no instance"],
  upstream_failed: ["✕", "failed"],
  decode_died: ["✕", "decode died"],
  client_left: ["○", "client left"],
  client_stalled: ["○", "client stalled"],
  cancelled: ["○", "cancelled"],
};

/** [kind, from ms, to ms] in order of time. A whole answer tells nothing of its first token: only streams do. */
export function segmentsOf(record) {
  const total = record.total_ms ?? 0;
  const within = (at, low) => Math.min(Math.max(at ?? low, low), total);
  const admitted = within(record.admitted_ms, 0);
  const segments = [["queue", 0, admitted]];
  if (!record.decode) return segments.concat([["bad", admitted, total]]);
  const done = record.stream ? record.first_byte_ms : record.prefill_done_ms;
  if (!record.prefill) {
    const first = record.stream ? within(record.first_byte_ms ?? total, admitted) : admitted;
    return segments.concat([["alone", admitted, first], ["decode", first, total]]);
  }
  const first = within(done ?? total, admitted);
  const computed = Math.min(within(record.prefill_done_ms ?? first, admitted), first);
  return segments.concat([["prefill", admitted, computed], ["handoff", computed, first], ["decode", first, total]]);
}

export class Requests {
  #nameOf;
  #rows = new Map();
  #waiting = [];
  #timer = 0;
  #paused = false;

  constructor(nameOf) {
    this.#nameOf = nameOf;
  }

  start(ended, now) {
    this.#rows.clear();
    $("rows").replaceChildren();
    this.#waiting = [];
    this.add(ended, now);
    this.#show();
  }

  add(ended, now) {
    const here = Date.now() / 1000;
    for (const record of ended) this.#waiting.push([record, new Date((here - now + record.started_s) * 1000 + (record.total_ms ?? 0))]);
    this.#waiting = this.#waiting.slice(-MAX_ROWS);
    if (!this.#timer && !this.#paused) this.#timer = setTimeout(() => this.#show(), SHOW_EVERY_MS);
  }

  pause(paused) {
    this.#paused = paused;
    if (!paused) this.#show();
  }

  #show() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (this.#paused) return;
    const body = $("rows");
    for (const [record, at] of this.#waiting) {
      const row = new Row(record, at, (role, address) => (address ? this.#nameOf(role, address) : ""));
      this.#rows.set(record.number, row);
      body.prepend(row.root, row.more);
    }
    this.#waiting = [];
    this.#trim();
    $("requests").hidden = this.#rows.size === 0;
    $("no-requests").hidden = this.#rows.size > 0;
  }

  /** The oldest go, but none that somebody reads. */
  #trim() {
    let surplus = this.#rows.size - MAX_ROWS;
    for (const [number, row] of this.#rows) {
      if (surplus-- <= 0) break;
      if (row.isOpen || row.root.contains(document.activeElement)) continue;
      row.root.remove();
      row.more.remove();
      this.#rows.delete(number);
    }
  }
}

class Row {
  isOpen = false;

  constructor(record, at, nameOf) {
    this.record = record;
    this.names = [nameOf("P", record.prefill), nameOf("D", record.decode)];
    const id = `story-${record.number}`;
    const [shape, word] = OUTCOMES[record.outcome] ?? ["?", record.outcome];
    const lanes = this.names.filter(Boolean).join(" → ") || "none";
    this.button = h("button", { type: "button", class: "open", "aria-expanded": "false", "aria-controls": id, "aria-label": `${clock(at)}, request ${record.request_id}: all events` }, clock(at));
    this.root = h(
      "tr",
      { class: "request", click: (event) => (event.target.closest("button") || !getSelection().isCollapsed ? null : this.#toggle()) },
      h("td", { class: "when" }, this.button),
      h("td", { class: "id wide", title: record.request_id }, record.request_id),
      h("td", { class: "mid" }, h("span", { class: "lanes" }, lanes), record.alone_because ? h("span", { class: "tag" }, "alone") : "", record.attempts > 1 ? h("span", { class: "tag" }, `${record.attempts} attempts`) : ""),
      h("td", { class: `outcome ${record.outcome}` }, h("span", { "aria-hidden": "true" }, `${shape} `), word),
      h("td", { class: "num mid" }, record.stream ? ms(record.first_byte_ms) : "–"),
      h("td", { class: "num" }, ms(record.total_ms)),
      h("td", { class: "line" }, bar(record)),
    );
    this.box = h("td", { colspan: 7 });
    this.more = h("tr", { id, class: "more", hidden: true }, this.box);
    this.button.addEventListener("click", () => this.#toggle());
  }

  #toggle() {
    this.isOpen = !this.isOpen;
    this.button.setAttribute("aria-expanded", String(this.isOpen));
    this.more.hidden = !this.isOpen;
    if (this.isOpen) tell(this.box, this.record, this.names);
  }
}

function bar(record) {
  const total = record.total_ms || 1;
  const parts = segmentsOf(record).filter(([, from, to]) => to > from);
  const spoken = parts.map(([kind, from, to]) => `${kind === "alone" ? "prefill by decode" : kind} ${ms(to - from)}`);
  const element = h("div", { class: "bar", role: "img", "aria-label": spoken.join(", ") || "nothing", title: spoken.join("\n") });
  for (const [kind, from, to] of parts) {
    const part = h("i", { class: `seg ${kind}` });
    part.style.width = `${((to - from) / total) * 100}%`;
    element.append(part);
  }
  return element;
}
