// Plots of the report: the catalogue's entries (reporting/plots.py) and the runs' columns, as plotly's traces and layouts.
// One run: a colour per series. Several: a colour per run and a line style per series.

// Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow, which is too faint for a line; and
// the same hues for a dark page.
const PALETTES = {
  light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
  dark: ["#4AA3E0", "#F0843C", "#2FC19A", "#E09AC0", "#F2B632", "#9AD4F5"],
};
const GREY = "#8A8A8A";
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const FEWEST_TO_SMOOTH = 40;

// Plotly reads some tags in names; a run's name is text.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const hasNumbers = (column) => Array.isArray(column) && column.some((value) => value !== null);

function smooth(values) {
  const half = Math.max(1, Math.floor(values.length / 20));
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - half), i + half + 1).filter((v) => v !== null);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function xOf(records, options) {
  return options.axis === "tokens" && records.tokens ? records.tokens : records.x;
}

function hover(plot, name) {
  const number = plot.percent ? "%{y:.1%}" : "%{y:.4g}";
  return `${number}<extra>${name}</extra>`;
}

const colourOf = (options, i) => PALETTES[options.palette][i % PALETTES.light.length];

// Entries of the legend without data: of several runs, the colours stand in the page's legend, the line styles here.
function styleEntries(series) {
  return series.map((s, j) => ({ x: [null], y: [null], type: "scatter", mode: "lines", name: s.label, line: { color: GREY, dash: DASHES[j % DASHES.length] } }));
}

// A line, and where it is long and smoothing is on, its running mean over the faint line itself.
function lineTraces(plot, x, y, name, style) {
  const base = { x, type: "scatter", name, legendgroup: name, hovertemplate: hover(plot, name) };
  const line = { color: style.colour, dash: style.dash, width: 1.8 };
  if (!style.smooth || y.filter((v) => v !== null).length < FEWEST_TO_SMOOTH) {
    const few = y.filter((v) => v !== null).length < 25;
    return [{ ...base, y, mode: few ? "lines+markers" : "lines", marker: { size: 5, color: style.colour }, line, connectgaps: false }];
  }
  const faint = { ...base, y, mode: "lines", opacity: 0.28, line: { ...line, width: 1 }, showlegend: false, hoverinfo: "skip", hovertemplate: null };
  return [faint, { ...base, y: smooth(y), mode: "lines", line, hovertemplate: hover(plot, `${name} (mean nearby)`) }];
}

function lines(plot, runs, options) {
  const traces = [], several = options.runs > 1, used = new Set();
  runs.forEach((run) => plot.series.forEach((series, j) => {
    const records = run[plot.source];
    if (!hasNumbers(records[series.key])) return;
    used.add(series);
    const name = several ? plain(plot.series.length > 1 ? `${run.name}: ${series.label}` : run.name) : series.label;
    const style = { colour: several ? colourOf(options, run.place) : series.label === "all tokens" ? GREY : colourOf(options, j), dash: several ? DASHES[j % DASHES.length] : "solid", smooth: options.smooth && plot.smooth };
    const found = lineTraces(plot, xOf(records, options), records[series.key], name, style);
    if (hasNumbers(records[series.high])) addInterval(found[found.length - 1], records, series, plot);
    if (several) found.forEach((trace) => { trace.showlegend = false; });
    traces.push(...found);
  }));
  return several && used.size > 1 ? [...traces, ...styleEntries(plot.series.filter((s) => used.has(s)))] : traces;
}

function addInterval(trace, records, series, plot) {
  const y = records[series.key], low = records[series.low], high = records[series.high];
  const distance = (ends, sign) => y.map((v, i) => (v === null || ends[i] === null ? null : sign * (ends[i] - v)));
  trace.error_y = { type: "data", symmetric: false, array: distance(high, 1), arrayminus: distance(low, -1), thickness: 1.2, width: 4 };
  trace.customdata = y.map((_, i) => [low[i], high[i]]);
  const form = plot.percent ? ".1%" : ".3g";
  trace.hovertemplate = trace.hovertemplate.replace("<extra>", ` (%{customdata[0]:${form}} to %{customdata[1]:${form}})<extra>`);
}

