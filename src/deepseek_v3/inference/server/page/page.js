"use strict";
// Sends prompts to this server and shows the answers while they arrive. Text is only ever set as text, never as HTML.

const element = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

let isChat = false;
let conversation = []; // the messages of the chat so far
let running = null; // the AbortController of the answer that is arriving

function headers() {
  const key = element("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function parameters() {
  const found = { stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    const value = element(name).value;
    if (value !== "") found[name] = Number(value);
  }
  if (element("stop_string").value !== "") found.stop = element("stop_string").value;
  return found;
}

function showError(message) {
  element("error").textContent = message;
  element("error").hidden = message === "";
}

function addMessage(title, given) {
  const box = document.createElement("div");
  box.className = "message";
  const heading = document.createElement("h3");
  heading.textContent = title;
  const text = document.createElement("pre");
  const start = document.createElement("span");
  start.className = "given";
  start.textContent = given;
  const answer = document.createElement("span");
  text.append(start, answer);
  box.append(heading, text);
  element("messages").append(box);
  return answer;
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

// Yields the objects of a stream of server-sent events, up to [DONE].
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection was closed before the answer was complete");
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      yield JSON.parse(event.slice(6));
    }
  }
}

// Shows an answer while it arrives; returns its text, also if it was stopped.
async function show(path, body, answer) {
  const start = performance.now();
  let first = null, usage = null, reason = null;
  running = new AbortController();
  try {
    const response = await fetch(path, {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const text = (isChat ? choice.delta.content : choice.text) ?? "";
        if (text !== "") first ??= performance.now();
        answer.append(text);
        reason = choice.finish_reason ?? reason;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "you stopped it";
    else showError(error.message);
  } finally {
    running = null;
  }
  const seconds = (performance.now() - start) / 1000;
  const parts = [];
  if (usage) parts.push(`${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`);
  if (first !== null) parts.push(`the first text after ${((first - start) / 1000).toFixed(2)} s`);
  if (reason) parts.push(`ended: ${reason}`);
  element("status").textContent = parts.join(" · ");
  return answer.textContent;
}

async function send() {
  const prompt = element("prompt").value;
  if (running || (isChat && prompt.trim() === "")) return;
  showError("");
  element("status").textContent = "…";
  element("send").disabled = true;
  element("stop").disabled = false;
  if (isChat) await sendChat(prompt);
  else await show("v1/completions", { prompt, ...parameters() }, addMessage("Continued text", prompt));
  element("send").disabled = false;
  element("stop").disabled = true;
}

async function sendChat(prompt) {
  const system = element("system").value;
  const messages = [...conversation, { role: "user", content: prompt }];
  const given = system === "" ? messages : [{ role: "system", content: system }, ...messages];
  const boxes = [addMessage("You", prompt), addMessage("Model", "")];
  const text = await show("v1/chat/completions", { messages: given, ...parameters() }, boxes[1]);
  if (text === "") { // refused, or stopped before its first text: the prompt stays to be sent again
    for (const box of boxes) box.closest(".message").remove();
    return;
  }
  conversation = [...messages, { role: "assistant", content: text }];
  element("prompt").value = "";
}

function stop() {
  running?.abort();
}

function clearAll() {
  stop();
  conversation = [];
  element("messages").replaceChildren();
  element("status").textContent = "";
  showError("");
}

function setMode(chat) {
  isChat = chat;
  clearAll();
  element("mode-chat").setAttribute("aria-pressed", String(chat));
  element("mode-text").setAttribute("aria-pressed", String(!chat));
  element("system-field").hidden = !chat;
  element("prompt-label").textContent = chat ? "Message" : "Text to continue";
  element("prompt").placeholder = chat ? "Hello" : "def main(";
}

async function describe() {
  const response = await fetch("v1/models", { headers: headers() });
  element("key-field").hidden = response.status !== 401 && element("key").value === "";
  if (!response.ok) {
    element("about").textContent = response.status === 401 ? "This server asks for an API key." : await errorOf(response);
    return;
  }
  const [model] = (await response.json()).data;
  const context = model.max_model_len.toLocaleString("en");
  element("model").textContent = document.title = model.id;
  element("about").textContent =
    `${context} tokens of context · ` +
    (model.has_chat_template ? "takes messages and text" : "continues text: it has no chat template");
  element("modes").hidden = !model.has_chat_template;
  setMode(model.has_chat_template);
}

element("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
element("stop").addEventListener("click", stop);
element("clear").addEventListener("click", clearAll);
element("mode-chat").addEventListener("click", () => setMode(true));
element("mode-text").addEventListener("click", () => setMode(false));
element("key").addEventListener("change", describe);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); }
});
describe().catch((error) => { element("about").textContent = `cannot reach the server: ${error.message}`; });
