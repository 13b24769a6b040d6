// The report's page: unpacks data and plotly, builds the sections, redraws on demand, and reloads while a run goes on.

const KEPT = `report:${location.pathname}`; // what the reader chose survives a reload
const QUIET_MS = 8000; // no reload while the reader is busy

async function unpack(id) {
  const home = document.getElementById(id);
  const bytes = Uint8Array.from(atob(home.textContent), (letter) => letter.charCodeAt(0));
  home.remove();
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function restore(defaults) {
  try {
    return { ...defaults, ...JSON.parse(sessionStorage.getItem(KEPT) || "{}") };
  } catch {
    return defaults; // no storage, or not ours
  }
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colours = Object.fromEntries(["ink", "soft", "line", "card"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  return { ...colours, palette: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" };
}

const PRINTED = { ink: "#1b1f24", soft: "#5b6570", line: "#dde1e6", card: "#fff", palette: "light" };
const ON_PAPER = { width: 312, height: 280 }, WIDE_ON_PAPER = { width: 650, height: 280 }; // two columns of a page

function section(id, title, ...content) {
  return element("section", { id }, element("h2", {}, title), ...content);
}

const LONG_FACT = 90; // letters that need a separate line

// What one run was, in columns of pairs.
function factsList(run) {
  const pair = ([name, value]) => element("div", { class: value.length > LONG_FACT ? "long" : "" }, element("dt", {}, name), element("dd", {}, value));
  return element("div", { class: "card" }, element("dl", { class: "facts" }, ...run.facts.map(pair)));
}

function factsTable(runs) {
  const names = [...new Set(runs.flatMap((run) => run.facts.map(([name]) => name)))];
  const value = (run, name) => run.facts.find(([other]) => other === name)?.[1] || "";
  const head = element("tr", {}, element("th"), ...runs.map((run) => element("th", {}, run.name)));
  const rows = names.map((name) => element("tr", {}, element("th", {}, name), ...runs.map((run) => element("td", {}, value(run, name)))));
  return element("div", { class: "card scroll" }, element("table", {}, element("tbody", {}, head, ...rows)));
}

function tiles(run) {
  return element("div", { class: "tiles" }, ...run.columns.filter(([, value]) => value)
    .map(([name, value, detail]) => element("div", { class: "tile" }, element("span", {}, name), element("b", {}, value), element("span", {}, detail))));
}

function runsTable(runs) {
  const names = runs[0].columns.map(([name]) => name);
  const head = element("tr", {}, element("th", {}, "run"), ...names.map((name) => element("th", {}, name)));
  const rows = runs.map((run) => element("tr", {}, element("td", {}, element("b", {}, run.name)), ...run.columns.map(([, value, detail]) =>
    element("td", {}, value, value ? element("div", { class: "soft small" }, detail) : null))));
  return element("div", { class: "card scroll" }, element("table", {}, element("tbody", {}, head, ...rows)));
}

function differencesTable(runs, differences) {
  if (!differences.length) return element("p", { class: "soft" }, "The runs' recipes are the same, as far as they are recorded.");
  const head = element("tr", {}, element("th", {}, "key"), ...runs.map((run) => element("th", {}, run.name)));
  const rows = differences.map((row) => element("tr", { title: row.help }, element("td", { class: "key" }, row.key), ...row.values.map((value) => element("td", {}, value))));
  return element("div", { class: "card scroll" }, element("table", {}, element("tbody", {}, head, ...rows)));
}

function settingsTable(settings) {
  const head = element("tr", {}, ...["key", "value", "default"].map((name) => element("th", {}, name)), element("th", { class: "help" }, "meaning"));
  const rows = settings.map((row) => element("tr", { class: row.changed ? "changed" : "" }, element("td", { class: "key" }, row.key),
    element("td", { class: "value" }, row.value), element("td", { class: "soft" }, row.default), element("td", { class: "soft small help" }, row.help)));
  return element("div", { class: "scroll" }, element("table", { class: "settings" }, element("tbody", {}, head, ...rows)));
}

function recipeOf(run, named) {
  if (!run.settings.length) return element("p", { class: "soft" }, `${named ? `${run.name}: ` : ""}no recipe was recorded.`);
  const changed = run.settings.filter((row) => row.changed), same = run.settings.filter((row) => !row.changed);
  return element("div", { class: "card" }, named ? element("h3", {}, run.name) : null,
    element("p", {}, `${changed.length} of ${run.settings.length} keys differ from the defaults.`), settingsTable(changed),
    element("details", {}, element("summary", {}, `${same.length} keys at their defaults`), settingsTable(same)));
}

// The plots of a section of the catalogue as cards; each is drawn when it comes near the window.
function plotCards(cards, drawing) {
  return element("div", { class: "cards" }, ...cards.map((card) => {
    const note = [card.plot.note, hasInterval(card) ? "Bars are 95% intervals." : ""].filter((text) => text).join(" ");
    const why = missing(card), home = element("div", { class: `plot${why ? " empty" : ""}`, "data-plot": card.plot.name }, why);
    if (!why) drawing.add(home, card);
    return element("div", { class: `card${card.wide ? " wide" : ""}` }, element("h3", {}, card.title), note ? element("p", {}, note) : null, home);
  }));
}

class Drawing {
  constructor(state, runs) {
    this.state = state;
    this.runs = runs;
    this.cards = new Map();
    this.drawn = new Set();
    this.seen = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach((e) => this.draw(e.target)), { rootMargin: "600px" });
  }

  add(home, card) {
    this.cards.set(home, card);
    this.seen.observe(home);
  }

  draw(home, colours = theme()) {
    this.seen.unobserve(home);
    this.drawn.add(home);
    return drawCard(home, this.cards.get(home), this.state, this.runs, colours);
  }

  redraw() {
    this.drawn.forEach((home) => this.draw(home));
  }

  print() {
    for (const [home, card] of this.cards) this.draw(home, { ...PRINTED, ...(card.wide ? WIDE_ON_PAPER : ON_PAPER) });
  }
}

function optionControls(runs, state, changed) {
  const tokens = runs.every((run) => run.metrics.tokens);
  const radio = (value, label, enabled) => element("label", {}, element("input", { type: "radio", name: "axis", value, checked: state.axis === value, disabled: !enabled,
    onchange: () => { state.axis = value; changed(); } }), ` ${label}`);
  const smoothing = element("label", {}, element("input", { type: "checkbox", id: "smooth", checked: state.smooth,
    onchange: (event) => { state.smooth = event.target.checked; changed(); } }), " smooth");
  return element("span", { class: "options" }, radio("steps", "steps", true), radio("tokens", "generated tokens", tokens), smoothing);
}

// The colours of several runs; a click hides a run.
function runsLegend(runs, state, changed) {
  const entry = (run) => {
    const shown = element("input", { type: "checkbox", checked: !state.hidden.includes(run.name), onchange: () => {
      state.hidden = shown.checked ? state.hidden.filter((name) => name !== run.name) : [...state.hidden, run.name];
      changed();
    } });
    return element("label", {}, shown, element("span", { class: `line p${run.place % 6}` }), run.name);
  };
  return element("span", { class: "legend", role: "group", "aria-label": "Runs" }, ...runs.map(entry));
}

function keepCurrent(seconds, save) {
  let busy = 0;
  for (const name of ["pointerdown", "pointermove", "keydown", "wheel", "touchstart"]) {
    document.addEventListener(name, () => { busy = Date.now(); }, { passive: true });
  }
  document.getElementById("written").append(`; reloads every ${seconds} s while training goes on`);
  setInterval(() => {
    if (document.hidden || Date.now() - busy < QUIET_MS) return;
    save();
    location.reload(); // the browser keeps the place on the page
  }, 1000 * seconds);
}

function build(data, texts) {
  const { runs, plots } = data, several = runs.length > 1;
  const state = restore({ axis: "steps", smooth: true, run: 0, step: null, query: "", answersRun: 0, before: null, after: null, change: "all problems", hidden: [] });
  runs.forEach((run, i) => { run.place = i; });
  for (const name of ["run", "answersRun"]) state[name] = runs[state[name]] ? state[name] : 0;
  if (!runs.every((run) => run.metrics.tokens)) state.axis = "steps";
  const save = () => { try { sessionStorage.setItem(KEPT, JSON.stringify(state)); } catch { /* a reload forgets */ } };
  const drawing = new Drawing(state, runs.length), cards = cardsOf(plots, runs), main = document.getElementById("main");
  runs.forEach((run) => run.notes.forEach((note) => document.getElementById("notes").append(element("p", { class: "note" }, several ? `${run.name}: ${note}` : note))));
  if (several) {
    main.append(section("overview", "The runs", runsTable(runs)), section("differences", "Differences", differencesTable(runs, data.differences)));
    main.append(section("setup", "Setup", factsTable(runs)));
  } else {
    main.append(section("overview", "The run", tiles(runs[0]), factsList(runs[0])));
  }
  const names = [...new Set(plots.map((plot) => plot.section))], id = (name) => name.toLowerCase().replace(/\W+/g, "-");
  for (const name of names) main.append(section(id(name), name, plotCards(cards.filter((card) => card.plot.section === name), drawing)));
  main.append(section("responses", "Responses", ...samplesSection(runs, texts, state, save)));
  main.append(section("answers", "Before and after", ...answersSection(runs, texts, state, save)));
  main.append(section("recipe", "Recipe", ...runs.map((run) => recipeOf(run, several))));
  main.after(element("footer", {}, "Made by megatron-tropd report. Drag to zoom a plot, double-click to see all of it, click a legend entry to hide its line."));
  const links = [...main.children].map((part) => element("a", { href: `#${part.id}` }, part.querySelector("h2").textContent));
  const changed = () => { save(); drawing.redraw(); };
  const home = document.getElementById("nav");
  home.append(element("div", {}, element("span", { class: "links" }, ...links), optionControls(runs, state, changed)));
  if (several) home.append(element("div", {}, runsLegend(runs, state, changed)));
  installTips(document.getElementById("tip"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawing.redraw());
  addEventListener("beforeprint", () => drawing.print());
  addEventListener("afterprint", () => drawing.redraw());
  if (data.refresh) keepCurrent(data.refresh, save);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old; Chromium 80, Firefox 113 or Safari 16.4 will do");
  const [data, texts, plotly] = await Promise.all(["data", "texts", "plotly"].map(unpack));
  const script = element("script");
  script.textContent = plotly;
  document.head.append(script);
  build(JSON.parse(data), JSON.parse(texts));
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  document.getElementById("notes").append(Object.assign(document.createElement("p"), { className: "note", textContent: `The page cannot be shown: ${error.message}` }));
  throw error;
});
