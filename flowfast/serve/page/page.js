// What a person asks becomes POST /v1/searches, and a card that follows its events. Texts are only ever textContent.
import { Chart, legend } from "./chart.js";

const STREAMS = 4;  // a browser has six connections to a server: two stay free for what else is asked
const $ = (id) => document.getElementById(id);
const made = (tag, parent, facts) => Object.assign(parent.appendChild(document.createElement(tag)), facts);
const rewarded = (word, reward) => (reward === null ? word : `${word}: reward ${Number(reward.toPrecision(3))}`);
const small = (event) => event.target.classList.toggle("small", event.target.naturalWidth < 128);
let key = sessionStorage.getItem("flowfast.key") ?? "", streams = 0, live = 0, later = 0, waiting = [];

async function ask(path, options) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { cache: "no-store", headers, ...options }).catch(() => Promise.reject(Error("the server does not answer")));
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  if (answer.status === 401) wantKey();
  throw Object.assign(new Error(error?.message ?? `the server answered ${answer.status}`), { status: answer.status });
}

const forget = (id) => ask(`v1/searches/${id}`, { method: "DELETE" }).catch(() => {});

async function* eventsOf(id, signal) {
  const reader = (await ask(`v1/searches/${id}/events`, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) if (block.startsWith("event:")) yield JSON.parse(block.slice(block.indexOf("data: ") + 6));
  }
}

function wantKey() {
  $("key-error").textContent = key ? "This is not the key of this server." : "";
  $("state").textContent = "needs a key";
  sessionStorage.removeItem("flowfast.key");
  [key, $("ask").hidden, $("key").hidden] = ["", true, false];
  $("key-value").focus();
}

async function watch() {  // what the server offers, and how full it is
  clearTimeout(later);
  try {
    const info = await (await ask("v1/info")).json(), ready = info.status === "ready";
    const queue = `${info.running} running, ${info.waiting} waiting, room for ${info.room} more`;
    $("state").textContent = `${info.models[0]}: ${ready ? queue : info.status}`;
    $("state").dataset.status = info.status;
    if (ready && $("ask").hidden) offer(info);
    later = setTimeout(watch, ready && !live ? 10000 : 1000);
  } catch (error) {
    $("state").dataset.status = "away";
    if (error.status === 401) return;
    $("state").textContent = error.message;
    later = setTimeout(watch, 3000);
  }
}

function offer(info) {
  for (const part of ["method", "reward", "qualities"]) $(part).replaceChildren();
  for (const [name, title] of Object.entries(info.methods)) made("option", $("method"), { textContent: name, title });
  for (const name of info.rewards) made("option", $("reward"), { textContent: name });
  for (const [name, nfe] of Object.entries(info.qualities))
    made("button", $("qualities"), { type: "button", textContent: `${name} ${nfe}`, onclick: () => { $("budget").value = nfe; } });
  Object.assign($("budget"), { max: info.max_budget, value: info.budget });
  $("prompt").placeholder = info.prompt;
  $("ask").hidden = false;
  $("prompt").focus();
}

class Card {
  constructor(request, plain) {
    Object.assign(this, { request, ids: [], stop: new AbortController(), over: false });
    this.root = $("card").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.root.querySelector(name);
    this.say = (status) => { this.root.dataset.status = this.part(".status").textContent = status; };
    this.part("h2").textContent = request.prompt;
    this.part(".asked").textContent = `${request.method}, ${request.budget} NFE, seed ${request.seed}`;
    this.part(".plain").hidden = !plain;
    this.part(".end").onclick = () => this.end();
    this.chart = new Chart(this.part(".chart"), request.budget);
    legend(this.part(".legend"));
    this.say("queued");
    $("cards").prepend(this.root);
    this.run(plain ? [this.search(), this.plain()] : [this.search()]);
  }

  async run(works) {
    live++;
    await Promise.all(works.map((work) => work.catch((error) => {
      this.say(this.stop.signal.aborted ? "cancelled" : "failed");
      if (!this.stop.signal.aborted) this.part(".error").textContent = error.message;
    })));
    live--;
    [this.over, this.part(".end").textContent] = [true, "Remove"];
    watch();
  }

  async begin(request) {
    const { id } = await (await ask("v1/searches", { method: "POST", body: JSON.stringify(request) })).json();
    this.ids.push(id);
    if (this.stop.signal.aborted) forget(id);
    return id;
  }

