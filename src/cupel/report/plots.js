// window.cupel, second part: plots of readings and of series, drawn with Observable Plot. Each call replaces what is in
// `node` (any element in the document), draws when it nears the screen, and adds the numbers as a table below.
// `order` is always the list of all variants: it fixes each one's colour and symbol across plots. Intervals may be null.
//
//   cupel.pareto(node, {x, y, points, order, baseline, xlog, ylog})   one reading against another, with intervals and front
//       x, y:     {name: "accuracy", unit: "share", better: "higher" | "lower" | "none"}
//       points:   [{name: "lean", x: [value, low, high], y: [value, low, high]}, ...]
//   cupel.front(points, xbetter, ybetter)      names on the Pareto front; null where a reading has no better direction
//   cupel.intervals(node, {reading, points, order, baseline, log})    one reading over all variants
//       reading:  {name, unit, better};  points: [{name, cell: [value, low, high, ...one per seed]}], seeds: [0, 1, 2]
//   cupel.lines(node, {panels, x, y, order, legend, diagonal, title, note})   lines in panels that share their axes
//       panels:   [{name: "fit", series: [{group: "lean", name: "seed 0", points: [[x, y], ...]}]}]
//       x, y:     {name, log, domain}
//   cupel.dots(node, {labels, series, value, order, title, note})     a row for each label, a dot for each variant
//       series:   [{group: "lean", values: [.., one per label]}];  value: {name, log}
//   cupel.canLog(values)                       whether a log axis can hold them all;  cupel.wantsLog(values, unit): and should
(() => {
  const cupel = window.cupel, { el, exact } = cupel;
  const MOST = 40; // variants that a plot of one reading still shows
  const FRAME = { style: { background: "none", color: "var(--ink)", fontFamily: "inherit", fontSize: "12px", overflow: "visible" } };
  const finite = (v) => v !== null && v !== undefined && Number.isFinite(v);
  const titled = (axis) => axis.name + (axis.unit && !["share", "1"].includes(axis.unit) && !axis.name.includes("(") ? ` (${axis.unit})` : "");
  const arrow = (axis) => ({ higher: " — higher is better", lower: " — lower is better" })[axis.better] || "";

  cupel.canLog = (values) => values.filter(finite).length > 0 && values.filter(finite).every((v) => v > 0);
  cupel.wantsLog = (values, unit) => cupel.canLog(values) && unit !== "share" && d3.max(values) / d3.min(values) > 20;

  /** A domain with a margin; a log one never reaches zero, so an interval that does is cut at its edge. */
  function domain(values, log, unit) {
    const all = values.filter((v) => finite(v) && (!log || v > 0));
    let [low, high] = d3.extent(all);
    if (low === undefined) return [0, 1];
    if (log) return low === high ? [low / 2, high * 2] : [low / (high / low) ** 0.06, high * (high / low) ** 0.06];
    const pad = (high - low || Math.abs(high) || 1) * 0.06;
    return unit === "share" ? [Math.max(low - pad, Math.min(low, -0.01)), Math.min(high + pad, Math.max(high, 1.01))] : [low - pad, high + pad];
  }
  /** Ticks of a log axis: 1, 2 and 5 of each power of ten, or the powers alone where that is too much. */
  cupel.logTicks = ([low, high], most = 8) => {
    const powers = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1);
    const sets = [[1, 2, 5], [1, 3], [1]].map((m) => powers.flatMap((p) => m.map((k) => k * 10 ** p)).filter((v) => v >= low && v <= high));
    const last = sets.at(-1), found = sets.find((s) => s.length <= most) || last.filter((_, i) => i % Math.ceil(last.length / most) === 0);
    return found.length > 1 ? found : d3.ticks(low, high, 4);
  };
  const axisOf = (axis, domain_, log, count) => ({ label: titled(axis) + arrow(axis), labelArrow: "none", ticks: log ? cupel.logTicks(domain_, count) : count, tickFormat: log || domain_[1] >= 1e4 ? "~s" : undefined });
  const clip = (v, [low, high]) => Math.min(high, Math.max(low, v));

  cupel.front = (points, xbetter, ybetter) => {
    if (![xbetter, ybetter].every((b) => b === "higher" || b === "lower")) return null;
    const sign = (better) => (better === "higher" ? 1 : -1);
    const at = points.map((p) => [sign(xbetter) * p.x[0], sign(ybetter) * p.y[0], p.name]);
    at.sort((a, b) => b[0] - a[0] || b[1] - a[1]);
    const names = [];
    let best = -Infinity, last = null;
    for (const [x, y, name] of at) {
      if (y > best || (y === best && last === x)) { names.push(name); last = x; }
      best = Math.max(best, y);
    }
    return names;
  };

  cupel.pareto = (node, { x, y, points, order, baseline, xlog, ylog }) => {
    const there = points.filter((p) => finite(p.x[0]) && finite(p.y[0]));
    const front = cupel.front(there, x.better, y.better);
    const title = `${y.name} against ${x.name}`;
    const note = !there.length ? "No variant has both readings."
      : !front ? "No Pareto front: one of the two readings has no better direction."
      : `Filled marks are on the Pareto front (no other variant is better in one and at least as good in the other): ${front.join(", ")}.`;
    const head = ["variant", titled(x), "95% from", "to", titled(y), "95% from", "to", "on the front"];
    const table = () => cupel.table({ caption: title, head, rows: there.map((p) => [p.name, ...p.x.slice(0, 3), ...p.y.slice(0, 3), front ? (front.includes(p.name) ? "yes" : "no") : "-"]) });
    cupel.put(node, cupel.figure({ title: null, label: title, note, table, height: 420,
      draw: (width) => scatter(width, { x, y, there, front, order, baseline, xlog, ylog }) }));
  };

  function scatter(width, { x, y, there, front, order, baseline, xlog, ylog }) {
    const height = Math.round(Math.max(300, Math.min(480, width * 0.6)));
    const xs = domain(there.flatMap((p) => p.x.slice(0, 3)), xlog, x.unit), ys = domain(there.flatMap((p) => p.y.slice(0, 3)), ylog, y.unit);
    const across = axisOf(x, xs, xlog, width / 90), up = axisOf(y, ys, ylog, height / 50);
    const rows = there.map((p) => ({
      name: p.name, i: order.indexOf(p.name), x: p.x[0], y: p.y[0], on: front ? front.includes(p.name) : true,
      x1: clip(p.x[1] ?? p.x[0], xs), x2: clip(p.x[2] ?? p.x[0], xs), y1: clip(p.y[1] ?? p.y[0], ys), y2: clip(p.y[2] ?? p.y[0], ys),
      told: `${p.name}\n${x.name} ${exact(p.x[0])}\n${y.name} ${exact(p.y[0])}`,
    }));
    const many = rows.length > 40, on = rows.filter((r) => r.on).sort((a, b) => a.x - b.x || a.y - b.y);
    const style = { stroke: (d) => cupel.colour(d.i), strokeOpacity: many ? 0.25 : 0.6, strokeWidth: many ? 1 : 1.5 };
    const curve = x.better === "higher" ? "step-before" : "step-after";
    const chart = Plot.plot({
      ...FRAME, width, height, marginLeft: 52, marginBottom: 44, marginRight: 24, marginTop: 28,
      x: { domain: xs, type: xlog ? "log" : "linear" }, y: { domain: ys, type: ylog ? "log" : "linear" },
      color: { type: "identity" }, symbol: { type: "identity" },
      marks: [
        Plot.gridX({ stroke: "var(--line)", strokeOpacity: 1, ticks: across.ticks }), Plot.gridY({ stroke: "var(--line)", strokeOpacity: 1, ticks: up.ticks }),
        Plot.axisX(across), Plot.axisY(up),
        front && on.length > 1 ? Plot.line(on, { x: "x", y: "y", curve, stroke: "var(--soft)", strokeDasharray: "4 3" }) : null,
        Plot.ruleY(rows, { ...style, y: "y", x1: "x1", x2: "x2" }),
        Plot.ruleX(rows, { ...style, x: "x", y1: "y1", y2: "y2" }),
        Plot.dot(rows, { x: "x", y: "y", r: many ? 4 : 6, symbol: (d) => cupel.symbol(d.i), stroke: (d) => cupel.colour(d.i), fill: (d) => (d.on ? cupel.colour(d.i) : "var(--ground)"), strokeWidth: 1.5 }),
        Plot.tip(rows, Plot.pointer({ x: "x", y: "y", title: "told", fill: "var(--panel)", stroke: "var(--line)" })),
      ],
    });
    const shown = many ? rows.filter((r) => (front && r.on) || r.name === baseline) : rows;
    name(chart, shown, rows, width, height);
    return chart;
  }

  /** Write names beside their dots where there is room: right, left, above, below; a name without room is left to the tip. */
  function name(chart, shown, rows, width, height) {
    const sx = chart.scale("x").apply, sy = chart.scale("y").apply, layer = d3.select(chart).append("g").attr("class", "names").attr("aria-hidden", "true");
    const taken = rows.slice(0, 200).map((r) => [sx(r.x) - 6, sy(r.y) - 6, sx(r.x) + 6, sy(r.y) + 6]);
    const free = (box) => box[0] > 54 && box[2] < width - 2 && box[1] > 2 && box[3] < height - 30 && !taken.some((t) => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1]);
    for (const r of shown) {
      const w = 6.6 * r.name.length + 4, px = sx(r.x), py = sy(r.y);
      const tries = [[9, -9], [-9 - w, -9], [9, 9], [-9 - w, 9], [-w / 2, -17], [-w / 2, 17], [9, -22], [-9 - w, -22], [9, 22], [-9 - w, 22]];
      const found = tries.map(([dx, dy]) => [px + dx, py + dy - 7, px + dx + w, py + dy + 7]).find(free);
      if (!found) continue;
      taken.push(found);
      layer.append("text").attr("x", found[0] + 2).attr("y", found[3] - 3).attr("fill", "var(--ink)").attr("text-anchor", "start").attr("class", "halo").text(r.name);
    }
  }

  cupel.intervals = (node, { reading, points, order, baseline, seeds, log }) => {
    const every = points.filter((p) => finite(p.cell[0])), sign = reading.better === "lower" ? 1 : -1;
    const sorted = every.length > 12 ? d3.sort(every, (p) => sign * p.cell[0]) : every;
    const there = sorted.filter((p, i) => i < MOST || p.name === baseline);
    const base = there.find((p) => p.name === baseline);
    const values = there.flatMap((p) => p.cell.filter(finite));
    const rows = there.map((p) => ({ name: p.name, i: order.indexOf(p.name), value: p.cell[0], low: p.cell[1] ?? p.cell[0], high: p.cell[2] ?? p.cell[0] }));
    const each = there.flatMap((p) => p.cell.slice(3).filter(finite).map((v) => ({ name: p.name, i: order.indexOf(p.name), value: v })));
    const longest = Math.min(22, d3.max(rows, (r) => r.name.length) || 4);
    const draw = (width) => {
      const xs = domain(values, log, reading.unit), across = axisOf(reading, xs, log, width / 100);
      const left = Math.min(width * 0.38, 16 + 7 * longest);
      return Plot.plot({
        ...FRAME, width, marginLeft: left, marginRight: 20, marginTop: 8, marginBottom: 40, height: 56 + 26 * Math.max(1, rows.length),
        x: { domain: xs, type: log ? "log" : "linear" },
        y: { domain: rows.map((r) => r.name), label: null, tickSize: 0 }, color: { type: "identity" }, symbol: { type: "identity" },
        marks: [
          Plot.gridX({ stroke: "var(--line)", strokeOpacity: 1, ticks: across.ticks }), Plot.axisX(across),
          Plot.axisY({ lineWidth: (left - 14) / 12, textOverflow: "ellipsis", tickSize: 0, label: null }),
          base ? Plot.ruleX([base.cell[0]], { stroke: "var(--soft)", strokeDasharray: "4 3" }) : null,
          Plot.ruleY(rows, { y: "name", x1: (d) => clip(d.low, xs), x2: (d) => clip(d.high, xs), stroke: (d) => cupel.colour(d.i), strokeWidth: 2.5 }),
          Plot.tickX(each, { x: "value", y: "name", stroke: (d) => cupel.colour(d.i), strokeWidth: 1, insetTop: 5, insetBottom: 5 }),
          Plot.dot(rows, { x: "value", y: "name", r: 5, fill: (d) => cupel.colour(d.i), symbol: (d) => cupel.symbol(d.i) }),
        ],
      });
    };
    const head = ["variant", titled(reading), "95% from", "to", ...(seeds || []).map((s) => `seed ${s}`)];
    const table = () => cupel.table({ caption: `${reading.name}, every variant`, head, rows: sorted.map((p) => [p.name, ...head.slice(1).map((_, i) => p.cell[i])]) });
    const note = "Dot: mean over seeds. Bar: 95% interval. Thin ticks: single seeds." + (base ? ` Dashed: ${baseline}.` : "") + (sorted.length > there.length ? ` Drawn: the first ${MOST} of ${sorted.length}${reading.better === "none" ? ", largest first" : ", best first"}; the table below holds all.` : "");
    cupel.put(node, cupel.figure({ label: `${reading.name} of every variant`, draw, table, note, height: 56 + 26 * rows.length }));
  };
})();
