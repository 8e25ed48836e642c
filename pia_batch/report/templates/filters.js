// Filters and sort order. The state is in the address, so that a view can be shared.

const FILTERS = [
  { name: "status", label: "Status", of: (row) => value("status", row) },
  { name: "kind", label: "Error kind", of: (row) => value("error_kind", row) },
  { name: "motion", label: "Motion", of: motion },
  { name: "context", label: "Long clips", of: (row) => value("context", row) ?? (value("num_frames", row) && "one call") },
  { name: "safety", label: "Safety", of: safety },
  { name: "model", label: "Model", of: (row) => value("model", row) },
  { name: "evaluation", label: "Evaluation", of: evaluated },
];

/** Return what an evaluation has of a clip: "measured", or the kind of its error; null where there is none. */
function evaluated(row) {
  if (page.evaluation === null || !succeeded(row)) return null;
  return value("evaluation_error_kind", row) ?? "measured";
}

/** Describe what the safety checker found; null where it was not used. */
function safety(row) {
  if (value("nsfw_frames", row) === null && value("nsfw_input", row) === null) return null;
  return flagged(row) ? "flagged" : "not flagged";
}

const SEARCHED = ["request_id", "prompt", "prompts", "negative_prompt", "negative_prompts", "error", "image"];
const KEY = /^[0-9a-f]{6,32}$/; // beginning of a key; fewer digits would match too many

const state = { q: "", sort: "request_id", down: false, id: null, ranges: {} };
for (const { name } of FILTERS) state[name] = "";

const everyRow = Uint32Array.from({ length: page.rows }, (_, row) => row);
let texts = null;

/** Return the rows that match the state, sorted by it. */
function matching() {
  let rows = inRanges(everyRow);
  for (const { name, of } of FILTERS) {
    if (state[name]) rows = rows.filter((row) => of(row) === state[name]);
  }
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length) {
    texts ??= Array.from(everyRow, (row) =>
      SEARCHED.map((name) => value(name, row) ?? "")
        .join("\n")
        .toLowerCase(),
    );
    const has = (row, word) => texts[row].includes(word) || (KEY.test(word) && value("key", row).startsWith(word));
    rows = rows.filter((row) => words.every((word) => has(row, word)));
  }
  return sorted(rows);
}

/** Sort rows by the chosen measure; rows without it come last in both orders, equal ones stay sorted by id. */
function sorted(rows) {
  if (state.sort === "request_id") return state.down ? rows.slice().reverse() : rows;
  const keys = new Float64Array(page.rows);
  for (const row of rows) keys[row] = sortKey(row);
  const sign = state.down ? -1 : 1;
  return rows.slice().sort((a, b) => {
    if (Number.isNaN(keys[a]) || Number.isNaN(keys[b])) return Number.isNaN(keys[a]) - Number.isNaN(keys[b]) || a - b;
    return sign * (keys[a] - keys[b] || 0) || a - b;
  });
}

function sortKey(row) {
  if (state.sort === "first_frame_psnr_db" && identical(row)) return Infinity;
  const number = value(state.sort, row);
  return number === null ? NaN : number;
}

/** Build the controls of the form; `changed` is called when the user changes one. */
function buildFilters(changed) {
  const form = document.getElementById("filters");
  const search = make("input", {
    type: "search",
    id: "q",
    name: "q",
    placeholder: "Search prompts, ids, errors",
    autocomplete: "off",
    spellcheck: false,
    "aria-label": "Search prompts, ids, errors and keys",
    "aria-keyshortcuts": "/",
  });
  form.append(search);
  for (const { name, label, of } of FILTERS) {
    const counts = new Map();
    for (const row of everyRow) counts.set(of(row), (counts.get(of(row)) ?? 0) + 1);
    counts.delete(null);
    if (counts.size < (name === "kind" ? 1 : 2)) continue;
    const options = [...counts].sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
    form.append(
      select(name, label, [["", "any"], ...options.map(([text, number]) => [text, `${text} (${count(number)})`])]),
    );
  }
  const known = (name) => everyRow.some((row) => value(name, row) !== null);
  const measures = Object.entries(page.measures).filter(([name]) => known(name));
  const sort = select("sort", "Sort by", [
    ["request_id", "Request id"],
    ...measures.map(([name, [label]]) => [name, label]),
  ]);
  const further = EVALUATED.filter(({ name }) => known(name)).map(({ name }) => option(name, name));
  if (further.length) sort.querySelector("select").append(make("optgroup", { label: "Evaluation" }, ...further));
  form.append(
    make("div", { className: "sort" }, sort, make("button", { type: "button", id: "down", className: "quiet" })),
    make("div", { id: "chips", className: "chips", role: "group", "aria-label": "Ranges", hidden: true }),
  );
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    if (event.target.name === "sort") state.down = event.target.value !== "request_id";
    if (event.target !== search) changed({ [event.target.name]: event.target.value });
  });
  let typing = 0;
  search.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => changed({ q: search.value }), 120);
  });
  document.getElementById("down").addEventListener("click", () => changed({ down: !state.down }));
  document.getElementById("clear").addEventListener("click", () => {
    changed(Object.fromEntries([["q", ""], ["ranges", {}], ...FILTERS.map(({ name }) => [name, ""])]));
    search.focus();
  });
}

function select(name, label, options) {
  return make(
    "label",
    { className: "field" },
    make("span", { textContent: label }),
    make("select", { name }, ...options.map(([chosen, text]) => option(chosen, text))),
  );
}

const option = (chosen, text) => make("option", { value: chosen, textContent: text });

/** Make the controls show the state. */
function showFilters() {
  const form = document.getElementById("filters");
  for (const control of form.querySelectorAll("[name]")) {
    if (control.value !== state[control.name]) control.value = state[control.name];
    control.classList.toggle("set", control.name !== "sort" && state[control.name] !== "");
  }
  const button = document.getElementById("down");
  button.textContent = state.down ? "↓" : "↑";
  button.setAttribute("aria-label", state.down ? "Descending; change to ascending" : "Ascending; change to descending");
}

function readAddress() {
  const requested = new URLSearchParams(location.hash.slice(1));
  const sorts = ["request_id", ...Object.keys(page.measures), ...EVALUATED.map(({ name }) => name)];
  for (const name of ["q", "id", ...FILTERS.map((filter) => filter.name)]) state[name] = requested.get(name) ?? "";
  state.sort = sorts.includes(requested.get("sort")) ? requested.get("sort") : "request_id";
  state.down = requested.get("order") === "down";
  const ranges = EVALUATED.map(({ name }) => [name, isRange(name) ? parseRange(requested.get(name)) : null]);
  state.ranges = Object.fromEntries(ranges.filter(([, range]) => range !== null));
}

function writeAddress() {
  const parameters = new URLSearchParams();
  for (const name of ["q", ...FILTERS.map((filter) => filter.name), "id"]) if (state[name]) parameters.set(name, state[name]);
  for (const [name, range] of Object.entries(state.ranges)) parameters.set(name, writtenRange(range));
  if (state.sort !== "request_id") parameters.set("sort", state.sort);
  if (state.down) parameters.set("order", "down");
  const hash = parameters.toString();
  if (hash !== location.hash.slice(1)) history.replaceState(null, "", `#${hash}`);
}
