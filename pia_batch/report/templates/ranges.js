// Measures of an evaluation: the distribution of each, and a range of it as a filter.

const EVALUATED = page.evaluation?.measures ?? [];
const MOST_BINS = 24;
const BINS = { width: 240, height: 72, top: 6 };
const WANTED = { higher: "higher is better", lower: "lower is better", neither: "" };

/** Values of each measure by row, NaN for none, and the round edges of its bins. */
const distributions = new Map(
  EVALUATED.map(({ name }) => {
    const values = Float64Array.from(everyRow, (row) => value(name, row) ?? NaN);
    const known = values.filter((each) => !Number.isNaN(each));
    if (!known.length) return [name, null];
    const [low, high] = [known.reduce((a, b) => Math.min(a, b)), known.reduce((a, b) => Math.max(a, b))];
    return [name, { values, edges: linear(low, high, MOST_BINS)[0] }];
  }),
);

const rangeFigures = new Map(); // name -> its elements, those that change

const short = (measure) => String(+measure.toPrecision(3));

const isRange = (name) => distributions.get(name) != null;

/** Return the number of rows in each bin, and the median; the last bin has its upper edge. */
function binned({ values, edges }, rows) {
  const counts = new Float64Array(edges.length - 1);
  const found = [];
  const step = (edges.at(-1) - edges[0]) / counts.length;
  for (const row of rows) {
    if (Number.isNaN(values[row])) continue;
    found.push(values[row]);
    counts[Math.max(0, Math.min(counts.length - 1, Math.floor((values[row] - edges[0]) / step + 1e-9)))] += 1;
  }
  return { counts, number: found.length, median: found.length ? spread(found)[2] : null };
}

/** Return the rows whose measures are in all chosen ranges, ends included. */
function inRanges(rows) {
  let kept = rows;
  for (const [name, [low, high]] of Object.entries(state.ranges)) {
    const { values } = distributions.get(name);
    kept = kept.filter((row) => values[row] >= (low ?? -Infinity) && values[row] <= (high ?? Infinity));
  }
  return kept;
}

/** Read a range from the address: `0.25..0.3`, `0.25..` or `..0.3`; null if it is none. */
function parseRange(text) {
  const ends = (text ?? "").split("..");
  const [low, high] = ends.map((end) => (end === "" || !Number.isFinite(Number(end)) ? null : Number(end)));
  return ends.length === 2 && (low !== null || high !== null) ? [low, high] : null;
}

const writtenRange = ([low, high]) => `${low ?? ""}..${high ?? ""}`;

function describedRange(name, [low, high]) {
  if (low === null) return `${name} ≤ ${high}`;
  return high === null ? `${name} ≥ ${low}` : `${name} ${low} to ${high}`;
}

/** Return the state with another range of a measure; null: none. */
function withRange(name, range) {
  const { [name]: _, ...others } = state.ranges;
  return { ranges: range === null ? others : { ...others, [name]: range } };
}

function buildRanges(changed) {
  const box = document.getElementById("ranges");
  if (!box) return;
  const known = EVALUATED.filter(({ name }) => isRange(name));
  box.replaceChildren(...known.map((measure) => rangeFigure(measure, changed)));
  const animations = everyRow.filter(succeeded);
  const done = animations.filter((row) => known.some(({ name }) => value(name, row) !== null));
  const whole = done.filter((row) => value("evaluation_error_kind", row) === null).length;
  const partly = whole < done.length ? `, ${count(done.length - whole)} in part` : "";
  document.getElementById("measured").textContent =
    `${count(whole)} of ${count(animations.length)} animations measured${partly}. `;
}

