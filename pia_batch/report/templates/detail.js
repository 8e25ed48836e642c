// Detail view: one result, large, frame by frame, with every setting and the commands that make it again.

const KEYED = ["prompts", "negative_prompts"]; // settings that are texts by frame
const dialog = document.getElementById("detail");
let opened = null; // { position, media, closing }

function openDetail(position) {
  closeMedia();
  const row = shown[position];
  const closing = new AbortController();
  const media = succeeded(row) ? animation(row, { controls: true }) : null;
  opened = { position, media, closing };
  const pressed = dialog.open ? document.activeElement.textContent : "";
  dialog.replaceChildren(detailHead(row, position), detailBody(row, media, closing.signal));
  dialog.scrollTop = 0;
  if (!dialog.open) dialog.showModal();
  const buttons = [...dialog.querySelectorAll(".detail-head button:enabled")];
  (buttons.find((button) => button.textContent === pressed) ?? buttons.at(-1)).focus();
  if (!still.matches) media?.play();
  state.id = value("request_id", row);
  writeAddress();
}

function closeMedia() {
  opened?.closing.abort();
  opened?.media?.release();
  opened = null;
}

function detailHead(row, position) {
  const step = (by, label, sign) =>
    make("button", {
      type: "button",
      className: "quiet",
      textContent: sign,
      "aria-label": label,
      disabled: !(position + by in shown),
      onclick: () => openDetail(position + by),
    });
  return make(
    "header",
    { className: "detail-head" },
    make("h2", { id: "detail-title" }, foreign(value("request_id", row))),
    make("span", { className: "position", textContent: `${count(position + 1)} of ${count(shown.length)}` }),
    step(-1, "Previous result", "←"),
    step(1, "Next result", "→"),
    make("button", { type: "button", className: "quiet", textContent: "Close", onclick: () => dialog.close() }),
  );
}

function detailBody(row, media, signal) {
  const show = (event) => {
    if (event.target.closest(".veiled") && unveil(dialog, row)) event.preventDefault();
  };
  const uncover = make("button", {
    type: "button",
    className: "quiet uncover",
    textContent: "Show the flagged pictures",
    onclick: () => {
      unveil(dialog, row);
      uncover.remove();
    },
  });
  const pictures = make(
    "div",
    { className: "large", onclick: show },
    figure("Condition image", conditionImage(row, { eager: true })),
    figure(
      succeeded(row) ? "Animation" : "Failed",
      media ?? reason(row),
    ),
  );
  return make(
    "div",
    { className: "detail-body" },
    make("p", { className: "prompt" }, foreign(promptOf(row))),
    flagged(row) && !revealed.has(row)
      ? make("p", { className: "note" }, "Flagged by the safety checker. ", uncover)
      : null,
    pictures,
    media ? veil(frameStrip(row, media, signal), row) : failure(row),
    make(
      "div",
      { className: "lists" },
      list(
        "Settings",
        page.settings.map((name) => [name, KEYED.includes(name) ? described(value(name, row)) : value(name, row)]),
      ),
      make(
        "div",
        {},
        list(
          "Measures",
          Object.keys(page.measures).map((name) => [name, shownMeasure(name, row)]),
        ),
        list("Evaluation", [
          ...EVALUATED.map(({ name }) => [name, value(name, row) === null ? null : measured(name, value(name, row))]),
          ["not measured", notMeasured(row)],
        ]),
      ),
      list("Origin", [
        ...["key", "image", "image_sha256", "ip_adapter_image", "model", "engine_id", "device", "run_id"].map(
          (name) => [name, value(name, row)],
        ),
        ["prompt_truncated", value("prompt_truncated", row) || null],
      ]),
    ),
    reproduction(row),
    inspection(row),
  );
}

function shownMeasure(name, row) {
  if (name === "first_frame_psnr_db" && identical(row)) return "identical";
  const number = value(name, row);
  return number === null ? null : name === "finished_at" ? `${moment(number)} UTC` : measured(name, number);
}

