// The graph of connections between classes: a row per class, an arc per connection; classes are buttons, so that it
// works by keyboard, and what is told of the pointed one stands beside it as text.
const graph = (() => {
  "use strict";
  const { at } = page;
  const ROW = 28; // pixels, as in the style sheet
  const SVG = "http://www.w3.org/2000/svg";
  let found = null; // { kinds: [[key, name]], names, edges: [[kind, from, to, text]], drawn }
  let choose = null;
  let nodes = []; // the classes that have a row
  let pinned = null;
  let pointed = null;
  const off = new Set(); // kinds that are not shown

  const touches = (index) => (edge) => edge[1] === index || edge[2] === index;
  const other = (edge, index) => (edge[1] === index ? edge[2] : edge[1]);
  const of = (index) => (found ? found.edges.filter(touches(index)).map((edge) => edge[3]) : []);

  function shape(tag, attributes) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  // the strongest connections of all, and those of a class that was asked for
  function edges() {
    const strongest = found.edges.slice(0, found.drawn);
    const more = pinned === null ? [] : found.edges.slice(found.drawn).filter(touches(pinned));
    return [...strongest, ...more];
  }

  function node(index, degree) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "node", tabIndex: -1, title: found.names[index] });
    const connections = degree === 1 ? "1 connection" : `${degree} connections`;
    button.setAttribute("aria-label", `${found.names[index]}, ${connections}`);
    button.dataset.index = index;
    const name = document.createElement("span");
    name.textContent = found.names[index];
    button.append(name);
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  const buttons = () => Array.from(at("nodes").querySelectorAll("button"));

  // rows for all classes that have a connection
  function build() {
    const shown = edges();
    nodes = [...new Set(shown.flatMap(([, from, to]) => [from, to]))].sort((one, two) => one - two);
    const focused = document.activeElement?.dataset.index;
    at("nodes").replaceChildren(...nodes.map((index) => node(index, shown.filter(touches(index)).length)));
    const first = buttons().find((button) => Number(button.dataset.index) === (pinned ?? nodes[0]));
    if (first) first.tabIndex = 0;
    if (focused !== undefined) buttons().find((button) => button.dataset.index === focused)?.focus();
    draw();
  }

  function draw() {
    const svg = at("arcs");
    const width = Math.max(svg.clientWidth, 60);
    svg.setAttribute("height", ROW * nodes.length);
    const row = new Map(nodes.map((index, position) => [index, ROW * (position + 0.5)]));
    const longest = Math.max(ROW * (nodes.length - 1), 1);
    const arcs = [];
    for (const edge of edges()) {
      const [kind, from, to] = edge;
      if (off.has(kind)) continue;
      const [y0, y1] = [row.get(from), row.get(to)];
      // arcs of different kinds between the same two classes lie side by side
      const reach = Math.min(width - 16, 40 + longest) * (0.1 + 0.9 * Math.sqrt(Math.abs(y1 - y0) / longest)) * (1 - 0.06 * kind);
      const bend = reach / 0.75;
      const arc = shape("g", { class: `arc ${found.kinds[kind][0]}`, "data-from": from, "data-to": to });
      arc.append(shape("path", { d: `M2 ${y0}C${bend} ${y0} ${bend} ${y1} 2 ${y1}` }));
      if (found.kinds[kind][0] === "harms") {
        arc.append(shape("path", { class: "head", d: `M10 ${y1 - 5}L1 ${y1}L10 ${y1 + 5}z` }));
      }
      arcs.push(arc);
    }
    svg.replaceChildren(...arcs);
    light();
  }

  // what belongs to the pointed class, else to the one that is kept
  function light() {
    const active = pointed ?? pinned;
    const near = new Set(edges().filter((edge) => active !== null && touches(active)(edge) && !off.has(edge[0])).map((edge) => other(edge, active)));
    at("graph").classList.toggle("active", active !== null);
    for (const button of buttons()) {
      const index = Number(button.dataset.index);
      button.classList.toggle("near", near.has(index));
      button.classList.toggle("self", index === active);
      button.setAttribute("aria-pressed", String(index === pinned));
    }
    for (const arc of at("arcs").children) {
      const ends = [Number(arc.dataset.from), Number(arc.dataset.to)];
      arc.classList.toggle("near", ends.includes(active));
    }
    tell(active);
  }

  function tell(active) {
    const box = at("told");
    if (box.dataset.of === String(active)) return;
    box.dataset.of = String(active);
    const heading = document.createElement("h3");
    heading.textContent = active === null ? "No class chosen" : found.names[active];
    const list = document.createElement("ul");
    const texts = active === null ? [] : of(active);
    for (const text of texts) list.append(Object.assign(document.createElement("li"), { textContent: text }));
    const none = document.createElement("p");
    none.textContent = active === null ? "What is known of a class's connections stands here." : "No connection was found.";
    box.replaceChildren(heading, texts.length > 0 ? list : none);
  }

  function point(index) {
    pointed = index;
    light();
  }

  // keeps a class; null lets go
  function pin(index) {
    if (!found) return;
    pinned = index;
    build();
  }

  function walk(event) {
    const all = buttons();
    const here = all.indexOf(document.activeElement);
    if (here < 0) return;
    if (event.key === "Escape") pin(null);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = all[Math.min(Math.max(to, 0), all.length - 1)];
    all.forEach((button) => (button.tabIndex = button === next ? 0 : -1));
    next.focus();
  }

  // a switch for each kind, which is the legend, too
  function legend() {
    found.kinds.forEach(([key, name], kind) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
      box.addEventListener("change", () => {
        if (box.checked) off.delete(kind);
        else off.add(kind);
        draw();
      });
      const sample = shape("svg", { width: 34, height: 12, "aria-hidden": "true" });
      const arc = shape("g", { class: `arc ${key}` });
      arc.append(shape("path", { d: "M2 6H32" }));
      if (key === "harms") arc.append(shape("path", { class: "head", d: "M23 1L32 6L23 11z" }));
      sample.append(arc);
      label.append(box, sample, name);
      at("kinds").append(label);
    });
  }

  function start(connections, chosen) {
    if (!connections) return;
    found = connections;
    choose = chosen;
    legend();
    build();
    const index = (event) => event.target.closest("button")?.dataset.index;
    const over = (event) => index(event) !== undefined && point(Number(index(event)));
    at("nodes").addEventListener("pointerover", over);
    at("nodes").addEventListener("focusin", over);
    at("nodes").addEventListener("pointerleave", () => point(null));
    at("nodes").addEventListener("focusout", () => point(null));
    at("nodes").addEventListener("keydown", walk);
    at("nodes").addEventListener("click", (event) => {
      if (index(event) === undefined) return;
      if (pinned === Number(index(event))) pin(null);
      else choose(Number(index(event)));
    });
    let width = 0;
    new ResizeObserver(() => {
      if (at("arcs").clientWidth === width) return;
      width = at("arcs").clientWidth;
      draw();
    }).observe(at("arcs"));
  }

  return { of, pin, start };
})();