function rangeFigure({ name, unit, better, formula }, changed) {
  const { edges } = distributions.get(name);
  const parts = {
    shade: svg("rect", { class: "shade", y: 0, height: BINS.height }),
    all: svg("path", { class: "all" }),
    bars: svg("path", { class: "shown" }),
    median: svg("path", { class: "middle" }),
  };
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${BINS.width} ${BINS.height}`, preserveAspectRatio: "none", role: "img", class: "bins" },
    ...Object.values(parts),
  );
  const input = (side, label, end) =>
    make("input", {
      type: "text",
      inputMode: "decimal",
      autocomplete: "off",
      placeholder: short(edges.at(side ? -1 : 0)),
      "aria-label": `${name} ${label}`,
      onchange: (event) => setEnd(side, parseEnd(event.target.value)),
      onkeydown: (event) => {
        const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
        if (!by) return;
        event.preventDefault();
        const from = parseEnd(event.target.value) ?? end;
        const next = Math.max(edges[0], Math.min(edges.at(-1), from + by * (edges[1] - edges[0])));
        setEnd(side, +next.toPrecision(9));
      },
    });
  const setEnd = (side, end) => {
    const range = (state.ranges[name] ?? [null, null]).slice();
    range[side] = end;
    changed(withRange(name, range.every((each) => each === null) ? null : range));
  };
  const inputs = [input(0, "at least", edges[0]), input(1, "at most", edges.at(-1))];
  const middle = make("span", { className: "muted" });
  const clear = make("button", {
    type: "button",
    className: "clear",
    textContent: "×",
    "aria-label": `Clear the range of ${name}`,
    onclick: () => {
      changed(withRange(name, null));
      inputs[0].focus({ preventScroll: true });
    },
  });
  brush(picture, parts.shade, edges, (range) => {
    const now = state.ranges[name];
    changed(withRange(name, now && now[0] === range[0] && now[1] === range[1] ? null : range));
  });
  rangeFigures.set(name, { ...parts, picture, inputs, clear, middle });
  const about = [unit, WANTED[better]].filter(Boolean).join(", ");
  const caption = make("figcaption", { title: formula }, make("code", { textContent: name }), make("small", { textContent: about }), clear);
  return make("figure", { className: "chart range" }, caption, picture, make("div", { className: "ends" }, inputs[0], middle, inputs[1]));
}

const parseEnd = (text) => (text.trim() === "" || !Number.isFinite(Number(text)) ? null : Number(text));

/** Let a pointer choose bins: by dragging over them, or one by a click or a touch. */
function brush(picture, shade, edges, choose) {
  let start = null;
  const binAt = (event) => {
    const { left, width } = picture.getBoundingClientRect();
    return Math.max(0, Math.min(edges.length - 2, Math.floor(((event.clientX - left) / width) * (edges.length - 1))));
  };
  const chosen = (event) => [start, binAt(event)].sort((a, b) => a - b);
  picture.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    start = binAt(event);
    if (event.pointerType !== "touch") picture.setPointerCapture(event.pointerId);
  });
  picture.addEventListener("pointermove", (event) => {
    if (start === null || event.pointerType === "touch") return;
    const [first, last] = chosen(event);
    shadeBetween(shade, edges, [edges[first], edges[last + 1]]);
  });
  picture.addEventListener("pointerup", (event) => {
    if (start === null) return;
    const [first, last] = chosen(event);
    start = null;
    choose([edges[first], edges[last + 1]]);
  });
  picture.addEventListener("pointercancel", () => (start = null)); // the page scrolls instead
}

/** Place a measure on the width of its chart, 0 to `BINS.width`. */
function across(edges, measure) {
  return Math.max(0, Math.min(1, (measure - edges[0]) / (edges.at(-1) - edges[0]))) * BINS.width;
}

function shadeBetween(shade, edges, [low, high]) {
  const from = across(edges, low ?? edges[0]);
  shade.setAttribute("x", from);
  shade.setAttribute("width", Math.max(1, across(edges, high ?? edges.at(-1)) - from));
}

/** Make the distributions show these rows, in front of those of all rows. */
function renderRanges(rows) {
  for (const [name, figure] of rangeFigures) {
    const distribution = distributions.get(name);
    const [every, here] = [(distribution.every ??= binned(distribution, everyRow)), binned(distribution, rows)];
    const scale = (BINS.height - BINS.top) / every.counts.reduce((most, each) => Math.max(most, each), 1);
    const width = BINS.width / every.counts.length;
    const bars = (counts) =>
      Array.from(counts, (each, bin) => {
        const height = each && Math.max(1.5, each * scale);
        return height ? `M${(bin * width + 0.5).toFixed(2)} ${BINS.height}v-${height.toFixed(2)}h${(width - 1).toFixed(2)}V${BINS.height}z` : "";
      }).join("");
    figure.all.setAttribute("d", bars(every.counts));
    figure.bars.setAttribute("d", bars(here.counts));
    figure.median.setAttribute("d", here.median === null ? "" : `M${across(distribution.edges, here.median).toFixed(2)} 0V${BINS.height}`);
    figure.middle.textContent = here.median === null ? "none" : `median ${short(here.median)}`;
    const said = here.median === null ? "no result" : `${count(here.number)} results, median ${short(here.median)}`;
    figure.picture.setAttribute("aria-label", `Distribution of ${name}: ${said}`);
  }
}

/** Make the controls show the chosen ranges, here and among the filters. */
function showRanges(changed) {
  for (const [name, figure] of rangeFigures) {
    const range = state.ranges[name] ?? [null, null];
    figure.inputs.forEach((input, side) => {
      input.value = range[side] ?? "";
      input.classList.toggle("set", range[side] !== null);
    });
    const chosen = name in state.ranges;
    figure.clear.hidden = !chosen;
    figure.shade.setAttribute("visibility", chosen ? "visible" : "hidden");
    if (chosen) shadeBetween(figure.shade, distributions.get(name).edges, range);
    else figure.shade.setAttribute("width", 0);
  }
  const chosen = Object.entries(state.ranges);
  const chips = chosen.map(([name, range]) =>
    make("button", {
      type: "button",
      className: "quiet chip",
      textContent: `${describedRange(name, range)} ×`,
      "aria-label": `Remove the filter ${describedRange(name, range)}`,
      onclick: () => changed(withRange(name, null)),
    }),
  );
  const box = document.getElementById("chips");
  box.replaceChildren(...chips);
  box.hidden = !chips.length;
  const command = document.getElementById("choice");
  if (!command) return;
  command.hidden = !chosen.length;
  if (chosen.length) document.getElementById("select").textContent = selectCommand(chosen);
}

/** Return the command that writes the ids of the requests in these ranges as a table. */
function selectCommand(chosen) {
  const { output, id } = page.evaluation;
  const conditions = chosen.map(([name, [low, high]]) => {
    if (low === null) return `${name} <= ${high}`;
    return high === null ? `${name} >= ${low}` : `${low} <= ${name} <= ${high}`;
  });
  return `pia-batch select ${shellWord(output)} --evaluation ${shellWord(id)} --where ${shellWord(conditions.join(" and "))}`;
}
