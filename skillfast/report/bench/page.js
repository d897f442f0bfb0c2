// The report: steps through removals and places, and finds skills by name.
(() => {
  "use strict";
  const { at, drawn, figures, themed } = page;
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const MOST = 12; // skills that a search shows
  const marks = {}; // the outline of a matrix's first row, by the matrix
  let steps = [];
  let names = []; // of the skills, as results name them
  let count = 0;
  let pause = 0;
  let step = 1; // counted from 1, as shown
  let timer = null;
  let typed = null;

  async function animate(id, data) {
    data.forEach((trace, index) => (figures[id].data[index].y = trace.y));
    page.tell(id);
    if (!drawn(id)) return undefined;
    await drawn(id);
    const duration = still.matches || count > 40 ? 0 : 350;
    const frame = { data: data.map(({ y }) => ({ y })), traces: data.map((_, index) => index) };
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
    return [own, others, figures["removal-steps"].layout.meta.oracle[index]].map((y) => ({ y }));
  }

  function mark(id, index) {
    const { y0, y1 } = marks[id];
    const shapes = index < 0 ? [] : [{ ...marks[id], y0: index + y0, y1: index + y1 }];
    figures[id].layout.shapes = shapes;
    return drawn(id)?.then(() => Plotly.relayout(id, { shapes: themed(figures[id].layout.shapes) }));
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
    at("status").setAttribute("aria-live", on ? "off" : "polite");
  }

  function zoom(on) {
    const [all, others] = figures["removal-matrix"].layout.meta.limits;
    const limit = on ? others : all;
    Object.assign(figures["removal-matrix"].data[0], { zmin: -limit, zmax: limit });
    return drawn("removal-matrix")?.then(() => Plotly.restyle("removal-matrix", { zmin: -limit, zmax: limit }));
  }

  async function locate(index) {
    at("located").value = index;
    at("located-name").textContent = at("located").options[index].text;
    const places = figures["location-steps"].frames[index].data;
    await Promise.all([mark("location-matrix", index - 1), animate("location-steps", places)]);
  }

  function made(tag, text, of = {}) {
    const element = Object.assign(document.createElement(tag), of);
    element.textContent = text;
    return element;
  }

  // the tables by skill, each with its rows by the name at their head
  const bySkill = () => document.querySelectorAll("table[data-skills]");
  const rows = (table) => Array.from(table.tBodies[0].rows).slice(Number(table.dataset.first));

  // what the tables of the page say of one skill
  function card(index) {
    const parts = [made("h3", names[index]), made("p", `Without it: ${steps[index]}`)];
    const grid = made("div", "", { className: "facts" });
    for (const table of bySkill()) {
      const row = rows(table).find((each) => each.cells[0].textContent === names[index]);
      if (!row) continue;
      const list = document.createElement("dl");
      Array.from(row.cells).slice(1).forEach((cell, column) => {
        if (!cell.textContent) return;
        const pair = document.createElement("div");
        pair.append(made("dt", table.tHead.rows[0].cells[column + 1].textContent), made("dd", cell.textContent));
        list.append(pair);
      });
      const part = document.createElement("section");
      part.append(made("h4", table.dataset.skills), list);
      grid.append(part);
    }
    const told = graph.of(index);
    if (told.length > 0) {
      const part = document.createElement("section");
      const list = document.createElement("ul");
      list.append(...told.map((text) => made("li", text)));
      part.append(made("h4", "Connections"), list);
      grid.append(part);
    }
    at("card").replaceChildren(...parts, grid);
    at("card").setAttribute("aria-label", names[index]);
    at("card").hidden = false;
  }

  // turns the whole page to one skill
  function choose(index) {
    play(false);
    card(index);
    graph.pin(index);
    const place = Array.from(at("located").options).findIndex((option, n) => n > 0 && option.text === names[index]);
    return Promise.all([go(index + 1), place > 0 ? locate(place) : undefined]);
  }

  // what was found stands where a screen reader goes on
  function open(index) {
    choose(index);
    at("card").focus();
  }

  function search() {
    const wanted = at("search").value.trim().toLowerCase();
    const all = names.map((_, index) => index);
    const found = all.filter((index) => names[index].toLowerCase().includes(wanted));
    const matching = new Set(found.map((index) => names[index]));
    for (const table of bySkill()) {
      for (const row of rows(table)) row.hidden = !matching.has(row.cells[0].textContent);
    }
    const shown = found.slice(0, MOST);
    at("matches").replaceChildren(
      ...shown.map((index) => {
        const item = document.createElement("li");
        item.append(made("button", names[index], { type: "button", onclick: () => open(index) }));
        return item;
      }),
    );
    const many = found.length > MOST ? `; the first ${MOST} stand here` : "";
    at("matching").textContent = wanted
      ? `${found.length} of ${count} skills match${many}. Tables by skill show no others.`
      : `${count} skills${many}.`;
    return found;
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
    at("search").addEventListener("input", () => {
      clearTimeout(typed);
      typed = setTimeout(search, 120);
    });
    at("search").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      clearTimeout(typed);
      const [first] = search();
      if (first !== undefined) open(first);
    });
    at("removal-matrix").addEventListener("drawn", () => {
      at("removal-matrix").on("plotly_click", (event) => chosen(event.points[0].pointIndex[0] + 1));
    });
    addEventListener("hashchange", () => {
      const target = fromAddress();
      if (target !== null && target !== step) chosen(target);
    });
  }

  page.start((data) => {
    ({ steps } = data);
    names = Array.from(at("removed").options, (option) => option.text);
    count = steps.length;
    pause = count > 20 ? 600 : 1300;
    for (const id of ["removal-matrix", "location-matrix"]) [marks[id]] = figures[id].layout.shapes;
    step = fromAddress() ?? 1;
    graph.start(data.connections, choose);
    listen();
    search();
    show();
    zoom(at("zoom").checked);
    locate(Number(at("located").value));
  });
})();