// Bands of quantiles around the median, and the extremes as thin lines. Of several runs, their lines only.
function fan(plot, runs, options) {
  const central = { ...plot, series: plot.series.filter((s) => !s.low && !/_(min|max)$/.test(s.key)) };
  if (options.runs > 1) return lines(central, runs, options);
  const [run] = runs, x = xOf(run.metrics, options), traces = [];
  const bands = plot.series.filter((s) => s.low && hasNumbers(run.metrics[s.low]) && hasNumbers(run.metrics[s.high]));
  bands.reverse().forEach((series, i) => {
    const edge = { x, type: "scatter", mode: "lines", line: { width: 0, color: colourOf(options, 0) }, legendgroup: series.label };
    traces.push({ ...edge, y: run.metrics[series.low], showlegend: false, hovertemplate: hover(plot, series.label + ": lower") });
    const fillcolor = i ? "rgba(0,114,178,.32)" : "rgba(0,114,178,.15)";
    traces.push({ ...edge, y: run.metrics[series.high], fill: "tonexty", fillcolor, name: series.label, hovertemplate: hover(plot, series.label + ": upper") });
  });
  traces.push(...lines(central, runs, options));
  for (const series of plot.series.filter((s) => /_(min|max)$/.test(s.key) && hasNumbers(run.metrics[s.key]))) {
    const line = { width: 1, dash: "dot", color: GREY };
    traces.push({ x, y: run.metrics[series.key], type: "scatter", mode: "lines", line, name: series.label, hovertemplate: hover(plot, series.label) });
  }
  return traces;
}

// One run: areas over the steps. Several: one bar of means per run.
function stacked(plot, runs, options) {
  const series = plot.series.filter((s) => runs.some((run) => (run[plot.source][s.key] || []).some((v) => v))); // of nothing there is no area
  if (options.runs > 1) {
    const mean = (values) => {
      const there = (values || []).filter((v) => v !== null);
      return there.length ? there.reduce((a, b) => a + b, 0) / there.length : 0;
    };
    return series.map((s, j) => ({
      type: "bar", name: s.label, x: runs.map((run) => plain(run.name)), y: runs.map((run) => mean(run[plot.source][s.key])),
      marker: { color: colourOf(options, j) }, hovertemplate: hover(plot, `${s.label}, mean`), width: 0.5,
    }));
  }
  const records = runs[0][plot.source];
  return series.map((s, j) => ({
    x: xOf(records, options), y: records[s.key].map((v) => v ?? 0), type: "scatter", mode: "lines", stackgroup: "one", name: s.label,
    line: { width: 0.5, color: colourOf(options, j) }, fillcolor: colourOf(options, j) + "bb", hovertemplate: hover(plot, s.label),
  }));
}

const LOWEST_SHARE = -3; // a thousandth of the tokens: the heat map's faintest colour

function heatmap(plot, run, options) {
  const histograms = run.metrics[plot.series[0].key], bins = histograms.find((h) => h).length;
  const shares = histograms.map((h) => {
    const total = h ? h.reduce((a, b) => a + b, 0) : 0;
    return total ? h.map((n) => n / total) : null;
  });
  const rows = [...Array(bins).keys()];
  const share = rows.map((b) => shares.map((s) => (s ? s[b] : null)));
  const ticks = [-3, -2, -1, 0];
  return [{
    type: "heatmap", x: xOf(run.metrics, options), y: rows.map((b) => (b + 0.5) / bins), customdata: share,
    z: share.map((row) => row.map((s) => (s ? Math.max(LOWEST_SHARE, Math.log10(s)) : null))),
    zmin: LOWEST_SHARE, zmax: 0, colorscale: "Viridis", hoverongaps: false,
    hovertemplate: "%{x}: %{customdata:.2%} of the tokens<br>at ρ ≈ %{y:.3f}<extra></extra>",
    colorbar: { thickness: 10, outlinewidth: 0, tickvals: ticks, ticktext: ticks.map((t) => `${100 * 10 ** t}%`) },
  }];
}