/** Return why an animation was not measured; null if it was, or if there is no evaluation. */
function notMeasured(row) {
  const kind = value("evaluation_error_kind", row);
  return kind === null || !succeeded(row) ? null : `${kind}: ${value("evaluation_error", row) ?? ""}`;
}

const figure = (caption, content) => make("figure", {}, content, make("figcaption", { textContent: caption }));

function list(title, entries) {
  const present = entries.filter(([, setting]) => setting !== null && setting !== "");
  if (!present.length) return null;
  const rows = present.flatMap(([name, setting]) => [
    make("dt", { textContent: name }),
    make("dd", {}, foreign(Array.isArray(setting) ? setting.join(", ") : String(setting))),
  ]);
  return make("section", {}, make("h3", { textContent: title }), make("dl", { className: "settings" }, ...rows));
}

function failure(row) {
  const kind = value("error_kind", row);
  const remedy = page.remedies[kind];
  return make(
    "div",
    { className: "failure" },
    make("p", {}, foreign(value("error", row) ?? kind)),
    remedy ? make("p", { className: "remedy" }, `${kind}: `, ...coded(remedy)) : null,
  );
}

/** Convert text with `code` in it to elements. */
const coded = (text) => text.split("`").map((part, index) => (index % 2 ? make("code", { textContent: part }) : part));

function frameStrip(row, media, signal) {
  const length = stripLength(row);
  if (!length) {
    const download = make("a", { href: value("media", row), download: "", textContent: "Download the animation" });
    return make("p", { className: "note" }, download);
  }
  const canvases = Array.from({ length }, () => make("canvas"));
  const frames = canvases.map((canvas, index) => {
    const seek =
      media.video &&
      (() => {
        media.video.pause();
        media.video.currentTime = (index + 0.5) / value("fps", row);
      });
    const label = `Frame ${index + 1} of ${length}`;
    const content = seek
      ? make("button", { type: "button", onclick: seek, "aria-label": `${label}: stop there` }, canvas)
      : canvas;
    return make("li", {}, content, make("span", { textContent: index + 1 }));
  });
  strip(row, canvases, signal);
  const keys = KEYED.flatMap((name, line) => keyPrompts(name, row, length, line));
  const every =
    length < value("num_frames", row) ? `${length} of ${value("num_frames", row)} frames` : `${length} frames`;
  return make(
    "div",
    { className: "frames" },
    make(
      "ol",
      { className: keys.length ? "strip travels" : "strip", "aria-label": every, tabIndex: 0 },
      ...frames,
      ...keys,
    ),
    make(
      "p",
      { className: "note" },
      `${every} at ${value("fps", row)} a second · ${keys.length ? interpolation(row) : ""}`,
      make("a", { href: value("media", row), download: "", textContent: "download" }),
    ),
  );
}

/**
 * Build the texts of a setting under the frames of a strip: each below the frame that it begins with, up to the next.
 * `line` is the line under the frames, from 0.
 */
function keyPrompts(name, row, length, line) {
  const keys = value(name, row) ?? [];
  const last = value("num_frames", row) - 1;
  const column = (frame) => Math.min(length, Math.ceil((frame * (length - 1)) / Math.max(last, 1)) + 1);
  return keys.map(([frame, text], index) => {
    const start = column(frame);
    const end = index + 1 < keys.length ? column(keys[index + 1][0]) : length + 1;
    const words = name === "negative_prompts" ? `not: ${text || "–"}` : text;
    const key = make("li", { className: "key", title: `from frame ${frame + 1}: ${words}` }, foreign(words));
    key.style.gridRow = line + 2;
    key.style.gridColumn = `${start} / ${Math.max(start + 1, end)}`;
    return key;
  });
}

function interpolation(row) {
  const kind = value("prompt_interpolation", row);
  const held = value("prompt_hold", row);
  if (kind === "hold") return "each text is held until the next · ";
  return `${kind} between texts${held ? `, each held for ${held} of the way` : ""} · `;
}

// --- commands that make it again ------------------------------------------------------------------------------------

