"use strict";

// The page asks the same routes as any other client. Texts of the model are only ever set as text,
// never as markup.

const $ = (id) => document.getElementById(id);
const LIMIT = 50;
let model = "";

// -- the token ------------------------------------------------------------------------------------

// "hiedit serve" prints the address with the token behind "#", which a browser does not send.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("hiedit-token", given);
  history.replaceState(null, "", location.pathname);
}
$("token").value = sessionStorage.getItem("hiedit-token") || "";
$("token").addEventListener("change", () => {
  sessionStorage.setItem("hiedit-token", $("token").value.trim());
  refresh().catch(complain);
});

function headers() {
  const token = $("token").value.trim();
  return { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
}

// -- talking to the server ------------------------------------------------------------------------

async function call(method, path, body) {
  let response;
  try {
    response = await fetch(path, { method, headers: headers(), body: body && JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer; is hiedit serve still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message || `The server answered with status ${response.status}.`);
  error.status = response.status;
  return error;
}

// Calls take(text) for each piece of a streamed answer.
async function stream(name, question, take) {
  const inChat = form() === "chat";
  const asked = inChat ? { messages: [{ role: "user", content: question }] } : { prompt: question };
  const path = inChat ? "/v1/chat/completions" : "/v1/completions";
  const body = { model: name, ...asked, max_tokens: Number($("tokens").value), stream: true };
  const response = await call("POST", path, body);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      for (const choice of piece.choices) take(choice.text ?? choice.delta.content ?? "");
    }
  }
}

function form() {
  return document.querySelector("input[name=form]:checked").value;
}

// -- asking ---------------------------------------------------------------------------------------

let asking = 0;

async function ask() {
  const question = $("question").value;
  if (!question.trim()) return;
  const turn = ++asking;
  const texts = { unedited: "", edited: "" };
  const button = $("ask").querySelector("button");
  button.disabled = true;
  const one = async (place, name) => {
    const shown = $(place);
    shown.className = "answer waits";
    shown.replaceChildren(...asked(question));
    try {
      await stream(name, question, (text) => {
        if (turn !== asking) return;
        texts[place] += text;
        shown.replaceChildren(...asked(question), texts[place]);
      });
    } catch (error) {
      if (turn === asking) shown.replaceChildren(note("bad", "No answer", error.message));
    }
    if (turn === asking) shown.className = "answer";
  };
  await Promise.all([one("unedited", `${model}:unedited`), one("edited", model)]);
  if (turn !== asking) return;
  button.disabled = false;
  if (texts.edited && texts.edited !== texts.unedited) {
    const [same, rest] = split(texts.edited, texts.unedited);
    $("edited").replaceChildren(...asked(question), same, span("differs", rest));
  }
}

// What was asked stands in front of a text that is continued, not of a chat's answer.
function asked(question) {
  return form() === "chat" ? [] : [span("asked", question)];
}

// The beginning that two texts share, to the end of a word, and the rest of the first.
function split(text, other) {
  let end = 0;
  while (end < text.length && text[end] === other[end]) end += 1;
  while (end > 0 && /\S/.test(text[end - 1])) end -= 1;
  return [text.slice(0, end), text.slice(end)];
}

// -- facts ----------------------------------------------------------------------------------------

async function write() {
  const fact = { prompt: $("prompt").value, answer: $("answer").value };
  if ($("subject").value.trim()) fact.subject = $("subject").value.trim();
  const button = $("fact").querySelector("button");
  button.disabled = true;
  button.textContent = "Writing…";
  $("result").replaceChildren(note("calm", "Writing the fact…", "The models go on answering."));
  try {
    const reply = await (await call("POST", "/edits", fact)).json();
    $("result").replaceChildren(told(reply.data[0]));
    $("question").value = fact.prompt;
    await refresh();
    await ask();
  } catch (error) {
    complain(error);
  } finally {
    button.disabled = false;
    button.textContent = "Write it";
  }
}

function told(result) {
  if (result.status === "known") {
    return note("calm", "The model gives this answer already", "Nothing was changed.");
  }
  const lines = Object.keys(result.before).map((name) => {
    const where = Object.keys(result.before).length > 1 ? `${name}: ` : "";
    return said(`${where}“${clean(result.before[name])}” → “${clean(result.after[name] ?? "")}”`);
  });
  if (result.status === "rolled back") {
    return note("bad", "Not written: a check failed", ...result.problems, ...lines);
  }
  const more = [`${result.layers.length} matrices, ${plural(result.steps, "step")}.`];
  if (result.agreement !== null) more.push(`Agreement on control prompts: ${percent(result.agreement)}.`);
  if (result.earlier) more.push(`Earlier facts still given: ${result.kept} of ${result.earlier}.`);
  if (result.replaces) more.push(`It stands above edit ${result.replaces} of the same prompt.`);
  return note("good", `Written as edit ${result.id}`, ...lines, more.join(" "));
}

async function takeBack(id, button) {
  button.disabled = true;
  try {
    await call("DELETE", `/edits/${id}`);
    $("result").replaceChildren(note("calm", `Edit ${id} is taken back`, "Later edits stay as they are."));
    await refresh();
    await ask();
  } catch (error) {
    button.disabled = false;
    complain(error);
  }
}

function complain(error) {
  $("result").replaceChildren(note("bad", "Not done", error.message));
}

// -- what there is --------------------------------------------------------------------------------

async function refresh() {
  const list = await (await call("GET", "/v1/models")).json();
  const about = list.data[0];
  model = about.id;
  document.title = `hiedit: ${model}`;
  $("about").textContent = `${model} · ${plural(about.edits, "edit")} in place · weights ${about.fingerprint}`;
  $("forms").hidden = !about.chats;
  if (!$("token").value) {
    $("none").textContent = "Give the token to see them.";
    return;
  }
  $("edits").tBodies[0].replaceChildren();
  await show(null);
}

async function show(before) {
  const query = new URLSearchParams({ limit: LIMIT, ...(before && { before }) });
  let page;
  try {
    page = await (await call("GET", `/edits?${query}`)).json();
  } catch (error) {
    if (error.status !== 401) throw error;
    $("none").textContent = "The token is wrong.";
    $("none").hidden = false;
    $("edits").hidden = $("more").hidden = true;
    return;
  }
  $("count").textContent = page.total ? `(${page.total})` : "";
  $("none").textContent = "None yet.";
  $("none").hidden = page.total > 0;
  $("edits").hidden = page.total === 0;
  for (const edit of page.data) $("edits").tBodies[0].append(row(edit));
  $("more").hidden = !page.has_more;
  $("more").onclick = () => show(page.data.at(-1).id).catch(complain);
}

function row(edit) {
  const made = document.createElement("tr");
  const first = (texts) => clean(Object.values(texts)[0] ?? "");
  const each = (take) => edit.facts.map(take).join("\n");
  const cells = [
    String(edit.id),
    each((fact) => fact.request.prompt),
    each((fact) => first(fact.before)),
    each((fact) => first(fact.after)),
    short(edit.layers),
    edit.agreement === null ? "–" : percent(edit.agreement),
  ];
  for (const text of cells) {
    const cell = made.insertCell();
    cell.textContent = text;
  }
  made.cells[4].className = "layers";
  made.cells[4].title = edit.layers.join("\n");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Take back";
  button.setAttribute("aria-label", `Take edit ${edit.id} back`);
  button.addEventListener("click", () => takeBack(edit.id, button));
  made.insertCell().append(button);
  return made;
}

// "model.layers.3.mlp.down_proj, model.layers.4.mlp.down_proj" → "3–4"; other names stay.
function short(layers) {
  const blocks = layers.map((name) => Number(/\.(\d+)\./.exec(name)?.[1]));
  if (blocks.some(Number.isNaN)) return layers.join(", ");
  const parts = [];
  for (const block of [...new Set(blocks)].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && block === last[1] + 1) last[1] = block;
    else parts.push([block, block]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
}

// -- small things ---------------------------------------------------------------------------------

function span(kind, text) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  return made;
}

function said(text) {
  const made = document.createElement("p");
  made.className = "said";
  made.textContent = text;
  return made;
}

function note(kind, title, ...lines) {
  const made = document.createElement("div");
  made.className = `note ${kind}`;
  const head = document.createElement("strong");
  head.textContent = title;
  made.append(head);
  for (const line of lines) {
    if (line instanceof Node) made.append(line);
    else {
      const text = document.createElement("p");
      text.textContent = line;
      made.append(text);
    }
  }
  return made;
}

const clean = (text) => text.replace(/\s+/g, " ").trim();
const percent = (share) => `${Math.round(100 * share)} %`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

document.addEventListener("submit", (event) => {
  event.preventDefault();
  if (event.target.id === "ask") ask().catch(complain);
  else write();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
for (const radio of document.querySelectorAll("input[name=form]")) {
  radio.addEventListener("change", () => {
    document.querySelector("label[for=question]").textContent =
      form() === "chat" ? "Message to the model" : "Text to continue";
  });
}
refresh().catch((error) => {
  $("about").textContent = error.message;
});