  async result(id) {
    const found = await (await ask(`v1/searches/${id}`, { signal: this.stop.signal })).json();
    if (found.error || found.status === "aborted") throw new Error(found.error?.message ?? "the server took it back");
    return found.result?.data[0];
  }

  async search() {
    const id = await this.begin({ ...this.request, candidates: true });
    while (streams >= STREAMS) await new Promise((go) => waiting.push(go));
    streams++;
    try {
      for await (const event of eventsOf(id, this.stop.signal)) this.hear(event);
    } finally {
      streams--;
      waiting.shift()?.();
    }
    this.finish(await this.result(id));
  }

  async plain() {  // asked for now and then, without a stream
    const id = await this.begin({ ...this.request, method: "ode" });
    let found;
    while (!(found = await this.result(id))) await new Promise((go) => setTimeout(go, 300));
    this.chart.plain = found.flowfast.reward;
    this.show(".plain", `data:image/png;base64,${found.b64_json}`, rewarded("plain sample", this.chart.plain), found.flowfast.nfe);
    this.chart.redraw();
  }

  hear(event) {
    if (event.type === "search.restarted") this.chart.points.length = 0, this.part(".strip").replaceChildren();
    if (event.type !== "search.progress") return;
    const image = event.b64_json && `data:image/webp;base64,${event.b64_json}`;
    this.say("running");
    this.part("progress").value = event.nfe / event.budget;
    this.show(".best", image, rewarded("best so far", event.best_reward), event.nfe);
    this.chart.points.push(...event.candidates);
    this.chart.redraw();
    if (!image) return;
    const strip = this.part(".strip"), item = made("li", strip);
    made("img", item, { src: image, alt: "", onload: small });
    item.append(`${event.nfe} NFE`);
    strip.scrollLeft = strip.scrollWidth;
  }

  show(figure, src, words, nfe) {
    this.part(`${figure} figcaption`).textContent = `${words}, ${nfe} NFE`;
    if (src) Object.assign(this.part(`${figure} img`), { src, alt: `${words}, of ${this.request.prompt}`, hidden: false, onload: small });
  }

  finish({ b64_json, flowfast }) {
    const { winner } = flowfast, png = Uint8Array.from(atob(b64_json), (letter) => letter.charCodeAt(0));
    const facts = {
      Winner: `chain ${winner.chain}, transition ${winner.transition}, candidate ${winner.candidate}`, Key: winner.key,
      "Reward calls": flowfast.reward_calls, Waited: `${flowfast.queue_s.toFixed(2)} s`, Took: `${flowfast.total_s.toFixed(2)} s`,
    };
    for (const pair of Object.entries(facts)) ["dt", "dd"].forEach((tag, at) => made(tag, this.part(".facts"), { textContent: pair[at] }));
    this.show(".best", this.file(".picture", "png", "image/png", png), rewarded("best", flowfast.reward), flowfast.nfe);
    this.file(".json", "json", "application/json", JSON.stringify({ request: this.request, flowfast }, null, 2));
    this.part(".files").hidden = false;
    this.chart.path = winner.path.map(String);
    this.chart.redraw();
    this.say("finished");
  }

  file(link, ending, type, content) {
    const { prompt, seed } = this.request, name = (prompt.toLowerCase().match(/[a-z0-9]+/g) ?? ["picture"]).join("-").slice(0, 60);
    const href = URL.createObjectURL(new Blob([content], { type }));
    Object.assign(this.part(link), { href, download: `${name}-seed-${seed}.${ending}` });
    return href;
  }

  end() {  // cancels it, or takes its card away
    this.stop.abort();
    this.ids.splice(0).forEach(forget);
    if (!this.over) return this.say("cancelled");
    for (const link of this.root.querySelectorAll(".files a")) URL.revokeObjectURL(link.href);
    this.root.remove();
    $("prompt").focus();
  }
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const asked = { method: $("method").value, reward: $("reward").value, budget: +$("budget").value, seed: +$("seed").value };
  const prompts = $("prompt").value.split("\n").map((line) => line.trim()).filter(Boolean);
  for (const prompt of prompts.reverse()) new Card({ prompt, ...asked }, $("plain").checked);
  $("prompt").select();
  watch();
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), $("ask").requestSubmit();
};
$("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 1e6); };
$("key").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("flowfast.key", key = $("key-value").value.trim());
  $("key").hidden = true;
  $("key").reset();
  watch();
};
watch();
