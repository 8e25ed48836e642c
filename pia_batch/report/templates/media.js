// Animations and condition images: playback, and placeholders for media that cannot be shown.

const still = matchMedia("(prefers-reduced-motion: reduce)");
const PATIENCE_MS = 1000; // time limit for the picture of a frame after seeking
const TINY_PX = 160; // smaller clips are enlarged without smoothing

/** Build the condition image of a result: by reference, else its thumbnail, else a text. */
function conditionImage(row, { eager = false } = {}) {
  const source = value("image_ref", row) ?? value("thumbnail", row);
  const missing = () => make("span", { className: "absent", textContent: "image not reachable from this page" });
  const box = veil(make("span", { className: "picture condition" }), row);
  if (source === null) {
    box.append(missing());
    return box;
  }
  const image = make("img", { alt: "", decoding: "async", loading: eager ? "eager" : "lazy" });
  image.addEventListener("error", () => {
    const thumbnail = value("thumbnail", row);
    if (thumbnail !== null && image.src !== thumbnail) image.src = thumbnail;
    else image.replaceWith(missing());
  });
  image.src = source;
  box.append(image);
  return box;
}

/** Build the tile of a failed result: its error kind, which breaks at underscores. */
function reason(row) {
  const parts = value("error_kind", row).split(/(?<=_)/);
  const words = parts.flatMap((part, index) => (index ? [make("wbr"), part] : [part]));
  return make("span", { className: "picture reason" }, make("code", {}, ...words));
}

const VIDEO_CODECS = {
  h264: ["H.264", 'video/mp4; codecs="avc1.640028"'],
  hevc: ["HEVC", 'video/mp4; codecs="hvc1.1.6.L93.B0"'],
  av1: ["AV1", 'video/mp4; codecs="av01.0.08M.08"'],
  vp9: ["VP9", 'video/webm; codecs="vp9"'],
};

/** Return name and media type of the codec of a video. */
function codecOf(row) {
  const codec = value("codec", row) ?? (value("format", row) === "webm" ? "vp9" : "h264");
  return VIDEO_CODECS[codec] ?? [codec, null];
}

const plays = (() => {
  const video = make("video");
  const answers = new Map();
  return (type) => {
    if (!answers.has(type)) answers.set(type, video.canPlayType(type) !== "");
    return answers.get(type);
  };
})();

/** Return the HTML element that plays a result here, "video" or "image"; null: this browser does not play it. */
function element(row) {
  const player = page.players[value("format", row)];
  if (player !== "video") return player;
  const [, type] = codecOf(row);
  return type === null || plays(type) ? player : null;
}

/** Build the animation of a succeeded result: an element with `play()`, `pause()` and `release()`. */
function animation(row, { controls = false } = {}) {
  const box = veil(make("span", { className: "picture animation" }), row);
  if (value("width", row) < TINY_PX) box.classList.add("tiny");
  const player = PLAYERS[element(row) ?? "none"](row, controls);
  player.parts[0].addEventListener("error", () => {
    player.release();
    box.replaceChildren(make("span", { className: "absent", textContent: "animation missing, or not playable here" }));
  });
  box.append(...player.parts);
  return Object.assign(box, player);
}

function videoPlayer(row, controls) {
  const video = make("video", {
    muted: true,
    loop: true,
    playsInline: true,
    preload: controls ? "auto" : "none",
    controls,
  });
  const poster = value("poster_ref", row);
  if (poster !== null) video.poster = poster;
  video.src = value("media", row);
  return {
    parts: [video],
    video,
    play: () => video.play().catch(() => {}), // removed before it could start
    pause: () => video.pause(),
    release: () => {
      video.removeAttribute("src");
      video.load(); // frees its decoder
    },
  };
}

/** Build the player of a GIF or WebP. These cannot be paused: a still of the first frame covers them instead. */
function imagePlayer(row, controls) {
  const image = make("img", { alt: "", decoding: "async", src: value("media", row) });
  const cover = make("canvas", { hidden: true });
  let paused = false;
  const update = () => {
    if (paused && image.naturalWidth && !cover.dataset.ready) {
      [cover.width, cover.height, cover.dataset.ready] = [image.naturalWidth, image.naturalHeight, "yes"];
      cover.getContext("2d").drawImage(image, 0, 0);
    }
    cover.hidden = !(paused && cover.dataset.ready);
    image.classList.toggle("under", !cover.hidden);
  };
  const set = (to) => () => {
    paused = to;
    update();
  };
  image.addEventListener("load", update);
  return {
    parts: controls ? [image] : [image, cover],
    play: set(false),
    pause: controls ? () => {} : set(true),
    release: () => {},
  };
}

