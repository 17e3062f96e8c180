// The instances, a card each, in the two lanes.
import { $, count, h, span, text } from "./util.js";

const STATES = {
  ready: ["●", "ready"],
  starting: ["◔", "starting"],
  ejected: ["✕", "ejected"],
  leaving: ["▷", "leaving"],
  gone: ["○", "gone"],
};
const DENSE_ABOVE = 5; // instances of a lane: then only what matters most of each
const GHOST_MS = 60_000; // one that the proxy has forgotten is still shown for so long
const keyOf = (instance) => `${instance.role} ${instance.address}`;

export class Lanes {
  #cards = new Map();
  #openLog;
  #announce;
  #hasBegun = false;

  constructor(openLog, announce) {
    this.#openLog = openLog;
    this.#announce = announce;
  }

  nameOf(role, address) {
    return this.#cards.get(`${role} ${address}`)?.instance.name ?? address;
  }

  /** The element of the card, for whoever draws to and from it. */
  element(role, address) {
    return this.#cards.get(`${role} ${address}`)?.root;
  }

  /** Instances of a role that are drawn. */
  all(role) {
    return [...this.#cards.values()].map((card) => card.instance).filter((instance) => instance.role === role);
  }

  update(instances, power) {
    const now = Date.now();
    const seen = new Set(instances.map(keyOf));
    for (const instance of instances) this.#show(instance, power);
    for (const [key, card] of this.#cards) {
      if (seen.has(key)) continue;
      if (card.instance.state !== "gone") {
        card.goneAt = now;
        const why = "the proxy hears nothing of it any more";
        this.#show({ ...card.instance, state: "gone", reason: why, in_flight: 0, load: null, engine: null }, power);
      } else if (now - card.goneAt > GHOST_MS) {
        card.root.remove();
        this.#cards.delete(key);
        this.onlayout?.();
      }
    }
    this.#hasBegun = true;
    for (const role of ["P", "D"]) this.#sum(role, power);
    $("road").classList.toggle("dense", Math.max(this.all("P").length, this.all("D").length) > DENSE_ABOVE);
    const empty = instances.length === 0 && this.#cards.size === 0;
    text($("lanes-hint"), empty ? "No instance has registered yet." : "");
  }

  #sum(role, power) {
    const lane = power?.lanes?.[role === "P" ? "prefill" : "decode"];
    const perToken = lane?.joules_per_prompt_token ?? lane?.joules_per_generated_token;
    const parts = [];
    if (lane?.watts != null) parts.push(`${Math.round(lane.watts)} W`);
    if (perToken != null) parts.push(`${perToken.toPrecision(2)} J a ${role === "P" ? "prompt" : "generated"} token`);
    text($(`sum-${role}`), parts.join(" · "));
  }

  #show(instance, power) {
    const key = keyOf(instance);
    let card = this.#cards.get(key);
    if (!card) {
      card = new Card(instance, this.#openLog);
      this.#cards.set(key, card);
      this.#place(instance.role);
      this.onlayout?.();
    }
    const before = card.instance?.state;
    if (this.#hasBegun && before && before !== instance.state) {
      this.#announce(`${instance.name} is ${STATES[instance.state]?.[1] ?? instance.state}.`);
      this.onlayout?.();
    }
    card.show(instance, power);
  }

  /** In the order of names, however they came. */
  #place(role) {
    const byName = new Intl.Collator("en", { numeric: true });
    const mine = [...this.#cards.values()].filter((card) => card.role === role);
    mine.sort((a, b) => byName.compare(a.name, b.name));
    mine.forEach((card, index) => {
      if ($(`lane-${role}`).children[index] !== card.root) $(`lane-${role}`).insertBefore(card.root, $(`lane-${role}`).children[index] ?? null);
    });
  }
}

class Card {
  constructor(instance, openLog) {
    this.role = instance.role;
    this.name = instance.name;
    this.shape = h("span", { class: "shape", "aria-hidden": "true" });
    this.title = h("strong", { class: "name" });
    this.state = h("span", { class: "state" });
    this.log = h("button", { type: "button", class: "small", click: () => openLog(this.instance.name) }, "Log");
    this.flight = h("b");
    this.others = h("span", { class: "others" });
    this.fill = h("i");
    this.kv = h("span", { class: "kv", role: "meter", "aria-valuemin": 0, "aria-valuemax": 100 }, this.fill);
    this.kvText = h("span");
    this.watts = h("span", { class: "watts" });
    this.where = h("span", { class: "where" });
    this.root = h(
      "li",
      { class: "card" },
      h("div", { class: "card-head" }, this.shape, this.title, this.state, this.log),
      h("div", { class: "card-figures" }, h("span", {}, this.flight, " in flight"), this.others, h("span", { class: "kv-box" }, this.kvText, this.kv), this.watts),
      this.where,
    );
  }

  show(instance, power) {
    this.instance = instance;
    const [shape, word] = STATES[instance.state] ?? ["?", instance.state];
    this.root.dataset.state = instance.state;
    text(this.shape, shape);
    text(this.title, instance.name);
    this.title.title = instance.name;
    text(this.state, word);
    this.log.setAttribute("aria-label", `Log of ${instance.name}`);
    text(this.flight, instance.in_flight);
    const waiting = instance.engine?.waiting ?? instance.load?.num_waiting ?? 0;
    text(this.others, [waiting ? `${count(waiting)} waiting` : "", instance.foreign ? `+${instance.foreign} from others` : ""].filter(Boolean).join(", "));
    this.#showKv(instance);
    this.#showPower(instance, power);
  }

  #showKv(instance) {
    const { load, engine } = instance;
    const used = load ? 1 - load.free_blocks / load.num_blocks : engine?.kv_usage;
    const known = used != null && Number.isFinite(used);
    this.kv.parentElement.hidden = !known;
    if (!known) return;
    const percent = Math.round(used * 100);
    text(this.kvText, `KV ${percent} %`);
    this.kv.setAttribute("aria-valuenow", percent);
    this.kv.setAttribute("aria-label", `KV blocks in use on ${instance.name}`);
    this.kv.title = load ? `${load.num_blocks - load.free_blocks} of ${load.num_blocks} blocks` : "";
    this.fill.style.width = `${used * 100}%`;
  }

  #showPower(instance, power) {
    const mine = (power?.gpus ?? []).filter((gpu) => instance.gpus.includes(gpu.uuid));
    const watts = mine.filter((gpu) => gpu.watts != null).reduce((sum, gpu) => sum + gpu.watts, 0);
    text(this.watts, mine.some((gpu) => gpu.watts != null) ? `${Math.round(watts)} W` : "");
    const names = mine.length ? mine.map((gpu) => gpu.index) : instance.gpus.map((uuid) => uuid.replace(/^GPU-/, "").slice(0, 8));
    const gpus = names.length ? `GPU ${names.join(" + ")}` : "";
    const address = instance.name === instance.address ? "" : instance.address;
    const ill = instance.problem || (instance.state === "ready" ? "" : instance.reason);
    const since = instance.state === "ready" || instance.state === "gone" ? "" : `, ${span(instance.state_since_s)} ago`;
    const state = ill ? `${ill}${instance.problem ? "" : since}` : "";
    text(this.where, state || [gpus, address].filter(Boolean).join(" · "));
    this.where.title = [gpus, instance.address, ill].filter(Boolean).join(" · ");
    this.where.classList.toggle("ill", Boolean(ill));
  }
}
