// Speed, depth and what attention reads, from the server's /metrics, which is asked while the page can be seen.

import { draw } from "./chart.js";
import * as requests from "./requests.js";

const BUSY_MS = 500;
const IDLE_MS = 5000;
const ROOM = 120; // samples of the chart: a minute of work

const at = (id) => document.getElementById(id);
export const whole = (n) => Math.round(n).toLocaleString("en");
export const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;

function sum(numbers) {
  return Object.values(numbers).reduce((total, n) => total + n, 0);
}

/** What happened between two readings of the metrics, as /stats of `pyfasa chat` tells it. */
function difference(now, before) {
  const nodes = {};
  for (const [name, n] of Object.entries(now.nodes)) nodes[name] = n - (before.nodes[name] ?? 0);
  const { prefill, ...counted } = nodes; // a prompt is read densely by design
  const sparse = counted.sparse ?? 0;
  const total = sum(counted);
  const visible = now.cells_visible - before.cells_visible;
  const decoded = now.decode_tokens - before.decode_tokens;
  const attended = now.cells_attended - before.cells_attended;
  return {
    sparse,
    dense: total - sparse,
    share: total && visible ? (sparse / total) * (attended / visible) + 1 - sparse / total : 1,
    decoded,
    speed: decoded > 0 ? decoded / Math.max(now.decode_seconds - before.decode_seconds, 1e-9) : null,
    read: now.prompt_tokens - before.prompt_tokens,
    readSeconds: now.prompt_seconds - before.prompt_seconds,
  };
}

export class Figures {
  #before = null; // metrics when the current answer began
  #latest = null;
  #samples = [];
  #answering = false;
  #timer = 0;
  #working = null;
  #active = null;

  /** told: called after each reading with the difference to the begin of the answer, and the metrics. */
  constructor(told) {
    this.told = told;
    document.addEventListener("visibilitychange", () => this.refresh());
    new ResizeObserver(() => draw(at("chart"), this.#samples)).observe(at("chart"));
  }

  /** An answer begins. */
  async begin() {
    await this.refresh();
    this.#before = this.#latest;
    this.#answering = true;
    this.#plan();
  }

  /** It has ended. What it took; null where the server does not tell. */
  async end() {
    await this.refresh();
    this.#answering = false;
    return this.#before && difference(this.#latest, this.#before);
  }

  /** Reads the metrics now. One at a time; who comes meanwhile gets what is read after it. */
  async refresh() {
    if (this.#working) await this.#working;
    this.#working ??= this.#read().finally(() => (this.#working = null));
    await this.#working;
  }

  async #read() {
    clearTimeout(this.#timer);
    if (document.hidden) return; // asked again once it is seen
    try {
      await this.#take(await requests.metrics());
    } catch (error) {
      // chatting tells of it; figures only stay as they are
      if (error.status === 401) return; // until there is a key
    }
    this.#plan();
  }

  #plan() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    const busy = this.#answering || this.#latest?.requests_in_flight > 0;
    this.#timer = setTimeout(() => this.refresh(), busy ? BUSY_MS : IDLE_MS);
  }

  async #take(now) {
    const last = this.#latest ?? now;
    this.#latest = now;
    // somebody else's answer
    if (!this.#answering && last.requests_in_flight === 0 && now.requests_in_flight > 0) {
      this.#before = last;
    }
    const step = difference(now, last);
    if (step.decoded < 0) this.#samples = []; // another server, which counts from 0
    else if (step.decoded || step.read) {
      this.#samples = [...this.#samples, { speed: step.speed, depth: now.cache_tokens }].slice(-ROOM);
      draw(at("chart"), this.#samples);
    }
    this.#show(now, difference(now, this.#before ?? last));
    if (now.active !== this.#active) await this.#explain(now.active);
  }

  #show(now, answer) {
    at("depth").textContent = whole(now.cache_tokens);
    at("size").textContent = `of ${whole(now.cache_size_tokens)} tokens`;
    if (answer.decoded > 0) {
      at("speed").textContent = whole(answer.speed);
      at("share").textContent = percent(answer.share);
      at("sparse").textContent = whole(answer.sparse);
      at("dense").textContent = whole(answer.dense);
    }
    this.told(answer, now);
  }

  async #explain(active) {
    const reason = active ? null : await requests.denseReason();
    at("reason").hidden = reason === null;
    at("reason").textContent = reason === null ? "" : `Decoding is dense: ${reason}`;
    this.#active = active;
  }
}
