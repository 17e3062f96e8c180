// Requests as dots that move between the cards. Draws nothing while nothing moves.
import { $, isStill, svg } from "./util.js";

const MAX_DOTS = 160;
const MAX_GHOSTS = 12; // at once, of requests that were over before they were seen
const LEG_MS = 520;
const DOCK_COLUMNS = 3;
const DOCK_ROWS = 4;
const STEP = 9;

export class Flow {
  #lanes;
  #dots = new Map();
  #ghosts = new Set();
  #frame = 0;
  #box = null;
  #anchors = new Map();

  constructor(lanes) {
    this.#lanes = lanes;
    lanes.onlayout = () => this.#layoutSoon();
    new ResizeObserver(() => this.#layoutSoon()).observe($("road"));
  }

  start(open) {
    this.clear();
    this.#layout();
    this.move(open, [], [], true);
  }

  clear() {
    $("dots").replaceChildren();
    this.#dots.clear();
    this.#ghosts.clear();
  }

  move(moved, gone, ended, atOnce = false) {
    const outcomes = new Map(ended.filter((record) => record.serial).map((record) => [record.serial, record]));
    for (const [serial, phase, prefill, decode] of moved) this.#set(serial, phase, prefill, decode, atOnce);
    for (const serial of gone) this.#leave(serial, outcomes.get(serial)?.outcome ?? "ok");
    const unseen = [...outcomes.values()].filter((record) => !gone.includes(record.serial) && !this.#dots.has(record.serial));
    for (const record of unseen) this.#ghost(record);
    this.#dock();
    this.#wake();
  }

  #set(serial, phase, prefill, decode, atOnce) {
    let dot = this.#dots.get(serial);
    if (!dot) {
      if (this.#dots.size >= MAX_DOTS) return;
      dot = new Dot(this.#proxy());
      this.#dots.set(serial, dot);
    }
    dot.atOnce = atOnce;
    dot.prefill = prefill;
    dot.decode = decode;
    dot.setPhase(phase);
  }

  #leave(serial, outcome) {
    const dot = this.#dots.get(serial);
    if (!dot) return;
    this.#dots.delete(serial);
    if (isStill()) return dot.remove();
    if (outcome !== "ok") dot.setPhase("bad");
    this.#ghosts.add(dot);
    const card = this.#anchor("D", dot.decode);
    const end = card && outcome === "ok" ? { x: card.right + 46, y: card.y } : { x: dot.x + 4, y: dot.y + 30 };
    dot.follow([end], true);
  }

  #ghost(record) {
    if (isStill() || document.hidden || this.#ghosts.size >= MAX_GHOSTS || !record.decode) return;
    const decode = this.#anchor("D", record.decode);
    if (!decode) return;
    const prefill = record.prefill && this.#anchor("P", record.prefill);
    const dot = new Dot(this.#proxy());
    dot.setPhase(record.outcome !== "ok" ? "bad" : "decode");
    dot.follow([...(prefill ? through(prefill) : []), ...through(decode), { x: decode.right + 46, y: decode.y }], true);
    this.#ghosts.add(dot);
  }

  /** Gives each dot its place beside the card where it is. */
  #dock() {
    const taken = new Map();
    for (const dot of this.#dots.values()) {
      const [key, base, sign] = this.#place(dot);
      const index = Math.min(taken.get(key) ?? 0, DOCK_COLUMNS * DOCK_ROWS - 1);
      taken.set(key, index + 1);
      const column = index % DOCK_COLUMNS;
      const row = Math.floor(index / DOCK_COLUMNS);
      const y = base.y + (row % 2 ? -1 : 1) * Math.ceil(row / 2) * STEP;
      dot.goTo({ x: base.x + sign * (8 + column * STEP), y }, this.#via(dot));
    }
  }

  #place(dot) {
    const proxy = this.#proxy();
    const side = { queue: null, prefill: ["P", dot.prefill, -1], handoff: ["D", dot.decode, -1], alone: ["D", dot.decode, -1], decode: ["D", dot.decode, 1] }[dot.phase];
    const anchor = side && this.#anchor(side[0], side[1]);
    if (!anchor) return ["queue", proxy, 1];
    return [side.join(" "), { x: side[2] > 0 ? anchor.right : anchor.left, y: anchor.y }, side[2]];
  }

  /** Cards that it goes through on its way from where it was to where it is now. */
  #via(dot) {
    const isPast = (phase) => ["queue", "prefill", "handoff", "decode"].indexOf(phase);
    const prefill = dot.prefill && isPast(dot.was) < 2 && isPast(dot.phase) > 1 && this.#anchor("P", dot.prefill);
    const decode = dot.was !== "decode" && dot.phase === "decode" && this.#anchor("D", dot.decode);
    const via = [...(prefill ? through(prefill) : []), ...(decode ? through(decode) : [])];
    dot.was = dot.phase;
    return via;
  }

  #proxy() {
    return this.#anchors.get("proxy") ?? { x: 0, y: 0 };
  }

