// The chat: turns, documents, the key, and what is said when something goes wrong.

import { Figures, percent, whole } from "./figures.js";
import * as requests from "./requests.js";
import { blocks, element } from "./text.js";

const at = (id) => document.getElementById(id);
const NEAR_END = 60; // pixels from the end of the conversation within which it follows the answer

let messages = []; // as they are sent
let documents = []; // {name, text} before the next question
let running = null; // the AbortController of the answer that is being made
let began = false; // whether it has text
const figures = new Figures(tell);

// ---- what is told --------------------------------------------------------------------------------------

/** While an answer is awaited: what the server does meanwhile. */
function tell(answer, now) {
  if (!running || began) return;
  if (answer.read > 0) {
    const speed = whole(answer.read / Math.max(answer.readSeconds, 1e-9));
    at("status").textContent = `Reading: ${whole(answer.read)} tokens so far, ${speed} tokens/s`;
  } else if (now.requests_queued > 0) at("status").textContent = "Waiting for another request";
}

function fail(error) {
  at("error").hidden = !error;
  at("error").textContent = error ? error.message : "";
  if (error?.status === 401) askForKey();
}

function askForKey() {
  const wrong = requests.key.get() !== "";
  at("key-form").hidden = false;
  at("key-hint").textContent = wrong
    ? "This key is wrong."
    : "The server wants an API key. It is kept in this tab until you close it.";
  at("key-form").classList.toggle("wrong", wrong);
  at("error").hidden = true;
  at("key").focus();
  at("key").select();
}

// ---- turns ---------------------------------------------------------------------------------------------

function follow(change) {
  const box = at("scroll");
  const near = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
  change();
  if (near) box.scrollTop = box.scrollHeight;
}

function addTurn(kind, who) {
  const turn = element("article", "", kind);
  turn.append(element("span", who, "hidden"));
  at("turns").append(turn);
  at("hint").hidden = true;
  return turn;
}

function showQuestion(text, attached) {
  const turn = addTurn("user", "You: ");
  for (const { name } of attached) turn.append(element("span", name, "document"));
  if (text) turn.append(element("p", text));
  at("scroll").scrollTop = at("scroll").scrollHeight;
  return turn;
}

/** Draws an answer as it grows, once per frame. */
function growing(turn) {
  const body = turn.appendChild(element("div"));
  let text = "";
  let frame = 0;
  const show = () => {
    frame = 0;
    follow(() => body.replaceChildren(...blocks(text)));
  };
  return {
    add(piece) {
      text += piece;
      frame ||= requestAnimationFrame(show);
    },
    finish() {
      cancelAnimationFrame(frame);
      show();
      return text;
    },
  };
}

function request() {
  const limit = at("max-tokens").valueAsNumber;
  return {
    model: at("model").value,
    messages,
    temperature: at("temperature").valueAsNumber || 0,
    // the server's default of 1.1 makes it harder to repeat what a document says
    repeat_penalty: 1,
    ...(limit > 0 ? { max_tokens: Math.floor(limit) } : {}),
  };
}

/** What stands below an answer: how it ended, and what the server says that it took. */
function note(reason, stopped, took) {
  const end = stopped ? "Stopped. " : reason === "length" ? "Cut: no more tokens fit or are allowed. " : "";
  if (!took?.decoded) return end;
  return (
    `${end}${whole(took.speed)} tokens/s, ${percent(took.share)} of the cache read` +
    (took.read > 0 ? `, ${whole(took.read)} new token${took.read === 1 ? "" : "s"}` : "")
  );
}

async function ask(text) {
  const attached = documents;
  const kept = messages;
  const content = [...attached.map((document) => document.text), text].filter(Boolean).join("\n\n");
  messages = [...messages, { role: "user", content }];
  documents = [];
  showDocuments();
  fail(null);
  const question = showQuestion(text, attached);
  const turn = addTurn("assistant", "Answer: ");
  const answer = growing(turn);
  const abort = new AbortController();
  setRunning(abort);
  let reason = null;
  let error = null;
  try {
    await figures.begin();
    for await (const choice of requests.answer(request(), abort.signal)) {
      if (choice.delta.content) {
        began = true;
        at("status").textContent = "Answering";
        answer.add(choice.delta.content);
      }
      reason = choice.finish_reason ?? reason;
    }
  } catch (caught) {
    if (!abort.signal.aborted) error = caught;
  }
  const said = answer.finish();
  setRunning(null);
  if (said || !(error || abort.signal.aborted)) {
    messages = [...messages, { role: "assistant", content: said }];
  } else {
    // nothing was said: the question goes back where it can be changed
    messages = kept;
    documents = [...attached, ...documents];
    at("question").value = [text, at("question").value].filter(Boolean).join("\n");
    fit();
    question.remove();
    turn.remove();
    at("hint").hidden = at("turns").childElementCount > 0;
    showDocuments();
  }
  fail(error);
  if (error?.status !== 401) at("question").focus();
  const below = note(reason, abort.signal.aborted, await figures.end());
  if (below) follow(() => turn.append(element("p", below, "note")));
}

function setRunning(abort) {
  running = abort;
  began = false;
  at("send").hidden = abort !== null;
  at("stop").hidden = abort === null;
  at("new").disabled = abort !== null;
  at("turns").setAttribute("aria-busy", String(abort !== null));
  at("status").textContent = abort ? "Waiting for the answer" : "";
}

function send() {
  const text = at("question").value.trim();
  if (running || !(text || documents.length)) return;
  at("question").value = "";
  fit();
  ask(text);
}

// ---- documents -----------------------------------------------------------------------------------------

function showDocuments() {
  at("documents").replaceChildren(
    ...documents.map((document) => {
      const item = element("li", "", "document");
      const size = `${whole(Math.max(document.text.length / 1000, 1))} kB`;
      const remove = element("button", "×");
      remove.type = "button";
      remove.setAttribute("aria-label", `Remove ${document.name}`);
      remove.addEventListener("click", () => {
        documents = documents.filter((other) => other !== document);
        showDocuments();
        at("question").focus();
      });
      item.append(`${document.name} `, element("small", size), remove);
      return item;
    }),
  );
}

async function attach(files) {
  fail(null);
  for (const file of files) {
    const text = await file.text();
    if (text.includes("\0")) fail(new Error(`${file.name} is not a text file.`));
    else if (!text.trim()) fail(new Error(`${file.name} is empty.`));
    else documents = [...documents, { name: file.name, text }];
  }
  showDocuments();
  at("question").focus();
}

// ---- the controls --------------------------------------------------------------------------------------

/** As high as its text, within what the style allows. */
function fit() {
  at("question").style.height = "auto";
  at("question").style.height = `${at("question").scrollHeight + 2}px`;
}

async function connect() {
  try {
    const names = await requests.models();
    const options = names.map((name) => {
      const option = element("option", name.split("/").at(-1));
      option.value = name;
      return option;
    });
    at("model").replaceChildren(...options);
    at("key-form").hidden = true;
    fail(null);
    await figures.refresh();
  } catch (error) {
    fail(error);
  }
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("question").addEventListener("input", fit);
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  messages = [];
  documents = [];
  at("turns").replaceChildren();
  at("hint").hidden = false;
  showDocuments();
  fail(null);
  at("question").focus();
});
at("attach").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", async () => {
  await attach([...at("files").files]);
  at("files").value = ""; // so that the same file can be taken again
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  attach([...event.dataTransfer.files]);
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  requests.key.set(at("key").value.trim());
  connect().then(() => at("key-form").hidden && at("question").focus());
});

connect();
at("question").focus();
