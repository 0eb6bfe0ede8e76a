// The page: live events or a recorded run on the left, the chunk in the middle, questions about the frame on the right.
import { countVisible, drawChunk, lastRound } from "/page/chunk.js";

const $ = (id) => document.getElementById(id);
const ROUND_MS = 220, RETRY_MS = 2000;
let key = sessionStorage.getItem("key") || "";
let chunk = null, round = 0, playing = true, latestImage = "", shown = null;  // shown: the episode on the page

function headers(more = {}) {
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (response.status === 401) askForKey();
  if (!response.ok) throw new Error((await response.json()).error?.message ?? response.statusText);
  return response.json();
}

function askForKey() {
  $("key-form").hidden = false;
  setStatus("needs a key", "off");
}

function setStatus(text, kind) {
  $("status").textContent = text;
  $("status").className = `pill ${kind}`;
}

// ------------------------------------------------------------------------------------------------- server-sent events

// fetch instead of EventSource, which cannot send a key. Calls take(data) for every "data:" line of the stream.
async function readEvents(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) take(line.slice(6));
  }
}

async function follow() {
  for (;;) {
    try {
      const response = await fetch("/events", { headers: headers() });
      if (response.status === 401) { askForKey(); return; }
      if (!response.ok) throw new Error(response.statusText);
      setStatus("live", "on");
      await readEvents(response, (data) => take(JSON.parse(data)));
    } catch { /* the server is away: try again */ }
    setStatus("connecting", "");
    await new Promise((done) => setTimeout(done, RETRY_MS));
  }
}

function take(event) {
  const id = `${event.run}/${event.task}/${event.episode}`;
  if (event.kind === "start" || shown === null) shown = id;  // several episodes may run: show the newest
  if (id !== shown || $("source").value !== "") return;
  if (event.instruction) $("instruction").textContent = event.instruction;
  const place = `${event.run}, task ${event.task}, episode ${event.episode}`;
  if (event.kind === "frame" && event.image) showFrame(event.image, `${place}, step ${event.step}`);
  if (event.kind === "chunk" && event.actions.length) showChunk(event);
  if (event.kind === "end") {
    $("episode-facts").textContent = `${place}: ${event.success ? "solved" : "not solved"} after ${event.step} frames`;
    shown = null;
  }
}

function showFrame(base64, facts) {
  const kind = base64.startsWith("iVBOR") ? "png" : "jpeg";
  const image = new Image();
  image.onload = () => {
    const canvas = $("frame");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    canvas.dataset.frames = Number(canvas.dataset.frames || 0) + 1;
  };
  latestImage = `data:image/${kind};base64,${base64}`;
  image.src = latestImage;
  $("episode-facts").textContent = facts;
}

// ---------------------------------------------------------------------------------------------------------- the chunk

function showChunk(event) {
  chunk = event;
  round = 0;
  $("round").max = lastRound(chunk);
  draw();
}

function draw() {
  if (!chunk) return;
  drawChunk($("chunk"), chunk, round);
  $("round").value = round;
  const total = chunk.actions.length * chunk.actions[0].length;
  $("round-text").textContent = `round ${round} of ${lastRound(chunk)}`;
  const facts = [`${countVisible(chunk, round)} of ${total} slots`];
  if (chunk.rounds) facts.push(`${chunk.rounds} rounds`);
  if (chunk.milliseconds) facts.push(`${chunk.milliseconds.toFixed(1)} ms`);
  $("chunk-facts").textContent = facts.join(", ");
}

setInterval(() => {
  if (!chunk || !playing || round >= lastRound(chunk)) return;
  round += 1;
  draw();
}, ROUND_MS);

$("play").onclick = () => {
  playing = !playing;
  if (playing && chunk && round >= lastRound(chunk)) round = 0;
  $("play").textContent = playing ? "Pause" : "Play";
};
$("round").oninput = () => {
  playing = false;
  $("play").textContent = "Play";
  round = Number($("round").value);
  draw();
};

// ------------------------------------------------------------------------------------------------------- recorded runs

async function listRuns() {
  const { runs } = await get("/runs");
  for (const run of runs) {
    const option = document.createElement("option");
    option.value = run.name;
    option.textContent = `${run.name} (${run.episodes} episodes, ${run.films} films)`;
    $("source").append(option);
  }
}

