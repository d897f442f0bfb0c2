// What the figures of every page share: their data, colours and ticks, and that each is drawn when it comes near the
// window. `figures` says what is drawn: whoever changes a figure changes it there, and on the screen after `drawn`, which
// is a promise once drawing has begun: a change of a figure that is half drawn would be lost.
const page = (() => {
  "use strict";
  const at = (id) => document.getElementById(id);
  const root = document.documentElement;
  const options = { responsive: true, displayModeBar: false, displaylogo: false };
  const figures = {};
  const done = new Set();
  const begun = {};
  let drawing = Promise.resolve();
  let resized = null;

  async function read() {
    const holder = at("data");
    if (holder.dataset.packed === undefined) return JSON.parse(holder.textContent);
    const text = atob(holder.textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(inflated).json();
  }

  // figures name their colours by CSS variable, so both colour schemes share one description
  function themed(value) {
    if (typeof value === "string") {
      return value.startsWith("var(") ? getComputedStyle(root).getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.every((item) => item === null || typeof item === "number") ? value : value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item)]));
  }

  // a line of tick labels takes about 17 pixels of its axis; where they do not fit, every second, third ... is shown
  function fitted(id, axis) {
    const { tickvals, ticktext, tickangle } = figures[id].layout[axis];
    const room = Math.max(axis === "xaxis" ? at(id).clientWidth - 120 : at(id).clientHeight - 130, 100);
    const widths = ticktext.map((text) => 10 + 7 * text.length);
    const mean = widths.reduce((sum, width) => sum + width, 0) / widths.length;
    const every = Math.ceil(((axis === "xaxis" && tickangle === 0 ? mean : 17) * tickvals.length) / room);
    const kept = (list) => list.filter((_, index) => index % every === 0);
    const ticks = { tickvals: kept(tickvals), ticktext: kept(ticktext) };
    // plotly's own choice of an angle can swing to and fro with the margins that it needs
    if (tickangle === undefined) ticks.tickangle = Math.max(...widths) * tickvals.length > room ? -90 : 0;
    return ticks;
  }

  const ticked = (id) => ["xaxis", "yaxis"].filter((axis) => figures[id].layout[axis].tickvals?.length);

  // numbers in cells narrower than this would be too small to read
  const written = (id) => (at(id).clientWidth - 120) / figures[id].data[0].x.length >= 18;

  // labels are escaped, since plotly reads them as markup
  const unescaped = (text) => String(text).replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");

  // the numbers of a matrix that are said: the smallest and the largest
  function cells({ x, y, z }, { xaxis, yaxis }) {
    let [low, high] = [null, null];
    z.forEach((row, i) =>
      row.forEach((value, j) => {
        if (value === null) return;
        if (low === null || value < low.value) low = { value, i, j };
        if (high === null || value > high.value) high = { value, i, j };
      }),
    );
    const ends = low === null ? [] : low.value === high.value ? [low] : [low, high];
    const [row, column] = [yaxis.title?.text ?? "row", xaxis.title?.text ?? "column"];
    return ends.map(({ value, i, j }) => ({ value, at: `${row} ${y[i]}, ${column} ${x[j]}` }));
  }

  // what a figure shows, in words: a few numbers all of them, many by their ends
  function words({ data, layout }) {
    if (layout.meta?.told) return layout.meta.told;
    const across = layout.yaxis.type === "category" && data[0].type !== "heatmap";
    const axis = across ? layout.xaxis : layout.yaxis;
    const share = (data[0].colorbar ?? axis).tickformat?.endsWith("%");
    const write = (value) => {
      const number = Number((share ? 100 * value : value).toPrecision(3)).toLocaleString("en").replace("-", "−");
      return share ? `${number} %` : number;
    };
    const parts = ({ type, x, y, z, name }) => {
      if (type === "heatmap") return { points: cells({ x, y, z }, layout) };
      const [values, places] = across ? [x, y] : [y, x];
      const points = values.map((value, i) => ({ value, at: places[i] })).filter(({ value }) => value !== null);
      return { name, points };
    };
    let series = data.filter((trace) => trace.hoverinfo !== "skip" && trace.showlegend !== false).map(parts);
    if (series.length > 4) {
      series = [{ points: series.flatMap(({ name, points }) => points.map(({ value, at }) => ({ value, at: `${name}, ${at}` }))) }];
    }
    const said = series.filter(({ points }) => points.length > 0).map(({ name, points }) => {
      const sorted = [...points].sort((one, other) => one.value - other.value);
      const [low, high] = [sorted[0], sorted.at(-1)].map(({ value, at }) => `${write(value)} (${at})`);
      const few = points.length <= 3 && data[0].type !== "heatmap";
      const text = few || points.length === 1 ? points.map(({ value, at }) => `${write(value)} (${at})`).join(", ") : `from ${low} to ${high}`;
      return name ? `${name}: ${text}` : text;
    });
    const unit = (data[0].colorbar ?? axis).title?.text;
    return `${unit ? `${unit}: ` : ""}${said.join("; ") || "no value"}`;
  }

  // the name of a figure is what it shows and what it found; whoever changes its data says so here
  function tell(id) {
    const element = at(id);
    element.dataset.shows ??= element.getAttribute("aria-label");
    element.setAttribute("aria-label", `${element.dataset.shows}. ${unescaped(words(figures[id])).replace(/\.?$/, ".")}`);
  }

  function draw(id) {
    done.add(id);
    return (begun[id] = plot(id));
  }

  // plotly measures every label that it draws, so that those which do not fit are left out before
  async function plot(id) {
    const { data, layout } = themed({ data: figures[id].data, layout: figures[id].layout });
    for (const axis of ticked(id)) Object.assign(layout[axis], fitted(id, axis));
    if (data[0].texttemplate && !written(id)) data[0].texttemplate = "";
    await Plotly.newPlot(id, { data, layout, config: options });
    // its marks and ticks, one by one, say nothing to who does not see where they lie; nor what it measures text with
    for (const part of [...at(id).children, at("js-plotly-tester")]) part?.setAttribute("aria-hidden", "true");
    at(id).dispatchEvent(new Event("drawn"));
  }

  function fit(id) {
    const ticks = {};
    for (const axis of ticked(id)) {
      for (const [key, value] of Object.entries(fitted(id, axis))) ticks[`${axis}.${key}`] = value;
    }
    const { texttemplate } = figures[id].data[0];
    if (!texttemplate) return Plotly.relayout(id, ticks);
    return Plotly.update(id, { texttemplate: written(id) ? texttemplate : "" }, ticks);
  }

  // one after the other, with a pause in which the page answers
  function queue(ids) {
    for (const id of ids) {
      drawing = drawing.then(() => done.has(id) || draw(id)).then(() => new Promise((next) => setTimeout(next)));
    }
    return drawing;
  }

  async function start(prepare) {
    const { figures: all, ...rest } = await read();
    Object.assign(figures, all);
    root.classList.add("scripted");
    prepare?.(rest);
    Object.keys(figures).forEach(tell);
    const near = new IntersectionObserver(
      (entries) => {
        const ids = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target.id);
        ids.forEach((id) => near.unobserve(at(id)));
        queue(ids).then(() => (root.dataset.ready = "true"));
      },
      { rootMargin: "100% 0px" },
    );
    Object.keys(figures).forEach((id) => near.observe(at(id)));
    if (Object.keys(figures).length === 0) root.dataset.ready = "true";
    addEventListener("beforeprint", () => Object.keys(figures).forEach((id) => done.has(id) || draw(id)));
    addEventListener("resize", () => {
      clearTimeout(resized);
      resized = setTimeout(() => done.forEach(fit), 200);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => done.forEach(draw));
  }

  return { at, figures, drawn: (id) => begun[id], start, tell, themed };
})();
