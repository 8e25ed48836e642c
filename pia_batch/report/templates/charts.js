// Four small charts of the rows that are shown, as inline SVG.

const CHART = { width: 320, height: 180, left: 8, right: 8, top: 10, bottom: 24 };
const MOST_BARS = 40;
const RATE_UNITS = [["an hour", 3600e3], ["a minute", 60e3], ["a second", 1e3]]; // of a rate, in ms
const PICK_PX = 14; // largest distance of the pointer from a point that it selects

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, setting] of Object.entries(attributes)) element.setAttribute(name, setting);
  element.append(...children);
  return element;
}

const label = (x, y, text, anchor = "start", className = "") =>
  svg("text", { x, y, "text-anchor": anchor, class: className }, String(text));
const number = (value) => String(+value.toPrecision(value >= 100 ? 3 : 2));

function chartFigure(title, spoken, ...content) {
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", "aria-label": spoken },
    ...content,
  );
  return make("figure", { className: "chart" }, make("figcaption", { textContent: title }), picture);
}

/** Render all charts that these rows have data for; `open` is called with the position of a chosen point. */
function renderCharts(rows, open) {
  const box = document.getElementById("charts");
  const charts = [overTime(rows), seconds(rows), motionAgainstLikeness(rows, open), motionBySetting(rows)];
  box.replaceChildren(...charts.filter(Boolean));
  box.closest("section").hidden = !box.children.length;
}

// --- clips over time ------------------------------------------------------------------------------------------------

function overTime(rows) {
  const times = [];
  for (const row of rows) {
    if (value("run_id", row) === page.run_id && value("attempts", row) > 0)
      times.push([value("finished_at", row), succeeded(row)]);
  }
  if (times.length < 3) return null;
  const ends = times.map(([time]) => time);
  const first = ends.reduce((a, b) => Math.min(a, b));
  const last = ends.reduce((a, b) => Math.max(a, b));
  if (last - first < 1000) return null;
  const bars = Math.min(MOST_BARS, Math.max(4, Math.ceil(Math.sqrt(times.length) * 2)));
  const barMs = (last - first) / bars;
  const [unit, unitMs] = RATE_UNITS.find(([, ms]) => ms <= barMs) ?? RATE_UNITS.at(-1); // a rate that held for all of its unit
  const good = new Float64Array(bars);
  const bad = new Float64Array(bars);
  for (const [time, fine] of times) {
    const bar = Math.min(bars - 1, Math.floor(((time - first) / (last - first)) * bars));
    (fine ? good : bad)[bar] += (page.weights[fine ? "succeeded" : "failed"] * unitMs) / barMs;
  }
  const highest = good.reduce((most, rate, bar) => Math.max(most, rate + bad[bar]), 0);
  const [floor, step] = [CHART.height - CHART.bottom, (CHART.width - CHART.left - CHART.right) / bars];
  const scale = (floor - CHART.top - 14) / highest;
  const shapes = [];
  for (let bar = 0; bar < bars; bar++) {
    const at = { x: (CHART.left + bar * step + 0.5).toFixed(2), width: Math.max(0.5, step - 1).toFixed(2) };
    const [low, high] = [good[bar] * scale, bad[bar] * scale];
    if (low) shapes.push(svg("rect", { ...at, y: floor - low, height: low, class: "good" }));
    if (high) shapes.push(svg("rect", { ...at, y: floor - low - high, height: high, class: "bad" }));
  }
  const day = moment(first).slice(0, 10) === moment(last).slice(0, 10) ? 11 : 5; // with the date if it changes
  const spoken = `Clips ${unit} from ${moment(first)} to ${moment(last)} UTC, at most ${number(highest)}`;
  return chartFigure(
    `Clips ${unit}`,
    spoken,
    svg("path", { class: "axis", d: `M${CHART.left} ${floor}H${CHART.width - CHART.right}` }),
    ...shapes,
    label(CHART.left, CHART.top + 4, `peak ${number(highest)}`, "start", "muted"),
    label(CHART.left, CHART.height - 8, moment(first).slice(day, day === 11 ? 19 : 16)),
    label(CHART.width - CHART.right, CHART.height - 8, `${moment(last).slice(day, day === 11 ? 19 : 16)} UTC`, "end"),
  );
}

