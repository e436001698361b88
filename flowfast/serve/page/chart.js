// Reward against NFE: every candidate is a point, whose colour and shape say what became of it.
const KINDS = {  // what it is called, and its shape around a place, in pixels
  unscored: ["not scored", "m0 -4v8"],
  dropped: ["dropped", "m-3 -3l6 6m0 -6l-6 6"],
  kept: ["kept", "m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z"],
  accepted: ["accepted at once", "m0 -4.6l4.4 7.8h-8.8z"],
  best: ["best finished", "m0 -6.5l1.9 4.2l4.6 .5l-3.4 3.1l.9 4.5l-4 -2.3l-4 2.3l.9 -4.5l-3.4 -3.1l4.6 -.5z"],
};
const HEIGHT = 248, LEFT = 44, RIGHT = 14, TOP = 14, FOOT = HEIGHT - 34;

function element(parent, name, attributes, text = "") {
  const made = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
}

export function legend(list) {
  for (const [kind, [word, shape]] of Object.entries(KINDS)) {
    const item = list.appendChild(document.createElement("li"));
    element(item, "svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" });
    element(item.firstChild, "path", { class: kind, d: `M0 0${shape}` });
    item.append(word);
  }
}

function ticks(low, high, count) {  // round numbers from low to high
  const rough = (high - low) / count, ten = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * ten).find((each) => each >= rough), first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, at) => +((first + at) * step).toPrecision(6));
}

export class Chart {
  constructor(svg, budget) {
    Object.assign(this, { svg, budget, points: [], plain: null, path: [], due: false });
    new ResizeObserver(() => this.redraw()).observe(svg);
  }

  redraw() {  // once a frame, however many events there were
    if (!this.due) requestAnimationFrame(() => { this.due = false; this.draw(); });
    this.due = true;
  }

  draw() {
    const { svg, budget, plain } = this, width = svg.clientWidth, end = width - RIGHT;
    const scored = this.points.filter((each) => each.reward !== null), best = scored.findLast((each) => each.status === "best");
    const rewards = scored.map((each) => each.reward).concat(plain ?? []);
    const [least, most] = rewards.length ? [Math.min(...rewards), Math.max(...rewards)] : [0, 1];
    const room = (most - least || 1) * 0.08, low = least - room, high = most + room;
    const x = (nfe) => LEFT + ((end - LEFT) * nfe) / budget, y = (reward) => TOP + ((FOOT - TOP) * (high - reward)) / (high - low);
    const line = (kind, at) => element(svg, "line", { class: kind, x1: LEFT, x2: end, y1: at, y2: at });
    const text = (at, height, words, anchor = "end") => element(svg, "text", { x: at, y: height, "text-anchor": anchor }, words);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.setAttribute("aria-label", `Reward against NFE: ${this.points.length} candidates, ${scored.length} of them scored`
      + (best ? `; the best finished one has ${best.reward.toPrecision(3)}` : ""));
    for (const at of rewards.length ? ticks(low, high, 5) : []) line("grid", y(at)), text(LEFT - 6, y(at) + 4, at);
    for (const at of ticks(0, budget, width > 400 ? 5 : 3)) text(x(at), FOOT + 16, at, x(at) > end - 15 ? "end" : "middle");
    line("axis", FOOT);
    text(end, HEIGHT - 4, "NFE"), text(LEFT, 10, "reward", "start");
    if (plain !== null) line("plain", y(plain));
    const by = new Map(scored.map((each) => [`${[each.chain, each.transition, each.candidate]}`, each]));
    const places = this.path.map((address) => by.get(address)).filter(Boolean);
    element(svg, "polyline", { class: "path", points: places.map((each) => [x(each.nfe), y(each.reward)]).join(" ") });
    for (const [kind, [, shape]] of Object.entries(KINDS)) {  // one path for all of a kind: there may be thousands
      const those = this.points.filter((each) => kind === (each.reward === null ? "unscored" : each.status));
      const place = (each) => `M${x(each.nfe).toFixed(1)} ${(each.reward === null ? FOOT - 5 : y(each.reward)).toFixed(1)}${shape}`;
      element(svg, "path", { class: kind, d: those.map(place).join(""), "data-count": those.length });
    }
    if (plain !== null) text(LEFT + 6, y(plain) - 5, "plain sample", "start");
  }
}
