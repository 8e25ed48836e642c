// Gallery: only the cards near the viewport exist, for any number of results.

const grid = document.getElementById("grid");
const GAP_PX = 16;
const CARD_PX = 288; // smallest width of a card, if the screen allows it
const TEXT_PX = 102; // height of a card's text under its pictures
const SETTLED_MS = 90; // media of cards that are scrolled past faster are not fetched

let shown = everyRow; // rows in order
let current = 0; // position of the keyboard focus
let layout = { columns: 1, width: CARD_PX, height: CARD_PX, picture: CARD_PX / 2 };
const cards = new Map(); // position -> card

/** Height of a picture per width, from the most frequent shape of the results. Pictures are half a card wide. */
const shape = (() => {
  const shapes = new Map();
  for (const row of everyRow) {
    const ratio = value("height", row) / value("width", row);
    if (Number.isFinite(ratio)) shapes.set(ratio, (shapes.get(ratio) ?? 0) + 1);
  }
  const [ratio] = [...shapes].sort((a, b) => b[1] - a[1])[0] ?? [1];
  return Math.min(1.5, Math.max(0.56, ratio));
})();

const playing = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const card = cards.get(Number(target.dataset.position));
      if (card) card.visible = isIntersecting;
      if (card) steer(card);
    }
  },
  { threshold: 0.3 },
);

function steer(card) {
  if (!card.media) return;
  if (card.visible && (card.held || !still.matches)) card.media.play();
  else card.media.pause();
}

/** Show these rows, from the first one. */
function showRows(rows) {
  for (const position of [...cards.keys()]) drop(position);
  shown = rows;
  current = 0;
  measure();
  render();
}

function measure() {
  const width = grid.clientWidth;
  const columns = Math.max(1, Math.floor((width + GAP_PX) / (CARD_PX + GAP_PX)));
  const cardWidth = Math.floor((width - GAP_PX * (columns - 1)) / columns);
  const picture = Math.round(((cardWidth - 2) / 2) * shape);
  layout = { columns, width: cardWidth, height: picture + TEXT_PX + 2, picture };
  const lines = Math.ceil(shown.length / columns);
  grid.style.height = `${Math.max(0, lines * (layout.height + GAP_PX) - GAP_PX)}px`;
  grid.style.setProperty("--picture", `${picture}px`);
}

function render(settling = 0) {
  const top = -grid.getBoundingClientRect().top;
  const line = layout.height + GAP_PX;
  const first = Math.max(0, Math.floor((top - line) / line)) * layout.columns;
  const below = (Math.floor((top + innerHeight + line) / line) + 1) * layout.columns;
  const last = Math.min(shown.length, Math.max(first + layout.columns, below)); // at least one line, which Tab can reach
  const focused = grid.contains(document.activeElement);
  if (!focused) setCurrent(Math.min(Math.max(current, first), last - 1)); // Tab goes to a card on the screen
  for (const position of [...cards.keys()]) {
    if ((position < first || position >= last) && !(focused && position === current)) drop(position);
  }
  const fresh = [];
  for (let position = first; position < last; position++) {
    if (!cards.has(position)) fresh.push(add(position, settling).item);
  }
  if (fresh.length) {
    grid.append(...fresh);
    order();
  }
}

/** Set the one card that Tab reaches; arrow keys reach the others. */
function setCurrent(position) {
  const old = cards.get(current);
  if (old) old.button.tabIndex = -1;
  current = Math.max(0, position);
  const card = cards.get(current);
  if (card) card.button.tabIndex = 0;
}

/** Keep the document order equal to the reading order. */
function order() {
  const items = [...cards].sort(([a], [b]) => a - b).map(([, card]) => card.item);
  let before = null;
  for (const item of items.reverse()) {
    if (item.nextSibling !== before) grid.insertBefore(item, before);
    before = item;
  }
}

function add(position, settling) {
  const row = shown[position];
  const pictures = make("span", { className: "pictures" });
  const button = make(
    "button",
    { type: "button", className: "card", tabIndex: position === current ? 0 : -1 },
    pictures,
    ...words(row),
  );
  const item = make("li", { "aria-setsize": shown.length, "aria-posinset": position + 1 }, button);
  item.dataset.position = position;
  const card = { item, button, pictures, row, media: null, visible: false, held: false, settling: 0 };
  card.settling = setTimeout(() => fill(card), settling);
  place(card, position);
  cards.set(position, card);
  playing.observe(item);
  return card;
}

