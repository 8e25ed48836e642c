// Events: the address, the filters, the keys and the theme.

function changed(part) {
  Object.assign(state, part);
  writeAddress();
  show();
}

/** Make the page show the state. */
function show() {
  showFilters();
  showRanges(changed);
  const rows = matching();
  showRows(rows);
  const all = rows.length === page.rows;
  document.getElementById("count").textContent = all
    ? `${count(rows.length)} results`
    : `${count(rows.length)} of ${count(page.rows)} results`;
  document.getElementById("nothing").hidden = rows.length > 0;
  clearTimeout(show.charting);
  show.charting = setTimeout(() => renderMeasures(rows), show.charting ? 150 : 0); // after the gallery
}

function renderMeasures(rows) {
  renderCharts(rows, openDetail);
  renderRanges(rows);
}

function follow() {
  readAddress();
  const { id } = state;
  show();
  const position = id ? shown.findIndex((row) => value("request_id", row) === id) : -1;
  if (position >= 0) {
    openDetail(position);
    return;
  }
  if (dialog.open) dialog.close();
  if (id) changed({ q: id, id: "" }); // not on this page: the gallery says so
}

function buildCopy() {
  addEventListener("click", async (event) => {
    const button = event.target.closest?.("button.copy");
    if (!button) return;
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      // the clipboard API is missing on plain http sites, and may be forbidden
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

function buildTheme() {
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  const remembered = () => {
    try {
      return localStorage.getItem("pia-batch-theme");
    } catch {
      return null;
    }
  };
  let theme = themes.includes(remembered()) ? remembered() : "system";
  const apply = () => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    apply();
    try {
      localStorage.setItem("pia-batch-theme", theme);
    } catch {
      // the browser stores nothing
    }
  });
  apply();
}

addEventListener("keydown", (event) => {
  if (event.key !== "/" || dialog.open || event.target.closest?.("input, select, textarea")) return;
  event.preventDefault();
  document.getElementById("q").focus();
});
addEventListener("hashchange", () => {
  if (location.hash !== "#gallery") follow();
});

buildTheme();
buildCopy();
buildDetail();
buildGallery(openDetail);
buildFilters(changed);
buildRanges(changed);
follow();