function reproduction(row) {
  if (value("seed", row) === null) return null; // rejected before it had any settings
  const code = make("code", { id: "again", textContent: commands(row) });
  const title = succeeded(row) ? "Make this clip again" : "Run this request alone";
  const parts = [make("h3", { textContent: title })];
  if (value("image", row) === null) {
    parts.push(
      make("p", {
        className: "note",
        textContent: "The manifest contained the image itself: replace IMAGE by the path of a file.",
      }),
    );
  }
  return make("section", { className: "again" }, ...parts, copied(code));
}

/** Build the command that reads the provenance in the animation file; null if the file has none. */
function inspection(row) {
  if (!succeeded(row) || page.inspect === null) return null;
  const file = `${page.inspect}/${value("media", row).split("/").slice(-3).join("/")}`;
  const code = make("code", { id: "inspect", textContent: `pia-batch inspect ${shellWord(file)}` });
  const title = make("h3", { textContent: "Provenance in the file" });
  return make("section", { className: "inspect" }, title, copied(code));
}

const copied = (code) =>
  make(
    "div",
    { className: "code" },
    make("pre", {}, code),
    make("button", { type: "button", className: "copy", textContent: "Copy", "data-copy": code.id }),
  );

/** Quote text as one word of a shell command. */
const shellWord = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** Build the shell commands. A quoted here-document keeps its lines unchanged; no line of JSON or YAML ends it. */
function commands(row) {
  const entries = page.reproduction.columns.map((name) => [name, written(name, row)]).filter(([, text]) => text !== "null");
  const request = `{${entries.map(([name, text]) => `${JSON.stringify(name)}: ${text}`).join(", ")}}`;
  return [
    "cat > again.yaml <<'END-OF-CONFIG'",
    page.reproduction.config.trimEnd(),
    "END-OF-CONFIG",
    "cat > again.jsonl <<'END-OF-REQUEST'",
    request,
    "END-OF-REQUEST",
    "pia-batch run again.yaml --manifest again.jsonl --output again",
  ].join("\n");
}

function written(name, row) {
  const setting = value(name, row);
  if (name === "image") return quoted(setting === null ? "IMAGE" : found(setting));
  if (name === "ip_adapter_image" && setting !== null) return quoted(found(setting));
  if (value("size", row) === "auto" && (name === "width" || name === "height")) return "null"; // derived from the image
  if (KEYED.includes(name) && setting !== null)
    return `[${setting.map(([frame, text]) => `{"frame": ${frame}, "prompt": ${quoted(text)}}`).join(", ")}]`;
  if (name === "seed") return String(setting); // above 2^53 it is text on this page, and a number in the request
  return typeof setting === "string" ? quoted(setting) : JSON.stringify(setting);
}

/** Quote text as JSON; characters that are invisible or change direction in a terminal are escaped. */
const quoted = (text) =>
  JSON.stringify(text).replace(/[\p{C}\u2028\u2029]/gu, (hidden) =>
    Array.from({ length: hidden.length }, (_, k) => `\\u${hidden.charCodeAt(k).toString(16).padStart(4, "0")}`).join(
      "",
    ),
  );

/** Return the absolute URI of an image; relative ones are relative to the manifest's folder. */
function found(image) {
  const { folder } = page.reproduction;
  if (/^[a-z][a-z0-9+.-]+:\/\//i.test(image) || image.startsWith("/") || !folder) return image;
  return `${folder}/${folder.startsWith("file://") ? image.split("/").map(encodeURIComponent).join("/") : image}`;
}

function buildDetail() {
  dialog.addEventListener("close", () => {
    const position = opened?.position ?? 0;
    closeMedia();
    dialog.replaceChildren();
    state.id = null;
    writeAddress();
    goTo(position);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !opened || event.altKey || event.ctrlKey || event.metaKey || event.target.closest("video, .strip"))
      return;
    if (!(opened.position + by in shown)) return;
    event.preventDefault();
    openDetail(opened.position + by);
  });
}
