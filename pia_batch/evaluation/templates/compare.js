"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const make = (tag, text, kind) => { const node = document.createElement(tag); if (text !== undefined) node.textContent = text; if (kind) node.className = kind; return node; };
const shown = (value) => value === null || value === undefined ? "–" : Math.abs(value) >= 10000 ? Math.round(value).toLocaleString("en") : value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
const signed = (value) => value === null ? "–" : (value > 0 ? "+" : "") + shown(value);
const direction = (measure, change) => !change || measure.better === "neither" ? "" : (change > 0) === (measure.better === "higher") ? "better" : "worse";
const still = matchMedia("(prefers-reduced-motion: reduce)");
const state = { current: 0, view: "both", playing: !still.matches, frame: 0, measure: 0, order: [] };

function plot(found) {
  const span = Math.max(Math.abs(found.low), Math.abs(found.high)) || 1;
  const x = (value) => 80 + 74 * value / span;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 160 16");
  svg.setAttribute("aria-hidden", "true");
  const add = (name, attributes) => { const node = document.createElementNS(svg.namespaceURI, name); for (const key in attributes) node.setAttribute(key, attributes[key]); svg.append(node); };
  add("line", { x1: 80, x2: 80, y1: 0, y2: 16 });
  add("line", { x1: x(found.low), x2: x(found.high), y1: 8, y2: 8, class: "range" });
  add("circle", { cx: x(found.difference), cy: 8, r: 5 });
  return svg;
}

function figures() {
  const group = data.groups[byId("group").value];
  const rows = data.measures.filter((measure) => group[measure.name]).map((measure) => {
    const found = group[measure.name];
    const row = make("tr");
    const sure = found.low > 0 || found.high < 0;
    const difference = make("td", signed(found.difference), sure ? direction(measure, found.difference) : "");
    const cell = make("td", undefined, "plot " + difference.className);
    cell.append(plot(found));
    const name = make("th", measure.name);
    if (measure.unit) name.append(" ", make("span", measure.unit, "unit"));
    const [a, b] = [make("td", shown(found.mean_a)), make("td", shown(found.mean_b))];
    [a.dataset.name, b.dataset.name, difference.dataset.name] = ["A", "B", "B − A"]; // of columns without a head, on narrow screens
    row.append(name, a, b, difference, make("td", signed(found.low) + " … " + signed(found.high), "interval"), cell, make("td", String(found.count), "count"));
    return row;
  });
  byId("figures").tBodies[0].replaceChildren(...rows);
}

const cards = data.shown.map((pair, index) => {
  const card = make("li");
  card.tabIndex = -1;
  const name = make("p", pair.key + " ", "name");
  name.append(make("small", pair.other_prompt === null ? pair.prompt : "A: " + pair.prompt + " · B: " + pair.other_prompt));
  card.append(name);
  if (pair.video) {
    const canvas = make("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", "A and B of " + pair.key);
    card.append(canvas);
  } else card.append(make("div", "no clip: " + pair.problem, "none"));
  const table = make("table");
  const head = make("tr");
  head.append(make("th", ""), make("th", "A", "a"), make("th", "B", "b"), make("th", "B − A"));
  table.append(head);
  data.measures.forEach((measure, at) => {
    const [a, b] = [pair.a[at], pair.b[at]];
    if (a === null && b === null) return;
    const change = a === null || b === null ? null : b - a;
    const row = make("tr");
    row.dataset.measure = at;
    row.append(make("th", measure.name), make("td", shown(a)), make("td", shown(b)), make("td", signed(change), direction(measure, change)));
    table.append(row);
  });
  const box = make("div", undefined, "scroll");
  box.append(table);
  card.append(box);
  card.addEventListener("click", () => select(state.order.indexOf(index), false));
  return { card, pair, canvas: card.querySelector("canvas"), frames: null, loading: false };
});

async function load(entry) {
  if (entry.frames || entry.loading || !entry.canvas) return;
  entry.loading = true;
  const video = document.createElement("video");
  video.muted = true;
  video.preload = "auto";
  video.src = entry.pair.video;
  const frames = [];
  try {
    await new Promise((done, failed) => { video.onloadeddata = done; video.onerror = () => failed(new Error("this browser does not play H.264")); });
    for (let k = 0; k < entry.pair.frames; k++) {
      await new Promise((done) => { video.onseeked = done; video.currentTime = (k + 0.5) / entry.pair.fps; });
      frames.push(await createImageBitmap(video));
    }
    entry.frames = frames;
    paint(entry);
  } catch (problem) { entry.canvas.replaceWith(make("div", problem.message, "none")); entry.canvas = null; }
  entry.loading = false;
}

