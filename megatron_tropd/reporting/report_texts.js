// Responses of the report: samples with every token coloured and hovered, by step or by search; graded answers side by side.

const KIND_NAMES = ["trusted", "outlier", "guidance", "dropped"];
const MOST_SHOWN = 20;
const FIRST_ANSWERS = 8;

// element("p", {class: "soft"}, "text", child, ...); whatever comes from data enters as text, never as HTML.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const probability = (milli) => Math.exp(milli / 1000);
const percent = (p) => (p >= 0.9995 ? "100%" : p >= 0.001 ? `${(100 * p).toPrecision(3)}%` : p === 0 ? "0%" : `${(100 * p).toExponential(1)}%`);

function sampleText(packed, sample) {
  sample.text ??= sample.t.map((place) => packed.texts[place]).join("");
  return sample.text;
}

// The tokens that overlap an occurrence of the query (lower case).
function hits(packed, sample, query) {
  const found = new Set();
  if (!query) return found;
  const text = sampleText(packed, sample).toLowerCase(), ends = [];
  let length = 0;
  for (const place of sample.t) ends.push((length += packed.texts[place].length));
  for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
    sample.t.forEach((place, i) => {
      const begin = ends[i] - packed.texts[place].length;
      if (begin < at + query.length && ends[i] > at) found.add(i);
    });
  }
  return found;
}

function tokenSpan(packed, sample, i, hit) {
  const text = packed.texts[sample.t[i]];
  const span = element("span", { class: `tok edge k${sample.k[i]}${hit ? " hit" : ""}`, "data-i": i });
  if (text === "") span.append(element("span", { class: "mark" }, "∅"));
  text.split("\n").forEach((part, j) => {
    if (j) span.append(element("span", { class: "mark" }, "↵"), "\n");
    span.append(part);
  });
  return span;
}

function marked(text, query) {
  const parts = [], lower = text.toLowerCase();
  let from = 0;
  for (let at = query ? lower.indexOf(query) : -1; at >= 0; at = lower.indexOf(query, from)) {
    parts.push(text.slice(from, at), element("mark", {}, text.slice(at, at + query.length)));
    from = at + query.length;
  }
  return [...parts, text.slice(from)];
}

function sampleCard(packed, sample, query) {
  const counts = KIND_NAMES.map((name, kind) => [[...sample.k].filter((k) => +k === kind).length, name]).filter(([n]) => n);
  const found = hits(packed, sample, query);
  const response = element("div", { class: "text response" });
  sample.t.forEach((_, i) => response.append(tokenSpan(packed, sample, i, found.has(i))));
  response.report = { packed, sample };
  return element("article", { class: "card sample" },
    element("h3", {}, element("b", {}, `Step ${sample.step + 1}`), element("span", {}, String(sample.prompt_id)),
      element("span", {}, `${sample.t.length} tokens: ${counts.map(([n, name]) => `${n} ${name}`).join(", ")}`), element("span", {}, `ended by ${sample.finish}`)),
    element("div", { class: "text prompt" }, ...marked(packed.texts[sample.prompt], query)), response);
}

