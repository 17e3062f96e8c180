// The proxy's events, by fetch: EventSource can't send the key. Comes back by itself, with a longer pause each time.

const KEY = "twolane-key";
const SILENCE_MS = 6000; // a sample comes every second: longer than this means that nobody is there
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 8000;

const saved = () => {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
};
let key = saved();

export function ask(path) {
  return { cache: "no-store", headers: key ? { Authorization: `Bearer ${key}` } : {}, path };
}

/** JSON of one of the proxy's pages; throws an Error that says why not, with `status`. */
export async function get(path) {
  const answer = await fetch(path, ask(path));
  const body = await answer.json().catch(() => ({}));
  if (answer.ok) return body;
  throw Object.assign(new Error(body.error?.message ?? `HTTP ${answer.status}`), { status: answer.status });
}

export class Stream {
  #on;
  #wake = () => {};

  /** `on`: event(name, data), live(), lost(why, pauseMs), needsKey(wasWrong). */
  constructor(on) {
    this.#on = on;
    addEventListener("online", () => this.#wake());
  }

  tryNow() {
    this.#wake();
  }

  useKey(given) {
    key = given;
    try {
      sessionStorage.setItem(KEY, given);
    } catch {
      // Kept for as long as the page is.
    }
    this.#wake();
  }

  async run() {
    for (let failures = 0; ; failures++) {
      const { why, status, told } = await this.#once();
      if (told) failures = 0;
      if (status === 401) {
        this.#on.needsKey(key !== "");
        await this.#pause(2 ** 31 - 1);
        failures = -1;
        continue;
      }
      const longest = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** failures);
      const pauseMs = longest * (0.75 + Math.random() / 4);
      this.#on.lost(why, pauseMs);
      await this.#pause(pauseMs);
    }
  }

  #pause(forMs) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, forMs);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  /** One connection, until it ends. */
  async #once() {
    const cut = new AbortController();
    let why = "The proxy doesn't answer";
    let told = false;
    let timer = 0;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => cut.abort(), SILENCE_MS);
    };
    try {
      alive();
      const answer = await fetch("/dashboard/events", { ...ask(), signal: cut.signal });
      if (!answer.ok) {
        const body = await answer.json().catch(() => ({}));
        return { why: `The proxy says: ${body.error?.message ?? answer.status}`, status: answer.status, told };
      }
      for await (const [name, data] of events(answer.body, alive)) {
        if (name === "bye") why = "The proxy was stopped";
        else if (name === "hello") this.#on.live();
        told = true;
        this.#on.event(name, data);
      }
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof TypeError)) console.error(error);
    } finally {
      clearTimeout(timer);
      cut.abort();
    }
    return { why, status: 0, told };
  }
}

async function* events(body, alive) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    alive();
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [, name] = part.match(/^event: (.*)$/m) ?? [];
      const [, data] = part.match(/^data: (.*)$/m) ?? [];
      if (name && data) yield [name, JSON.parse(data)];
    }
  }
}
