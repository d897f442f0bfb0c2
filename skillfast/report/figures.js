(() => {
  "use strict";
  const { figures } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const options = { responsive: true, displayModeBar: false, displaylogo: false };

  // figures name their colours by CSS variable, so both colour schemes share one description
  function themed(value) {
    if (typeof value === "string") {
      return value.startsWith("var(") ? getComputedStyle(root).getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item)]));
  }

  async function draw() {
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = themed(figure);
      await Plotly.newPlot(id, { data, layout, config: options });
    }
    root.dataset.ready = "true";
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