// --- spreads --------------------------------------------------------------------------------------------------------

/** Return the 5th, 25th, 50th, 75th and 95th percentile. */
function spread(values) {
  const ordered = Float64Array.from(values).sort();
  return [0.05, 0.25, 0.5, 0.75, 0.95].map((part) => ordered[Math.round(part * (ordered.length - 1))]);
}

/** Build a chart with one line per group: percentiles 5 to 95, the middle half, and the median. */
function spreads(title, groups, ticks, place, unit) {
  const left = 82;
  const right = CHART.width - 62;
  const line = (CHART.height - CHART.top - CHART.bottom) / groups.length;
  const x = (value) => left + place(value) * (right - left);
  const parts = ticks.map((tick) =>
    svg("path", { class: "rule", d: `M${x(tick)} ${CHART.top}V${CHART.height - CHART.bottom}` }),
  );
  parts.push(...ticks.map((tick) => label(x(tick), CHART.height - 8, number(tick), "middle")));
  for (const [index, { name, five }] of groups.entries()) {
    const y = CHART.top + line * (index + 0.5);
    const thick = Math.min(12, line * 0.5);
    const [low, from, median, to, high] = five.map(x);
    parts.push(
      label(left - 10, y + 4, name, "end"),
      svg("path", { class: "whisker", d: `M${low} ${y}H${high}` }),
      svg("rect", { class: "box", x: from, y: y - thick / 2, width: Math.max(1.5, to - from), height: thick, rx: 2 }),
      svg("path", { class: "median", d: `M${median} ${y - thick / 2 - 2}v${thick + 4}` }),
      label(CHART.width - CHART.right, y + 4, `${number(five[2])}${unit}`, "end", "strong"),
    );
  }
  const spoken = `${title}, medians: ${groups.map(({ name, five }) => `${name} ${number(five[2])}${unit}`).join(", ")}`;
  return chartFigure(title, spoken, ...parts);
}

function seconds(rows) {
  const stages = [
    ["fetch_seconds", "fetch"],
    ["gpu_seconds", "generate"],
    ["finish_seconds", "finish"],
    ["encode_seconds", "encode"],
  ];
  const groups = stages.flatMap(([column, name]) => {
    const values = Array.from(rows, (row) => value(column, row)).filter((second) => second > 0);
    return values.length ? [{ name, five: spread(values) }] : [];
  });
  if (!groups.length) return null;
  const low = Math.floor(Math.log10(Math.min(...groups.map(({ five }) => five[0]))));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...groups.map(({ five }) => five[4])))));
  const step = Math.ceil((high - low) / 4);
  const ticks = [];
  for (let power = low; power <= high; power += step) ticks.push(10 ** power);
  return spreads("Seconds per stage", groups, ticks, (second) => (Math.log10(second) - low) / (high - low), " s");
}

function motionBySetting(rows) {
  const groups = new Map();
  for (const row of rows) {
    const measure = value("motion", row);
    if (measure === null) continue;
    const name = motion(row);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(measure);
  }
  if (groups.size < 2) return null;
  const ordered = [...groups]
    .sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }))
    .slice(0, 12)
    .map(([name, values]) => ({ name: name.replace("scale ", "").replace(", ", " "), five: spread(values) }));
  const [ticks, most] = linear(0, Math.max(...ordered.map(({ five }) => five[4])), 4);
  return spreads("Motion by motion scale", ordered, ticks, (measure) => measure / most, "");
}

/** Return round ticks from `low` to at least `high`, and the last one. */
function linear(low, high, most) {
  const rough = Math.max(high - low, Math.abs(high) / 50, 1e-6) / most; // not 0 if all values are equal
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((part) => part >= rough * 0.999);
  const ticks = [];
  for (let tick = Math.floor(low / step) * step; ticks.length < 2 || ticks.at(-1) < high; tick += step)
    ticks.push(+tick.toPrecision(9));
  return [ticks, ticks.at(-1)];
}

