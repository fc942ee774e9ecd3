// Requests to the server that this page came from. Every error has a sentence for people as its message.

const KEY = "pyfasa-api-key";

/** The server refused; `status` is that of HTTP. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

async function sentence(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered with status ${answer.status}.`;
  }
}

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer; is pyfasa serve still running?");
  }
  if (!answer.ok) throw new Refused(answer.status, await sentence(answer));
  return answer;
}

/** Names of the models. */
export async function models() {
  return (await (await request("v1/models")).json()).data.map((model) => model.id);
}

/** Why decoding is dense, as a sentence; null when it is not. */
export async function denseReason() {
  return (await (await request("health")).json()).fasa.reason;
}

const SAMPLE = /^pyfasa_(\w+?)(?:_total)?(?:\{\w+="([^"]*)"\})? (\S+)$/gm;

/** Numbers by name, without `pyfasa_` and `_total`; of those with a label, numbers by label. */
export async function metrics() {
  const text = await (await request("metrics")).text();
  const found = { nodes: {}, requests: {} };
  for (const [, name, label, value] of text.matchAll(SAMPLE)) {
    if (label === undefined) found[name] = Number(value);
    else found[name][label] = Number(value);
  }
  return found;
}

/** The choices of a streamed answer as they come. */
export async function* answer(body, signal) {
  const reply = await request("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let complete = false;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      part = { done: true };
    }
    if (part.done && complete) return;
    if (part.done) throw new Error("The server went away before the answer was complete.");
    const events = (rest + part.value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data:")) continue; // a ping
      const data = event.slice(5).trim();
      if (data === "[DONE]") {
        complete = true; // the end of the connection follows
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(500, chunk.error.message);
      yield chunk.choices[0];
    }
  }
}
