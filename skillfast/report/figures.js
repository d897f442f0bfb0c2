// What the figures of every page share: their data, colours and ticks, and that each is drawn when it comes near the
// window. `figures` says what is drawn: whoever changes a figure changes it there, and on the screen if `isDrawn`.
const page = (() => {
  "use strict";
  const at = (id) => document.getElementById(id);
  const root = document.documentElement;
  const options = { responsive: true, displayModeBar: false, displaylogo: false };
  const figures = {};
  const done = new Set();
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

  // plotly measures every label that it draws, so that those which do not fit are left out before
  async function draw(id) {
    done.add(id);
    const { data, layout } = themed({ data: figures[id].data, layout: figures[id].layout });
    for (const axis of ticked(id)) Object.assign(layout[axis], fitted(id, axis));
    if (data[0].texttemplate && !written(id)) data[0].texttemplate = "";
    await Plotly.newPlot(id, { data, layout, config: options });
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

  return { at, figures, isDrawn: (id) => done.has(id), start, themed };
})();