// --- motion against first-frame PSNR --------------------------------------------------------------------------------

function motionAgainstLikeness(rows, open) {
  const points = [];
  rows.forEach((row, position) => {
    const [like, moved] = [value("first_frame_psnr_db", row), value("motion", row)];
    if (moved !== null) points.push({ position, row, like, moved });
  });
  const likes = points.map(({ like }) => like).filter((like) => like !== null);
  if (points.length < 2 || !likes.length) return null;
  const exact = likes.length < points.length; // identical first frames get a column of their own at the right
  const [left, right] = [34, CHART.width - CHART.right - (exact ? 48 : 6)];
  const [across, widest] = linear(
    likes.reduce((a, b) => Math.min(a, b)),
    likes.reduce((a, b) => Math.max(a, b)),
    4,
  );
  const [up, highest] = linear(
    0,
    points.reduce((most, { moved }) => Math.max(most, moved), 0),
    3,
  );
  const [top, floor] = [CHART.top + 8, CHART.height - CHART.bottom];
  const x = (like) =>
    like === null
      ? CHART.width - CHART.right - 18
      : left + ((like - across[0]) / (widest - across[0])) * (right - left);
  const y = (moved) => floor - (moved / highest) * (floor - top);
  for (const point of points) [point.x, point.y] = [x(point.like), y(point.moved)];
  const parts = up.map((tick) => svg("path", { class: "rule", d: `M${left} ${y(tick)}H${CHART.width - CHART.right}` }));
  parts.push(...up.slice(1).map((tick) => label(left - 6, y(tick) + 4, number(tick), "end")));
  parts.push(...across.map((tick) => label(x(tick), CHART.height - 8, number(tick), "middle")));
  parts.push(label(left - 14, CHART.height - 8, "dB", "end"));
  if (exact) parts.push(label(CHART.width - CHART.right, CHART.height - 8, "same", "end"));
  const layer = Math.max(1, Math.ceil(points.length / 16)); // dots of one path do not blend with each other, those of several paths do
  for (let from = 0; from < points.length; from += layer) {
    const dots = points
      .slice(from, from + layer)
      .map((point) => `M${point.x.toFixed(1)} ${point.y.toFixed(1)}h0`)
      .join("");
    parts.push(svg("path", { class: points.length > 400 ? "dots many" : "dots", d: dots }));
  }
  const mark = svg("circle", { class: "mark", r: 5, visibility: "hidden" });
  const said = label(left + 4, CHART.top + 4, "", "start", "muted");
  const chart = chartFigure(
    "Motion against first-frame PSNR",
    `Motion of ${points.length} clips against the likeness of their first frame to the image, ${number(across[0])} to ${number(widest)} dB`,
    ...parts,
    mark,
    said,
  );
  const picture = chart.querySelector("svg");
  picture.classList.add("pickable");
  const nearest = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    let [best, distance] = [null, PICK_PX ** 2];
    for (const point of points) {
      const away = (point.x - at.x) ** 2 + (point.y - at.y) ** 2;
      if (away < distance) [best, distance] = [point, away];
    }
    return best;
  };
  picture.addEventListener("pointermove", (event) => {
    const point = nearest(event);
    mark.setAttribute("visibility", point ? "visible" : "hidden");
    picture.classList.toggle("over", point !== null);
    said.textContent = point ? String(value("request_id", point.row)).slice(0, 40) : "";
    if (point) {
      mark.setAttribute("cx", point.x);
      mark.setAttribute("cy", point.y);
    }
  });
  picture.addEventListener("pointerleave", () => {
    mark.setAttribute("visibility", "hidden");
    said.textContent = "";
  });
  picture.addEventListener("click", (event) => {
    const point = nearest(event);
    if (point) open(point.position);
  });
  return chart;
}
