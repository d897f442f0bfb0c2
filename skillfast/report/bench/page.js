(() => {
  "use strict";
  const { figures, steps } = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const root = document.documentElement;
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const count = steps.length;
  const pause = count > 20 ? 600 : 1300;
  let step = 1; // counted from 1, as shown
  let timer = null;
  let resized = null;

  // figures name their colours by CSS variable, so both colour schemes share one description
  function themed(value) {
    if (typeof value === "string") {
      return value.startsWith("var(") ? getComputedStyle(root).getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map(themed);
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
    const ticks = { [`${axis}.tickvals`]: kept(tickvals), [`${axis}.ticktext`]: kept(ticktext) };
    // plotly's own choice of an angle can swing to and fro with the margins that it needs
    if (tickangle === undefined) ticks[`${axis}.tickangle`] = Math.max(...widths) * tickvals.length > room ? -90 : 0;
    return ticks;
  }

  function fit(id) {
    const { data, layout } = figures[id];
    const axes = ["xaxis", "yaxis"].filter((axis) => layout[axis].tickvals);
    const ticks = Object.assign({}, ...axes.map((axis) => fitted(id, axis)));
    if (!data[0].texttemplate) return Plotly.relayout(id, ticks);
    // numbers in cells narrower than this would be too small to read
    const written = (at(id).clientWidth - 120) / data[0].x.length >= 18;
    return Plotly.update(id, { texttemplate: written ? data[0].texttemplate : "" }, ticks);
  }

  const options = { responsive: true, displayModeBar: false, displaylogo: false };

  async function drawAll() {
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout, frames } = themed(figure);
      await Plotly.newPlot(id, { data, layout, frames: frames || [], config: options });
      await fit(id);
    }
    at("removal-matrix").on("plotly_click", (event) => go(event.points[0].pointIndex[0] + 1));
  }

  function animate(id, frame) {
    const duration = still.matches || count > 40 ? 0 : 350;
    return Plotly.animate(id, [frame], {
      mode: "immediate",
      transition: { duration, easing: "cubic-in-out" },
      frame: { duration, redraw: false },
    }).catch(() => undefined); // plotly rejects an animation that a newer one replaces
  }

  // the removed class, the others, and the oracle's beside them
  function bars(index) {
    const row = figures["removal-matrix"].data[0].z[index];
    const own = row.map((value, other) => (other === index ? value : null));
    const others = row.map((value, other) => (other === index ? null : value));
    const heights = [own, others, figures["removal-steps"].layout.meta.oracle[index]];
    return { data: heights.map((y) => ({ y })), traces: [0, 1, 2] };
  }

  function mark(id, index) {
    const [shape] = themed(figures[id].layout.shapes);
    const moved = { ...shape, y0: index + shape.y0, y1: index + shape.y1 };
    return Plotly.relayout(id, { shapes: index < 0 ? [] : [moved] });
  }

  async function show() {
    const select = at("removed");
    at("slider").value = step;
    select.value = step;
    const name = select.options[step - 1].text;
    at("slider").setAttribute("aria-valuetext", name);
    const strong = document.createElement("b");
    strong.textContent = name;
    at("status").replaceChildren("Without the skill of ", strong, ` (${step} of ${count}): ${steps[step - 1]}`);
    at("stepper").dataset.step = step;
    await Promise.all([mark("removal-matrix", step - 1), animate("removal-steps", bars(step - 1))]);
  }

  function go(target) {
    step = ((((target - 1) % count) + count) % count) + 1;
    // the address keeps the step, so that it can be passed on
    history.replaceState(null, "", `#step=${step}`);
    return show();
  }

  function fromAddress() {
    const found = /^#step=(\d+)$/.exec(location.hash);
    return found ? Math.min(Math.max(Number(found[1]), 1), count) : null;
  }

  async function advance() {
    const running = timer;
    await go(step + 1);
    // paused meanwhile?
    if (timer === running) timer = setTimeout(advance, pause);
  }

  function play(on) {
    clearTimeout(timer);
    timer = on ? setTimeout(advance, pause) : null;
    at("play").textContent = on ? "Pause" : "Play";
    at("play").setAttribute("aria-pressed", String(on));
    at("status").setAttribute("aria-live", on ? "off" : "polite");
  }

  function zoom(on) {
    const [all, others] = figures["removal-matrix"].layout.meta.limits;
    const limit = on ? others : all;
    return Plotly.restyle("removal-matrix", { zmin: -limit, zmax: limit });
  }

  async function locate(index) {
    at("located-name").textContent = at("located").options[index].text;
    await Promise.all([mark("location-matrix", index - 1), animate("location-steps", String(index))]);
  }

  function listen() {
    const chosen = (target) => {
      play(false);
      go(target);
    };
    at("previous").addEventListener("click", () => chosen(step - 1));
    at("next").addEventListener("click", () => chosen(step + 1));
    at("play").addEventListener("click", () => play(timer === null));
    at("slider").addEventListener("input", (event) => chosen(Number(event.target.value)));
    at("removed").addEventListener("change", (event) => chosen(Number(event.target.value)));
    at("zoom").addEventListener("change", (event) => zoom(event.target.checked));
    at("located").addEventListener("change", (event) => locate(Number(event.target.value)));
    addEventListener("hashchange", () => {
      const target = fromAddress();
      if (target !== null && target !== step) chosen(target);
    });
    addEventListener("resize", () => {
      clearTimeout(resized);
      resized = setTimeout(() => Object.keys(figures).forEach(fit), 200);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", start);
  }

  async function start() {
    await drawAll();
    await Promise.all([show(), zoom(at("zoom").checked), locate(Number(at("located").value))]);
    root.dataset.ready = "true";
  }

  step = fromAddress() ?? 1;
  listen();
  start();
})();
