// One request's events, drawn and listed.
import { get } from "./stream.js";
import { h, ms, svg } from "./util.js";

const WORDS = {
  received: "the proxy has the request",
  admitted: "its turn came",
  prefill_sent: "sent to the prefill instance",
  decode_sent: "sent to the decode instance",
  prefill_accepted: "the prefill engine took it up",
  allocated: "the decode engine has blocks for it",
  announced: "decode told prefill where they are",
  announce_heard: "prefill heard where to",
  prefill_computed: "the prompt's last layer is computed",
  prefill_answered: "the prefill instance has answered",
  pushed: "prefill sent the last of the KV",
  landed: "the last of the KV is in decode's blocks",
  first_step: "the decode engine's first step",
  first_byte: "first token at the proxy",
  last_token: "the decode engine's last token",
  last_byte: "last byte passed on",
};
const LANES = ["proxy", "prefill", "decode"];

/** What is known without asking: the proxy's own moments. */
function own(record) {
  const moments = { received: 0, admitted: record.admitted_ms, prefill_sent: record.prefill_sent_ms, decode_sent: record.decode_sent_ms, prefill_answered: record.prefill_done_ms, first_byte: record.first_byte_ms, last_byte: record.total_ms };
  return Object.entries(moments).filter(([, at]) => at != null).map(([name, at]) => ({ name, by: "proxy", ms: at })).sort((a, b) => a.ms - b.ms);
}

async function eventsOf(record) {
  try {
    const id = record.transfer_id ?? record.request_id;
    return (await get(`/stats/requests/${encodeURIComponent(id)}`)).events;
  } catch {
    return own(record); // forgotten by now, or the proxy is gone
  }
}

/** Fills `box` with all that is known of the request. */
export async function tell(box, record, names) {
  box.replaceChildren(h("p", { class: "hint" }, "asking ..."));
  const events = await eventsOf(record);
  box.replaceChildren(facts(record, names), h("div", { class: "story" }, picture(events), list(events)));
}

function facts(record, [prefill, decode]) {
  const given = {
    "request id": record.request_id,
    "transfer id": record.transfer_id,
    path: record.route,
    prefill: record.prefill && `${prefill} (${record.prefill})`,
    decode: record.decode && `${decode} (${record.decode})`,
    "decode alone because": record.alone_because,
    attempts: record.attempts > 1 ? record.attempts : null,
    status: `${record.status}, ${record.outcome}${record.stream ? ", streamed" : ""}`,
  };
  const known = Object.entries(given).filter(([, value]) => value);
  return h("dl", { class: "facts" }, ...known.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
}

/** Up to the first token, since all that is interesting happens before it: three lines, a mark an event. */
function picture(events) {
  const first = events.find((event) => event.name === "first_byte")?.ms;
  const shown = events.filter((event) => first == null || event.ms <= first);
  const end = Math.max(...shown.map((event) => event.ms), 0.001);
  const x = (at) => 64 + (at / end) * 420;
  const y = (by) => 18 + LANES.indexOf(by) * 30;
  const drawing = svg("svg", { viewBox: "0 0 500 106", role: "img", "aria-label": `Up to the first token: ${shown.map((event) => `${WORDS[event.name] ?? event.name} ${ms(event.ms)}`).join(", ")}.` });
  for (const by of LANES) {
    const label = svg("text", { x: 0, y: y(by) + 4, class: "axis" });
    label.textContent = by;
    drawing.append(label, svg("path", { class: `track ${by}`, d: `M64 ${y(by)}H484` }));
    const mine = shown.filter((event) => event.by === by);
    if (mine.length > 1) drawing.append(svg("path", { class: `busy ${by}`, d: `M${x(mine[0].ms)} ${y(by)}H${x(mine.at(-1).ms)}` }));
  }
  for (const event of shown) {
    const mark = svg("circle", { class: `mark ${event.by}`, cx: x(event.ms), cy: y(event.by), r: 4 });
    const title = svg("title");
    title.textContent = `${ms(event.ms)}: ${WORDS[event.name] ?? event.name}`;
    mark.append(title);
    drawing.append(mark);
  }
  for (const [at, anchor] of [[0, "start"], [end, "end"]]) {
    const label = svg("text", { x: x(at), y: 102, class: "axis", "text-anchor": anchor });
    label.textContent = at ? `${ms(at)}${first == null ? "" : ", first token"}` : "0";
    drawing.append(label);
  }
  return drawing;
}

function list(events) {
  let before = 0;
  const rows = events.map((event) => {
    const step = event.ms - before;
    before = event.ms;
    return h("tr", {}, h("td", { class: "num" }, ms(event.ms)), h("td", { class: "num quiet" }, `+${ms(step)}`), h("td", {}, h("i", { class: `by ${event.by}`, "aria-hidden": "true" }), event.by), h("td", {}, WORDS[event.name] ?? event.name));
  });
  const head = h("tr", {}, ...["At", "Step", "By", "What"].map((name, i) => h("th", { scope: "col", class: i < 2 ? "num" : false }, name)));
  return h("table", { class: "events" }, h("caption", { class: "unseen" }, "Events of the request"), h("thead", {}, head), h("tbody", {}, ...rows));
}