// What the pointer shows of a token.
function tokenTip(packed, sample, i) {
  const student = sample.s[i], teacher = sample.l[i], rows = [];
  if (student !== null && teacher !== null) {
    rows.push(["ρ", Math.min(1, probability(teacher - student)).toPrecision(3), ""]);
    rows.push(["student's log-probability", (student / 1000).toFixed(3), percent(probability(student))]);
    rows.push(["teacher's log-probability", (teacher / 1000).toFixed(3), percent(probability(teacher))]);
    rows.push(["advantage", ((teacher - student) / 1000).toFixed(3), ""]);
  }
  const table = (lines) => element("table", {}, ...lines.map((cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell)))));
  const quoted = (text) => element("code", {}, text === "" ? "∅" : JSON.stringify(text).slice(1, -1));
  const parts = [element("div", {}, quoted(packed.texts[sample.t[i]]), ` ${KIND_NAMES[sample.k[i]]}`)];
  parts.push(rows.length ? table(rows) : element("div", { class: "soft" }, sample.k[i] === "2" ? "Written by the teacher: no gate." : sample.k[i] === "3" ? "Left out of the loss: no numbers." : "No numbers recorded."));
  const alternatives = (sample.a && sample.a[i]) || [];
  if (alternatives.length) {
    const lines = [];
    for (let j = 0; j < alternatives.length; j += 2) {
      const p = probability(alternatives[j + 1]);
      lines.push([quoted(packed.texts[alternatives[j]]), percent(p), element("span", { class: "bar", style: `width:${(5 * p).toFixed(2)}rem` })]);
    }
    parts.push(element("div", { class: "soft" }, "Teacher's most probable tokens"), table(lines));
  }
  return parts;
}

