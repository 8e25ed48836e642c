// Data of the page: results by column, and their formatting.

const page = JSON.parse(document.getElementById("data").textContent);

const readers = new Map(
  Object.entries(page.columns).map(([name, { all, words, at, values }]) => [
    name,
    values ? (row) => values[row] : words ? (row) => words[at[row]] : () => all,
  ]),
);

/** Return a value of a result, or null; null also for a column that these results lack. */
const value = (name, row) => readers.get(name)?.(row) ?? null;

const succeeded = (row) => value("status", row) === "succeeded";

const integers = new Intl.NumberFormat("en");
const count = (number) => integers.format(number);

const UNITS = ["B", "kB", "MB", "GB", "TB"];

function size(bytes) {
  const power = Math.min(UNITS.length - 1, Math.floor(Math.log10(Math.max(bytes, 1)) / 3));
  return `${+(bytes / 1000 ** power).toPrecision(3)} ${UNITS[power]}`;
}

/** Format a time in UTC as logs and results do: 2026-11-23 03:53:32. */
const moment = (ms) => new Date(ms).toISOString().slice(0, 19).replace("T", " ");

/** Format a measure with its unit. */
function measured(name, number) {
  if (number === null) return "–";
  if (name === "finished_at") return moment(number);
  const unit = page.measures[name]?.[1] ?? "";
  if (unit === "B") return size(number);
  const text = Number.isInteger(number) ? count(number) : String(+number.toPrecision(3));
  return unit ? `${text} ${unit}` : text;
}

/** Return true if the first frame equals the image: the PSNR is then infinite, and null in the results. */
const identical = (row) => succeeded(row) && value("first_frame_psnr_db", row) === null;

/** Return true if the safety checker flagged the image or a frame of a result. */
const flagged = (row) => value("nsfw_frames", row) > 0 || value("nsfw_input", row) === true;

const revealed = new Set(); // flagged rows that the reader chose to see

/** Cover the pictures in `box` until the reader chooses to see this result. */
function veil(box, row) {
  if (flagged(row) && !revealed.has(row)) box.classList.add("veiled");
  return box;
}

/** Show the flagged pictures in `box`; return false if nothing was covered. */
function unveil(box, row) {
  const covered = [...box.querySelectorAll(".veiled")];
  for (const each of covered) each.classList.remove("veiled");
  if (covered.length) revealed.add(row);
  return covered.length > 0;
}

/** Describe the requested motion in a few words, which sort by the motion scale. */
function motion(row) {
  if (value("motion_curve", row) !== null) return "own curve";
  const scale = value("motion_scale", row);
  if (scale === null) return null;
  const kind = value("loop", row) || (scale >= 3 && scale <= 5) ? ", loop" : scale >= 6 ? ", restyle" : "";
  return `scale ${scale}${kind}`;
}

/** Describe texts by frame, as in `prompts`: "0: a red circle / 8: a blue square"; null if there are none. */
const described = (keys) => keys?.map(([frame, text]) => `${frame}: ${text}`).join(" / ") ?? null;

/** Return the prompt of a result, or all of several. */
const promptOf = (row) => value("prompt", row) ?? described(value("prompts", row)) ?? "no prompt";

/** Create an element with properties, attributes (names with a dash, or role) and children. Never parses markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, setting] of Object.entries(properties)) {
    if (setting === null || setting === undefined) continue;
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, setting);
    else element[name] = setting;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Wrap untrusted text, so that its direction does not affect the text around it. */
const foreign = (text, className = "") => make("bdi", { textContent: text, className });