  #anchor(role, address) {
    return this.#anchors.get(`${role} ${address}`);
  }

  #layoutSoon() {
    if (this.#box) return;
    this.#box = requestAnimationFrame(() => {
      this.#box = null;
      this.#layout();
      for (const dot of this.#dots.values()) dot.atOnce = true;
      this.#dock();
      this.#wake();
    });
  }

  /** Measures once, not at every frame. */
  #layout() {
    const road = $("road").getBoundingClientRect();
    const flow = $("flow");
    flow.setAttribute("width", road.width);
    flow.setAttribute("height", road.height);
    const at = (element) => {
      const box = element.getBoundingClientRect();
      return { left: box.left - road.left, right: box.right - road.left, y: box.top - road.top + box.height / 2, bottom: box.bottom - road.top };
    };
    this.#anchors.clear();
    const proxy = at($("proxy"));
    const beside = at($("lane-P")).left > proxy.right;
    this.#anchors.set("proxy", beside ? { x: proxy.right, y: proxy.y } : { x: proxy.left + 12, y: proxy.bottom + 6 });
    for (const role of ["P", "D"])
      for (const instance of this.#lanes.all(role))
        this.#anchors.set(`${role} ${instance.address}`, at(this.#lanes.element(role, instance.address)));
    this.#drawLinks(beside);
  }

  #drawLinks(beside) {
    const links = [];
    const proxy = this.#proxy();
    const isOpen = (instance) => instance.state === "ready";
    for (const p of this.#lanes.all("P")) {
      const from = this.#anchor("P", p.address);
      if (beside) links.push(link(proxy, { x: from.left, y: from.y }, isOpen(p), "p"));
      for (const d of this.#lanes.all("D")) {
        const to = this.#anchor("D", d.address);
        if (p.kind === d.kind) links.push(link({ x: from.right, y: from.y }, { x: to.left, y: to.y }, isOpen(p) && isOpen(d), "kv"));
      }
    }
    for (const d of this.#lanes.all("D")) {
      const from = this.#anchor("D", d.address);
      links.push(link({ x: from.right, y: from.y }, { x: from.right + 40, y: from.y }, isOpen(d), "d"));
    }
    $("links").replaceChildren(...links);
  }

  #wake() {
    if (!this.#frame) this.#frame = requestAnimationFrame((now) => this.#draw(now));
  }

  #draw(now) {
    this.#frame = 0;
    let moving = false;
    for (const dot of [...this.#dots.values(), ...this.#ghosts]) {
      const goes = dot.draw(now);
      if (!goes && this.#ghosts.delete(dot)) dot.remove();
      moving ||= goes;
    }
    if (moving) this.#wake();
  }
}

/** In at the left, out at the right: what happens inside isn't shown by a dot over the card's text. */
const through = (card) => [{ x: card.left - 4, y: card.y }, { x: card.right + 4, y: card.y, jumps: true }];

function link(from, to, isOpen, kind) {
  const middle = (from.x + to.x) / 2;
  return svg("path", { class: `way ${kind}${isOpen ? "" : " shut"}`, d: `M${from.x} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${to.x} ${to.y}` });
}

class Dot {
  #way = [];
  #from = null;
  #startedAt = 0;
  #fades = false;

  constructor({ x, y }) {
    this.x = x;
    this.y = y;
    this.was = "queue";
    this.phase = "";
    this.element = svg("circle", { r: 3.6, class: "dot" });
    $("dots").append(this.element);
  }

  setPhase(phase) {
    if (phase === this.phase) return;
    this.phase = phase;
    this.element.setAttribute("class", `dot ${phase}`);
  }

  goTo(target, via) {
    const end = this.#way.at(-1) ?? this;
    if (end.x === target.x && end.y === target.y) return;
    if (this.atOnce || isStill()) {
      this.#way = [];
      this.x = target.x;
      this.y = target.y;
      this.#paint(1);
      this.atOnce = false;
    } else this.follow([...via, target], false);
  }

  follow(way, fades) {
    this.#way = way;
    this.#from = null;
    this.#fades = fades;
  }

  /** False when it has arrived. */
  draw(now) {
    if (this.#way[0]?.jumps) ({ x: this.x, y: this.y } = this.#way.shift());
    const target = this.#way[0];
    if (!target) return false;
    if (!this.#from) {
      this.#from = { x: this.x, y: this.y };
      this.#startedAt = now;
    }
    const share = Math.min(1, (now - this.#startedAt) / (this.#way.length > 1 ? LEG_MS / 2 : LEG_MS));
    const eased = share < 0.5 ? 2 * share * share : 1 - (2 - 2 * share) ** 2 / 2;
    const from = this.#from;
    this.x = from.x + (target.x - from.x) * eased;
    // Along the links: they leave and arrive level.
    const level = eased * eased * (3 - 2 * eased);
    this.y = from.y + (target.y - from.y) * level;
    this.#paint(this.#fades && this.#way.length === 1 ? 1 - eased : 1);
    if (share === 1) {
      this.#way.shift();
      this.#from = null;
    }
    return this.#way.length > 0;
  }

  #paint(opacity) {
    this.element.setAttribute("cx", this.x.toFixed(1));
    this.element.setAttribute("cy", this.y.toFixed(1));
    this.element.style.opacity = opacity;
  }

  remove() {
    this.element.remove();
  }
}