function installTips(tip) {
  const hide = () => { tip.hidden = true; };
  document.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".tok"), home = token?.closest(".response");
    if (!home?.report) return hide();
    tip.replaceChildren(...tokenTip(home.report.packed, home.report.sample, +token.dataset.i));
    tip.hidden = false;
    const at = token.getClientRects()[0], size = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, window.innerWidth - size.width - 8));
    const below = at.bottom + 6 + size.height < window.innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - size.height - 6)}px`;
  });
  document.addEventListener("scroll", hide, { passive: true, capture: true });
}

function runSelect(runs, chosen, change) {
  if (runs.length < 2) return null;
  const options = runs.map((run, i) => element("option", { value: i, selected: i === chosen }, run.name));
  return element("select", { "aria-label": "Run", onchange: (event) => change(+event.target.value) }, ...options);
}

// The section of samples: a step's, or those that contain the query.
function samplesSection(runs, texts, state, save) {
  const shown = element("div"), controls = element("div", { class: "controls" }), count = element("span", { class: "soft", "aria-live": "polite" });
  const show = () => {
    save();
    const packed = texts[state.run].samples, query = state.query.trim().toLowerCase();
    const steps = [...new Set(packed.samples.map((s) => s.step))];
    if (!steps.includes(state.step)) state.step = steps[steps.length - 1];
    const chosen = packed.samples.filter((s) => query
      ? sampleText(packed, s).toLowerCase().includes(query) || packed.texts[s.prompt].toLowerCase().includes(query)
      : s.step === state.step);
    count.textContent = !packed.samples.length ? "No responses were recorded (logging.samples)." : query
      ? `${chosen.length} of ${packed.samples.length} responses${chosen.length > MOST_SHOWN ? `, the first ${MOST_SHOWN} shown` : ""}`
      : `step ${state.step + 1} of ${steps[steps.length - 1] + 1}: ${chosen.length} response${chosen.length === 1 ? "" : "s"}`;
    slider.max = Math.max(0, steps.length - 1);
    slider.value = steps.indexOf(state.step);
    slider.disabled = Boolean(query);
    before.disabled = slider.disabled || slider.value === "0";
    after.disabled = slider.disabled || slider.value === slider.max;
    shown.replaceChildren(...chosen.slice(0, MOST_SHOWN).map((s) => sampleCard(packed, s, query)));
  };
  const go = (place) => {
    const steps = [...new Set(texts[state.run].samples.samples.map((s) => s.step))];
    state.step = steps[Math.max(0, Math.min(steps.length - 1, place))];
    show();
  };
  const slider = element("input", { type: "range", min: 0, "aria-label": "Step", oninput: () => go(+slider.value) });
  const before = element("button", { type: "button", "aria-label": "Step before", onclick: () => go(+slider.value - 1) }, "◀");
  const after = element("button", { type: "button", "aria-label": "Step after", onclick: () => go(+slider.value + 1) }, "▶");
  const search = element("input", { type: "search", id: "search", placeholder: "Search prompts and responses of all steps", "aria-label": "Search responses", oninput: () => { state.query = search.value; show(); } });
  search.value = state.query;
  const run = runSelect(runs, state.run, (chosen) => { state.run = chosen; show(); });
  controls.append(...[run, before, slider, after, search, count].filter((part) => part));
  show();
  const legend = element("div", { class: "legend" }, ...["trusted: inside the trust region", "outlier: outside of it", "guidance: written by the teacher", "dropped: left out of the loss (rollout.on_…)"]
    .map((text, kind) => element("span", {}, element("span", { class: `tok k${kind}` }, ` ${text.split(":")[0]} `), text.slice(text.indexOf(":") + 1))));
  return [legend, controls, shown];
}

const GRADES = { true: ["✓ correct", "right"], false: ["✗ wrong", "wrong"] };

function answerSide(step, answer) {
  if (!answer) return element("div", { class: "side" }, element("p", { class: "soft grade" }, `after ${step} steps: not recorded`));
  const [grade, style] = GRADES[answer.correct] || ["not graded", ""];
  return element("div", { class: `side ${style}` },
    element("p", { class: "grade soft" }, `after ${step} steps: `, element("b", {}, grade), answer.found === null || answer.found === undefined ? ", no answer found" : `, answer ${answer.found}`),
    element("div", { class: "text response" }, answer.response || "(empty)"));
}

const CHANGES = {
  "all problems": () => true,
  "became correct": (a, b) => a?.correct === false && b?.correct === true,
  "became wrong": (a, b) => a?.correct === true && b?.correct === false,
  "still wrong": (a, b) => a?.correct === false && b?.correct === false,
};

// The section of graded answers: two evaluations of one run, side by side.
function answersSection(runs, texts, state, save) {
  const shown = element("div"), count = element("span", { class: "soft" }), controls = element("div", { class: "controls" });
  let limit = FIRST_ANSWERS;
  const show = () => {
    save();
    const { steps, problems } = texts[state.answersRun].answers;
    const place = (at, other) => (steps.includes(at) ? at : other);
    state.before = place(state.before, steps[0]);
    state.after = place(state.after, steps[steps.length - 1]);
    const pairs = problems.map((p) => [p, p.by_step[state.before], p.by_step[state.after]]);
    const chosen = pairs.filter(([, a, b]) => CHANGES[state.change](a, b));
    count.textContent = problems.length ? `${chosen.length} of ${problems.length} recorded problems` : "No graded answers were recorded (evaluation.problems, logging.answers).";
    const select = (name, at) => element("select", { "aria-label": name, onchange: (event) => { state[at] = +event.target.value; show(); } },
      ...steps.map((step) => element("option", { value: step, selected: step === state[at] }, `after ${step} steps`)));
    const kinds = element("select", { "aria-label": "Which problems", onchange: (event) => { state.change = event.target.value; show(); } },
      ...Object.keys(CHANGES).map((name) => element("option", { selected: name === state.change }, name)));
    const run = runSelect(runs, state.answersRun, (at) => { state.answersRun = at; show(); });
    controls.replaceChildren(...[run, ...(steps.length ? [select("Before", "before"), select("After", "after"), kinds] : []), count].filter((part) => part));
    shown.replaceChildren(...chosen.slice(0, limit).map(([problem, a, b]) => element("article", { class: "card sample" },
      element("h3", {}, element("b", {}, String(problem.id)), element("span", {}, `expected answer ${problem.answer}`)),
      element("div", { class: "text prompt" }, problem.prompt),
      element("div", { class: "pair" }, answerSide(state.before, a), answerSide(state.after, b)))));
    if (chosen.length > limit) shown.append(element("button", { type: "button", onclick: () => { limit += MOST_SHOWN; show(); } }, `Show ${Math.min(MOST_SHOWN, chosen.length - limit)} more`));
  };
  show();
  return [controls, shown];
}