function paint(entry) {
  if (!entry.frames || !entry.canvas) return;
  const { width, height } = entry.pair;
  const half = width / 2;
  const image = entry.frames[state.frame % entry.frames.length];
  const wide = state.view === "both" ? width : half;
  if (entry.canvas.width !== wide || entry.canvas.height !== height) { entry.canvas.width = wide; entry.canvas.height = height; }
  const context = entry.canvas.getContext("2d");
  context.globalCompositeOperation = "source-over";
  if (state.view === "both") context.drawImage(image, 0, 0);
  else context.drawImage(image, state.view === "b" ? half : 0, 0, half, height, 0, 0, half, height);
  if (state.view === "difference") { context.globalCompositeOperation = "difference"; context.drawImage(image, half, 0, half, height, 0, 0, half, height); brighten(context, half, height); }
}

function brighten(context, width, height) {  // differences are small: show them eight times as bright
  context.globalCompositeOperation = "lighter";
  for (let times = 0; times < 3; times++) context.drawImage(context.canvas, 0, 0, width, height, 0, 0, width, height);
}

const visible = new Set();
const watcher = new IntersectionObserver((entries) => entries.forEach((each) => {
  const entry = cards.find((one) => one.card === each.target);
  if (each.isIntersecting) { visible.add(entry); load(entry); paint(entry); } else { visible.delete(entry); if (entry.frames) { entry.frames.forEach((frame) => frame.close()); entry.frames = null; } }
}), { rootMargin: "300px" });
const paintAll = () => visible.forEach(paint);

function select(place, scroll = true) {
  if (!cards.length) return;
  state.current = Math.max(0, Math.min(cards.length - 1, place));
  cards.forEach(({ card }) => card.classList.remove("current"));
  const { card } = cards[state.order[state.current]];
  card.classList.add("current");
  if (scroll) { card.focus({ preventScroll: true }); card.scrollIntoView({ block: "start" }); }
}

function sort() {
  state.measure = Number(byId("measure").value);
  const change = ({ pair }) => { const [a, b] = [pair.a[state.measure], pair.b[state.measure]]; return a === null || b === null ? -1 : Math.abs(b - a); };
  state.order = cards.map((_, index) => index).sort((one, other) => change(cards[other]) - change(cards[one]) || one - other);
  byId("pairs").replaceChildren(...state.order.map((index) => cards[index].card));
  document.querySelectorAll("#pairs tr[data-measure]").forEach((row) => row.classList.toggle("sorted", Number(row.dataset.measure) === state.measure));
  select(0, false);
}

function view(name) { state.view = name; byId("view").value = name; paintAll(); }
function play(on) { state.playing = on; byId("play").textContent = on ? "Pause" : "Play"; }

const actions = {
  j: () => select(state.current + 1), k: () => select(state.current - 1),
  ArrowDown: () => select(state.current + 1), ArrowUp: () => select(state.current - 1),
  " ": () => play(!state.playing),
  ArrowRight: () => { play(false); state.frame += 1; paintAll(); },
  ArrowLeft: () => { play(false); state.frame = Math.max(0, state.frame - 1); paintAll(); },
  a: () => view("a"), b: () => view("b"), s: () => view("both"), d: () => view("difference"),
  m: () => { byId("measure").value = String((state.measure + 1) % data.measures.length); sort(); },
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT" || !actions[event.key] || (event.key === " " && event.target.tagName === "BUTTON")) return;
  event.preventDefault();
  actions[event.key]();
});

for (const group in data.groups) byId("group").append(new Option(group, group));
data.measures.forEach((measure, at) => byId("measure").append(new Option(measure.name, String(at))));
byId("group").addEventListener("change", figures);
byId("measure").addEventListener("change", sort);
byId("view").addEventListener("change", (event) => view(event.target.value));
byId("play").addEventListener("click", () => play(!state.playing));
byId("group").closest("label").hidden = Object.keys(data.groups).length < 2;
play(state.playing);
figures();
sort();
cards.forEach(({ card }) => watcher.observe(card));
let last = 0;
requestAnimationFrame(function tick(now) {
  const rate = cards.length ? cards[state.order[state.current]].pair.fps || 8 : 8;
  if (state.playing && now - last >= 1000 / rate) { last = now; state.frame += 1; paintAll(); }
  requestAnimationFrame(tick);
});
