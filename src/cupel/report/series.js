// window.cupel, third part: lines and dots (training curves, severity, ROC, spectra). What they take is told in plots.js.
(() => {
  const cupel = window.cupel, { el, exact } = cupel;
  const FRAME = { style: { background: "none", color: "var(--ink)", fontFamily: "inherit", fontSize: "12px", overflow: "visible" } };
  const finite = (v) => v !== null && v !== undefined && Number.isFinite(v);

  cupel.lines = (node, { panels, x, y, order, legend = true, diagonal = false, title, note }) => {
    const groups = [...new Set(panels.flatMap((p) => p.series.map((s) => s.group)))];
    const points = panels.flatMap((p) => p.series.flatMap((s) => s.points));
    const xs = x.domain || d3.extent(points, (p) => p[0]), ys = y.domain || d3.extent(points.filter((p) => finite(p[1])), (p) => p[1]);
    const draw = (width) => {
      const least = 230, across = Math.max(1, Math.min(panels.length, Math.floor(width / least)));
      const each = Math.min(panels.length === 1 ? 680 : 560, Math.floor((width - 16 * (across - 1)) / across));
      return el("div", { class: "panels" }, panels.map((p) => panel(p, each, { xs, ys, x, y, order, diagonal })));
    };
    const table = () => panels.map((p) => wide(p, x, y, title));
    const figure = cupel.figure({ title, note, draw, table, height: 220, label: title });
    if (legend && groups.length > 1) figure.querySelector(".plot").before(cupel.legend(groups, order));
    cupel.put(node, figure);
  };

  function panel({ name, series }, width, { xs, ys, x, y, order, diagonal }) {
    const rows = series.flatMap((s, z) => s.points.map(([px, py]) => ({ x: px, y: py, z, i: order.indexOf(s.group), told: `${s.group}${s.name ? `, ${s.name}` : ""}\n${x.name} ${exact(px)}: ${exact(py)}` })))
      .filter((r) => finite(r.x) && (!y.log || r.y > 0));
    const height = Math.round(Math.max(170, Math.min(340, width * 0.62)));
    const yticks = y.log ? cupel.logTicks(ys, 6) : height / 45;
    const few = new Set(rows.map((r) => r.x)).size <= 30 && series.length <= 12;
    const chart = Plot.plot({
      ...FRAME, width, height, marginLeft: 48, marginBottom: 36, marginTop: 24, marginRight: 12, color: { type: "identity" }, symbol: { type: "identity" },
      x: { domain: xs, type: x.log ? "log" : "linear", label: x.name, labelArrow: "none", ticks: x.whole ? d3.ticks(xs[0], xs[1], Math.min(8, width / 50)).filter(Number.isInteger) : width / 70, tickFormat: x.whole ? "d" : undefined },
      y: { domain: ys, type: y.log ? "log" : "linear", label: y.name, labelArrow: "none", tickFormat: y.log ? "~g" : undefined, ticks: yticks, nice: !y.log && !y.domain },
      marks: [
        Plot.gridY({ stroke: "var(--line)", strokeOpacity: 1, ticks: yticks }),
        diagonal ? Plot.line([[xs[0], xs[0]], [xs[1], xs[1]]], { stroke: "var(--soft)", strokeDasharray: "3 3" }) : null,
        Plot.line(rows, { x: "x", y: "y", z: "z", stroke: (d) => cupel.colour(d.i), strokeWidth: 1.5 }),
        few ? Plot.dot(rows.filter((r) => finite(r.y)), { x: "x", y: "y", r: 2.6, symbol: (d) => cupel.symbol(d.i), fill: (d) => cupel.colour(d.i) }) : null,
        Plot.tip(rows, Plot.pointer({ x: "x", y: "y", title: "told", fill: "var(--panel)", stroke: "var(--line)" })),
      ],
    });
    chart.setAttribute("role", "img");
    chart.setAttribute("aria-label", `${name || "lines"}: ${y.name} over ${x.name}; the same numbers are in the table below`);
    return el("div", { class: "panel" }, name ? el("p", { class: "panel-name" }, name) : null, chart);
  }

  /** One table a panel: a row for each x, a column for each line. */
  function wide({ name, series }, x, y, title) {
    const at = [...new Set(series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
    const maps = series.map((s) => new Map(s.points));
    return cupel.table({
      caption: [title, name, y.name].filter(Boolean).join(": "), head: [x.name, ...series.map((s) => [s.group, s.name].filter(Boolean).join(", "))],
      rows: at.map((v) => [v, ...maps.map((m) => m.get(v) ?? null)]),
    });
  }

  cupel.dots = (node, { labels, series, value, order, title, note, legend = true }) => {
    const rows = series.flatMap((s) => s.values.map((v, k) => ({ label: labels[k], value: v, i: order.indexOf(s.group) }))).filter((r) => finite(r.value));
    const draw = (width) => {
      const left = Math.min(width * 0.4, 20 + 7 * Math.min(24, d3.max(labels, (l) => String(l).length) || 1));
      return Plot.plot({
        ...FRAME, width: Math.min(width, 640), height: 54 + 24 * labels.length, marginLeft: left, marginRight: 20, marginBottom: 36, marginTop: 6, color: { type: "identity" }, symbol: { type: "identity" },
        x: { label: value.name, labelArrow: "none", type: value.log ? "log" : "linear", nice: true, zero: !value.log },
        y: { domain: labels, label: null },
        marks: [
          Plot.gridX({ stroke: "var(--line)", strokeOpacity: 1 }), Plot.ruleY(labels, { y: (d) => d, stroke: "var(--line)" }),
          Plot.axisY({ lineWidth: (left - 14) / 12, textOverflow: "ellipsis", tickSize: 0, label: null }),
          Plot.dot(rows, { x: "value", y: "label", r: 5, fill: (d) => cupel.colour(d.i), symbol: (d) => cupel.symbol(d.i), fillOpacity: 0.85 }),
        ],
      });
    };
    const table = () => cupel.table({ caption: title || value.name, head: ["", ...series.map((s) => s.group)], rows: labels.map((l, k) => [l, ...series.map((s) => s.values[k])]) });
    const figure = cupel.figure({ title, note, draw, table, height: 54 + 24 * labels.length });
    if (legend && series.length > 1) figure.querySelector(".plot").before(cupel.legend(series.map((s) => s.group), order));
    cupel.put(node, figure);
  };
})();
