// The end of one instance's log, followed.
import { get } from "./stream.js";
import { $, h, text } from "./util.js";

const EVERY_MS = 1000;
const MAX_LINES = 1000;

export class Logs {
  #names = "";
  #name = "";
  #position = "";
  #timer = 0;
  #turn = 0;

  constructor() {
    $("log-name").addEventListener("change", () => this.#choose($("log-name").value));
  }

  /** Of the instances that are there; one that has gone stays, since its last words matter most. */
  names(names) {
    const wanted = [...new Set([...names, "proxy", ...(this.#name ? [this.#name] : [])])];
    if (wanted.join("\n") === this.#names) return;
    this.#names = wanted.join("\n");
    const options = wanted.map((name) => h("option", { value: name }, name));
    $("log-name").replaceChildren(h("option", { value: "" }, "choose one"), ...options);
    $("log-name").value = this.#name;
  }

  open(name) {
    $("log-name").value = name;
    this.#choose(name);
    $("log-title").scrollIntoView({ block: "start" });
    $("log-name").focus({ preventScroll: true });
  }

  #choose(name) {
    this.#name = name;
    this.#position = "";
    this.#turn++;
    $("log").replaceChildren();
    this.#say(name ? "asking ..." : "Choose an instance to follow the end of its log.");
    if (name) this.#follow(this.#turn);
  }

  #say(what) {
    text($("log-says"), what);
    $("log-says").hidden = !what;
    $("log").hidden = Boolean(what) && !$("log").childElementCount;
  }

  async #follow(turn) {
    clearTimeout(this.#timer);
    if (!document.hidden) {
      const query = this.#position ? `after=${this.#position}` : "lines=200";
      try {
        const found = await get(`/dashboard/logs/${encodeURIComponent(this.#name)}?${query}`);
        if (turn !== this.#turn) return;
        this.#show(found);
      } catch (error) {
        if (turn !== this.#turn) return;
        this.#say(error.status ? error.message : "The proxy doesn't answer; what is below may be old.");
      }
    }
    this.#timer = setTimeout(() => this.#follow(turn), EVERY_MS);
  }

  #show(found) {
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
    if (found.fresh) log.replaceChildren();
    this.#position = found.position;
    log.append(...found.lines.map((line) => h("div", { class: levelOf(line) }, line || " ")));
    while (log.childElementCount > MAX_LINES) log.firstChild.remove();
    this.#say(found.missing ?? (log.childElementCount ? "" : "The log is empty so far."));
    if (found.lines.length && (atEnd || found.fresh)) log.scrollTop = log.scrollHeight;
  }
}

function levelOf(line) {
  if (/\b(ERROR|CRITICAL|Traceback)\b/.test(line)) return "error";
  return /\bWARN(ING)?\b/.test(line) ? "warning" : "plain";
}