$("source").onchange = async () => {
  const run = $("source").value;
  $("episode").hidden = !run;
  $("film").hidden = true;
  $("frame").hidden = false;
  if (!run) return;
  const { episodes } = await get(`/runs/${encodeURIComponent(run)}/episodes`);
  $("episode").replaceChildren();
  episodes.forEach((episode, index) => {
    const option = document.createElement("option");
    option.value = index;
    option.textContent = `task ${episode.task}, episode ${episode.episode}: ${episode.error ? "error" : episode.success ? "solved" : "not solved"}${episode.video ? ", film" : ""}`;
    $("episode").append(option);
  });
  $("episode").onchange = () => replay(run, episodes[Number($("episode").value)]);
  const first = episodes.findIndex((episode) => episode.video);
  $("episode").value = Math.max(0, first);
  if (episodes.length) replay(run, episodes[Math.max(0, first)]);
};

async function replay(run, episode) {
  $("instruction").textContent = episode.instruction;
  const facts = [`${episode.steps} steps`];
  if (episode.rounds) facts.push(`${episode.rounds.toFixed(1)} rounds a chunk`);
  if (episode.policy_ms) facts.push(`${episode.policy_ms.toFixed(1)} ms a chunk`);
  if (episode.error) facts.push(episode.error);
  $("episode-facts").textContent = facts.join(", ");
  const film = $("film");
  film.hidden = !episode.video;
  $("frame").hidden = Boolean(episode.video);
  if (!episode.video) return;
  const path = episode.video.split("/").map(encodeURIComponent).join("/");
  const response = await fetch(`/runs/${encodeURIComponent(run)}/films/${path}`, { headers: headers() });
  film.src = URL.createObjectURL(await response.blob());
  film.play().catch(() => { /* the reader presses play */ });
}

// What the question is about: the frame of the film where it stands, or the last live one.
function pictureNow() {
  if ($("film").hidden) return latestImage;
  const canvas = document.createElement("canvas");
  canvas.width = $("film").videoWidth;
  canvas.height = $("film").videoHeight;
  canvas.getContext("2d").drawImage($("film"), 0, 0);
  return canvas.toDataURL("image/jpeg");
}

// ----------------------------------------------------------------------------------------------------------- questions

$("ask").onsubmit = async (submitted) => {
  submitted.preventDefault();
  const text = $("question").value.trim() || $("question").placeholder;
  const picture = pictureNow();
  const content = [{ type: "text", text }];
  if (picture) content.unshift({ type: "image_url", image_url: { url: picture } });
  $("answer").replaceChildren();
  $("answer-facts").textContent = "";
  try {
    const { data } = await get("/v1/models");
    if (!data.length) throw new Error("This server has no language model; start it with --vlm.path=FOLDER.");
    const body = { model: data[0].id, messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true }, max_tokens: 128 };
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    await readEvents(response, (data) => { if (data !== "[DONE]") showPiece(JSON.parse(data)); });
  } catch (error) {
    $("answer-facts").textContent = error.message;
    $("answer-facts").className = "facts error";
  }
};

// One piece is one round of the engine: what its drafts brought is coloured, a single token is plain.
function showPiece(piece) {
  if (piece.error) throw new Error(piece.error.message);
  const round = piece.remask;
  const text = piece.choices[0]?.delta?.content;
  if (text) {
    const block = document.createElement("span");
    block.className = round?.accepted > 0 ? "block drafted" : "block";
    block.title = round ? `${round.tokens} tokens in one round, ${round.accepted} of them drafted` : "";
    block.textContent = text;
    $("answer").append(block);
  }
  if (piece.usage) {
    const { completion_tokens: tokens, remask } = piece.usage;
    $("answer-facts").className = "facts";
    $("answer-facts").textContent = remask ? `${tokens} tokens in ${remask.rounds} rounds` : `${tokens} tokens`;
  }
}

// --------------------------------------------------------------------------------------------------------------- start

$("key-form").onsubmit = (submitted) => {
  submitted.preventDefault();
  key = $("key").value;
  sessionStorage.setItem("key", key);
  $("key-form").hidden = true;
  start();
};

function start() {
  listRuns().catch(() => { /* no key yet, or nothing recorded */ });
  follow();
}

start();