function tracesOf(plot, runs, options) {
  if (plot.kind === "heatmap") return heatmap(plot, runs[0], options);
  return { lines, fan, stacked }[plot.kind](plot, runs, options);
}

function layoutOf(plot, runs, traces, options, theme) {
  const bars = plot.kind === "stacked" && options.runs > 1;
  const positive = traces.some((t) => (t.y || []).some((v) => v > 0));
  const axis = { gridcolor: theme.line, linecolor: theme.line, zerolinecolor: theme.line, automargin: true };
  const xTitle = options.axis === "tokens" ? "generated tokens" : "step";
  const map = plot.kind === "heatmap", entries = traces.filter((t) => t.showlegend !== false).length;
  return {
    margin: { l: 52, r: map ? 4 : 10, t: 24, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: theme.ink }, hovermode: map ? "closest" : "x unified",
    hoverlabel: { bgcolor: theme.card, bordercolor: theme.soft, font: { color: theme.ink, size: 12 }, namelength: -1 },
    showlegend: !map && entries > 1, legend: { traceorder: "normal", orientation: "h", y: -0.22, yanchor: "top", font: { size: 11 }, itemwidth: 30 },
    xaxis: { ...axis, title: bars ? undefined : { text: xTitle, standoff: 6 }, type: bars ? "category" : undefined, showgrid: false },
    yaxis: {
      ...axis, title: { text: plot.unit, standoff: 6 }, type: plot.log && positive ? "log" : undefined, exponentformat: "power",
      dtick: plot.log && positive && traces.length > 1 ? 1 : undefined, nticks: 7,
      tickformat: plot.percent ? ".0%" : undefined, range: map ? [0, 1] : undefined, rangemode: plot.kind === "stacked" ? "tozero" : undefined,
    },
    width: theme.width, height: theme.height, autosize: !theme.width, barmode: "stack", modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.soft, activecolor: theme.ink }, dragmode: window.innerWidth < 700 ? false : "zoom",
  };
}

const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };

// Cards of the whole catalogue: [{plot, runs, title, missing}], heat maps once per run.
function cardsOf(catalogue, runs) {
  return catalogue.flatMap((plot) => {
    const holders = runs.filter((run) => plot.series.some((s) => [s.key, s.low].some((key) => hasNumbers(run[plot.source][key]))));
    if (plot.kind !== "heatmap" || holders.length < 2) return [{ plot, runs: holders, title: plot.title, wide: plot.wide }];
    return holders.map((run) => ({ plot, runs: [run], title: `${plot.title}: ${run.name}`, wide: false }));
  });
}

function hasInterval(card) {
  return card.plot.kind === "lines" && card.plot.series.some((s) => s.high && card.runs.some((run) => hasNumbers(run[card.plot.source][s.high])));
}

// Why a plot is missing, or which of its lines are.
function missing(card) {
  if (!card.runs.length) {
    const only = card.plot.series.map((s) => s.only).find((text) => text);
    return only ? `Not recorded: only ${only}.` : "Not recorded by this run.";
  }
  return "";
}

// `state`: what the reader chose; a heat map stays where its run is hidden.
function drawCard(element, card, state, runs, theme) {
  const options = { ...state, runs, palette: theme.palette };
  const shown = card.plot.kind === "heatmap" ? card.runs : card.runs.filter((run) => !state.hidden.includes(run.name));
  const traces = tracesOf(card.plot, shown, options);
  return Plotly.react(element, traces, layoutOf(card.plot, shown, traces, options, theme), CONFIG);
}