/** Build the placeholder of a file that this browser does not play: its poster or an embedded frame, else a sentence. */
function placeholder(row) {
  const zipped = page.players[value("format", row)] !== "video";
  const kind = zipped ? "zipped PNGs" : codecOf(row)[0];
  const poster = value("poster_ref", row);
  let parts = [make("span", { className: "absent", textContent: `this browser does not play ${kind}` })];
  if (poster !== null || value("strip", row) !== null) {
    const label = `first frame; ${parts[0].textContent}`;
    const first =
      poster !== null
        ? make("img", { className: "first", src: poster, alt: label })
        : make("canvas", { className: "first", role: "img", "aria-label": label });
    if (poster === null) strip(row, [first]);
    parts = [first, make("span", { className: "badge", textContent: zipped ? "zip" : `${kind}: first frame` })];
  }
  return {
    parts,
    play() {},
    pause() {},
    release() {},
  };
}

const PLAYERS = { video: videoPlayer, image: imagePlayer, none: placeholder };

/** Return the number of frames in the strip of a result; 0 if it has no strip. */
function stripLength(row) {
  if (!succeeded(row)) return 0;
  const frames = value("num_frames", row);
  if (element(row) === "video") return frames;
  return value("strip", row) === null ? 0 : Math.min(frames, 16);
}

/** Paint the frames of a result, in order, on `canvases`; stops when `signal` is aborted. */
async function strip(row, canvases, signal = null) {
  if (element(row) === "video") return stripOfVideo(row, canvases, signal);
  const source = value("strip", row);
  if (source === null) return;
  const image = make("img", { src: source });
  await image.decode();
  const width = image.naturalWidth / stripLength(row);
  canvases.forEach((canvas, index) => {
    [canvas.width, canvas.height] = [width, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, -index * width, 0);
  });
}

async function stripOfVideo(row, canvases, signal) {
  const video = make("video", { muted: true, preload: "auto", playsInline: true });
  try {
    const ready = untilNotified(video, signal, (done) => video.addEventListener("loadeddata", done, { once: true }));
    video.src = value("media", row);
    await ready;
    const height = Math.min(video.videoHeight, 144);
    for (const [index, canvas] of canvases.entries()) {
      await frameShown(video, index, value("fps", row), signal);
      [canvas.width, canvas.height] = [Math.round((height * video.videoWidth) / video.videoHeight), height];
      canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
    }
  } catch {
    // closed in the meantime, or not reachable, which the large player shows
  } finally {
    video.removeAttribute("src");
    video.load();
  }
}

/** Return a promise that `start` fulfils; an error of the video or `signal` rejects it. */
function untilNotified(video, signal, start) {
  return new Promise((done, fail) => {
    video.addEventListener("error", fail, { once: true });
    signal?.addEventListener("abort", fail, { once: true });
    start(done);
  });
}

/**
 * Seek a video to a frame, and wait until the browser shows it: a busy browser reports `seeked` before it has the
 * picture, and would paint the previous one. Not every browser reports which picture it shows, nor a picture that it
 * shows again.
 */
function frameShown(video, index, fps, signal) {
  return untilNotified(video, signal, (done) => {
    let patience = null;
    const look = (_, { mediaTime }) => {
      if (Math.abs(mediaTime * fps - index) < 0.5) {
        clearTimeout(patience);
        done();
      } else video.requestVideoFrameCallback(look);
    };
    if (video.requestVideoFrameCallback) {
      video.requestVideoFrameCallback(look);
      video.addEventListener("seeked", () => (patience = setTimeout(done, PATIENCE_MS)), { once: true });
    } else video.addEventListener("seeked", done, { once: true });
    video.currentTime = (index + 0.5) / fps; // the middle of the frame
  });
}