function place({ item }, position) {
  const [x, y] = [position % layout.columns, Math.floor(position / layout.columns)];
  item.style.transform = `translate(${x * (layout.width + GAP_PX)}px, ${y * (layout.height + GAP_PX)}px)`;
  item.style.width = `${layout.width}px`;
  item.style.height = `${layout.height}px`;
}

function fill(card) {
  card.pictures.append(conditionImage(card.row));
  if (succeeded(card.row)) {
    card.media = animation(card.row);
    card.pictures.append(card.media);
    steer(card);
  } else {
    card.pictures.append(reason(card.row));
  }
}

function words(row) {
  const frames = [value("num_frames", row) && `${value("num_frames", row)} frames`, value("context", row)];
  const facts = [flagged(row) && "flagged", motion(row), frames.filter(Boolean).join(", ")];
  if (value("width", row)) facts.push(`${value("width", row)}×${value("height", row)}`);
  if (value("num_inference_steps", row)) facts.push(`${value("num_inference_steps", row)} steps`);
  const text = succeeded(row) ? facts.filter(Boolean).join(" · ") : (value("error", row) ?? "");
  const about = [make("span", { className: "id" }, foreign(value("request_id", row)))];
  if (state.sort !== "request_id") {
    const measure =
      state.sort === "first_frame_psnr_db" && identical(row)
        ? "identical"
        : measured(state.sort, value(state.sort, row));
    about.push(make("span", { className: "sorted", textContent: measure }));
  }
  return [
    make("span", { className: "prompt" }, foreign(promptOf(row))),
    make("span", { className: succeeded(row) ? "facts" : "facts error" }, foreign(text)),
    make("span", { className: "line" }, ...about),
  ];
}

function drop(position) {
  const card = cards.get(position);
  clearTimeout(card.settling);
  card.media?.release();
  playing.unobserve(card.item);
  card.item.remove();
  cards.delete(position);
}

/** Move the keyboard focus to a card, and scroll to it. */
function goTo(position) {
  if (!shown.length) return;
  const target = Math.min(shown.length - 1, Math.max(0, position));
  setCurrent(target);
  const line = layout.height + GAP_PX;
  const top = grid.getBoundingClientRect().top + scrollY + Math.floor(target / layout.columns) * line;
  const covered = document.getElementById("filters").getBoundingClientRect().height + GAP_PX;
  if (top < scrollY + covered) scrollTo(0, top - covered);
  else if (top + line > scrollY + innerHeight) scrollTo(0, top + line - innerHeight);
  render();
  if (!cards.has(target)) grid.append(add(target, 0).item); // until scrolling has added it
  cards.get(target).button.focus({ preventScroll: true });
}

function buildGallery(open) {
  const positionOf = (target) => {
    const item = target.closest?.("li[data-position]");
    return item ? Number(item.dataset.position) : null;
  };
  const hold = (held) => (event) => {
    const card = cards.get(positionOf(event.target));
    if (!card || (event.relatedTarget && card.item.contains(event.relatedTarget))) return;
    card.held = held;
    steer(card);
  };
  for (const [name, held] of [
    ["pointerover", true],
    ["focusin", true],
    ["pointerout", false],
    ["focusout", false],
  ]) {
    grid.addEventListener(name, hold(held));
  }
  grid.addEventListener("focusin", (event) => {
    const position = positionOf(event.target);
    if (position !== null) setCurrent(position);
  });
  grid.addEventListener("click", (event) => {
    const position = positionOf(event.target);
    if (position === null) return;
    const card = cards.get(position);
    if (card && unveil(card.pictures, card.row)) return; // the next click opens it
    open(position);
  });
  grid.addEventListener("keydown", (event) => {
    const page = layout.columns * Math.max(1, Math.floor(innerHeight / (layout.height + GAP_PX)) - 1);
    const steps = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -layout.columns,
      ArrowDown: layout.columns,
      PageUp: -page,
      PageDown: page,
      Home: -Infinity,
      End: Infinity,
    };
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    goTo(current + steps[event.key]);
  });
  let asked = false;
  const later = (work) => () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      work();
    });
  };
  addEventListener(
    "scroll",
    later(() => render(SETTLED_MS)),
    { passive: true },
  );
  addEventListener("resize", later(render));
  new ResizeObserver(
    later(() => {
      measure();
      for (const [position, card] of cards) place(card, position);
      render();
    }),
  ).observe(grid);
  still.addEventListener("change", () => cards.forEach(steer));
}
