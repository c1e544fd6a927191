// window.cupel, fourth part: confusion tables, reliability diagrams, pictures, heat maps, records with bars.
// Each function takes one variant's content as report/kinds.py made it and returns an element; `name` is the variant.
//
//   cupel.confusion({counts, classes}, name)            a table: truth down, answer across
//   cupel.reliability({edges, count, confidence, accuracy}, name, i)
//   cupel.images({items: [{words, pictures: [{name, width, height, channels, signed, low, high, bytes} | {name, lines}]}]}, name)
//   cupel.heat({values, value}, name)
//   cupel.records({columns, rows}, name, most)          numbers as bars; `most`: the largest of each column over variants
(() => {
  const cupel = window.cupel, { el, exact } = cupel;
  const FRAME = { style: { background: "none", color: "var(--ink)", fontFamily: "inherit", fontSize: "12px", overflow: "visible" } };
  const TABLE = 24; // classes that a table still shows
  const tint = (share, kind) => (share > 0 ? `background: rgb(var(--${kind}) / ${((kind === "wrong" ? 0.25 : 0.15) + 0.35 * Math.min(1, share)).toFixed(2)})` : null);

  cupel.confusion = ({ counts, classes }, name) => {
    const totals = counts.map((row) => d3.sum(row)), right = d3.sum(counts.map((row, i) => row[i])), all = d3.sum(totals);
    const caption = `${name}: ${right} of ${all} right`;
    if (counts.length > TABLE) return el("div", { class: "panel" }, el("p", { class: "panel-name" }, caption), heatmap(counts, `confusion of ${name}`), worst({ counts, classes }, name, totals));
    const cells = (row, i) => row.map((n, j) => el("td", { class: n ? null : "nothing", style: tint(n / (totals[i] || 1), i === j ? "heat" : "wrong") }, exact(n)));
    return el("div", { class: "panel wide", tabindex: "0", role: "region", "aria-label": `Confusion of ${name}` }, el("table", { class: classes.some((c) => c.length > 3) ? "confusion turned" : "confusion" },
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "truth"), classes.map((c) => el("th", { scope: "col", title: c }, el("span", {}, c))))),
      el("tbody", {}, counts.map((row, i) => el("tr", {}, el("th", { scope: "row", title: classes[i] }, classes[i]), cells(row, i))))));
  };

  function worst({ counts, classes }, name, totals) {
    const pairs = counts.flatMap((row, i) => row.map((n, j) => [i, j, n])).filter(([i, j, n]) => i !== j && n > 0).sort((a, b) => b[2] - a[2]).slice(0, 12);
    if (!pairs.length) return el("p", { class: "note" }, "No class is taken for another.");
    return cupel.table({ caption: `Most confused by ${name}`, head: ["truth", "answer", "how often", "of"], rows: pairs.map(([i, j, n]) => [classes[i], classes[j], n, totals[i]]) });
  }

  cupel.reliability = ({ edges, count, confidence, accuracy }, name, i) => {
    const bins = count.map((n, k) => ({ low: edges[k], high: edges[k + 1], n, accuracy: accuracy[k], confidence: confidence[k] })).filter((b) => b.n);
    const low = Math.floor(Math.min(...bins.map((b) => b.low), 0.9) * 10) / 10;
    const draw = (width) => {
      const across = { domain: [low, 1], label: "confidence", labelArrow: "none", ticks: 5 }, size = Math.min(360, width);
      const top = Plot.plot({
        ...FRAME, width: size, height: Math.round(size * 0.72), marginLeft: 44, marginRight: 12, marginTop: 22, marginBottom: 34, x: across,
        y: { domain: [0, 1], label: "share right", labelArrow: "none", ticks: 5 },
        marks: [
          Plot.gridY({ stroke: "var(--line)", strokeOpacity: 1, ticks: 5 }),
          Plot.rect(bins, { x1: "low", x2: "high", y1: 0, y2: "accuracy", fill: cupel.colour(i), fillOpacity: 0.35, stroke: cupel.colour(i), insetLeft: 0.5, insetRight: 0.5 }),
          Plot.line([[low, low], [1, 1]], { stroke: "var(--ink)", strokeDasharray: "3 3" }),
          Plot.dot(bins, { x: "confidence", y: "accuracy", r: 3.5, fill: "var(--ink)", stroke: "var(--ground)" }),
        ],
      });
      const below = Plot.plot({
        ...FRAME, width: size, height: 74, marginLeft: 44, marginRight: 12, marginTop: 20, marginBottom: 6, x: { ...across, axis: null },
        y: { label: "inputs", labelArrow: "none", ticks: 2 }, marks: [Plot.rect(bins, { x1: "low", x2: "high", y1: 0, y2: "n", fill: "var(--soft)", insetLeft: 0.5, insetRight: 0.5 }), Plot.ruleY([0], { stroke: "var(--soft)" })],
      });
      below.setAttribute("role", "img");
      below.setAttribute("aria-label", `${name}: inputs in each bin of confidence; the same numbers are in the table below`);
      return el("div", {}, top, below);
    };
    const table = () => cupel.table({ caption: `Reliability of ${name}`, head: ["confidence from", "to", "inputs", "mean confidence", "share right"], rows: bins.map((b) => [b.low, b.high, b.n, b.confidence, b.accuracy]) });
    return el("div", { class: "panel" }, cupel.figure({ title: name, label: `Reliability diagram of ${name}`, draw, table, height: 330 }));
  };

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const signed = (t) => d3.rgb(d3.interpolateRdBu(0.5 - t / 2)); // red above zero, blue below
  const even = (t) => d3.rgb(d3.interpolateCividis(t));

  function canvas(width, height, pixel, words, wanted = 72) {
    const node = el("canvas", { width, height, role: "img", "aria-label": words });
    const scale = Math.max(1, Math.round(wanted / Math.max(width, height)));
    node.style.width = `${width * scale}px`;
    const context = node.getContext("2d"), image = context.createImageData(width, height);
    for (let k = 0; k < width * height; k++) { const { r, g, b } = pixel(k); image.data.set([r, g, b, 255], 4 * k); }
    context.putImageData(image, 0, 0);
    return node;
  }

  function picture(p, words) {
    if (p.lines) return lines(p, words);
    const raw = bytes(p.bytes), c = p.channels;
    const pixel = p.signed ? (k) => signed((raw[k * c] - 127.5) / 127.5) : c === 3 ? (k) => ({ r: raw[3 * k], g: raw[3 * k + 1], b: raw[3 * k + 2] }) : (k) => ({ r: raw[k], g: raw[k], b: raw[k] });
    return canvas(p.width, p.height, pixel, `${p.name}: ${words || "picture"}`);
  }

  function change(before, after, words) {
    const a = bytes(before.bytes), b = bytes(after.bytes), c = before.channels;
    const gap = Array.from({ length: before.width * before.height }, (_, k) => d3.mean(d3.range(c), (j) => b[k * c + j] - a[k * c + j]));
    const most = d3.max(gap, Math.abs) || 1, scale = (before.high - before.low) / 255;
    return { node: canvas(before.width, before.height, (k) => signed(gap[k] / most), `change, at most ${exact(+(most * scale).toPrecision(2))}: ${words}`), words: `change, at most ${exact(+(most * scale).toPrecision(2))}` };
  }

  function lines({ lines: rows, name }, words) {
    const points = rows.flatMap((row, z) => row.map((y, x) => ({ x, y, z })));
    const svg = Plot.plot({ ...FRAME, width: 220, height: 84, margin: 4, marginLeft: 44, marginBottom: 18, x: { label: null, ticks: 4 }, y: { label: null, ticks: 3 },
      marks: [Plot.line(points, { x: "x", y: "y", z: "z", stroke: (d) => cupel.colour(d.z), strokeWidth: 1.2 })], color: { type: "identity" } });
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${name}: ${words}`);
    return svg;
  }

  const shown = (node, words) => el("figure", { class: "picture" }, node, el("figcaption", {}, words));

  cupel.images = ({ items }, name) => {
    const one = ({ words, pictures }) => {
      const made = pictures.map((p) => shown(picture(p, words), p.name));
      const [a, b] = pictures;
      if (pictures.length === 2 && a.bytes && b.bytes && !a.signed && !b.signed && a.width === b.width && a.height === b.height && a.channels === b.channels) {
        const gap = change(a, b, words);
        made.push(shown(gap.node, gap.words));
      }
      return el("li", {}, el("div", { class: "strip" }, made), words ? el("p", { class: "said" }, words) : null);
    };
    const box = el("div");
    cupel.lazily(box, () => el("ul", { class: "gallery" }, items.map(one)), 130);
    return el("div", { class: "panel broad" }, el("p", { class: "panel-name" }, name), box);
  };

  function heatmap(values, words) {
    const height = values.length, width = d3.max(values, (r) => r.length), [low, high] = d3.extent(values.flat().filter((v) => v !== null));
    const both = low < 0, most = Math.max(Math.abs(low), Math.abs(high)) || 1;
    const pixel = (k) => { const v = values[Math.floor(k / width)][k % width] ?? 0; return both ? signed(v / most) : even((v - low) / (high - low || 1)); };
    const stops = d3.range(0, 1.01, 0.1).map((t) => (both ? signed(2 * t - 1) : even(t)).formatRgb());
    return el("div", {}, canvas(width, height, pixel, `${words}, ${height} rows and ${width} columns; the same numbers are in the table below`, 320),
      el("p", { class: "scale" }, exact(both ? -most : low), el("span", { style: `background: linear-gradient(to right, ${stops})`, "aria-hidden": "true" }), exact(both ? most : high)));
  }

  cupel.heat = ({ values, value }, name) => {
    const table = () => cupel.table({ caption: `${value} of ${name}`, head: ["row", ...values[0].map((_, j) => j + 1)], rows: values.map((row, i) => [i + 1, ...row]) });
    return el("div", { class: "panel" }, cupel.figure({ title: name, label: `${value} of ${name}`, draw: () => heatmap(values, `${value} of ${name}`), table, height: 200 }));
  };

  cupel.records = ({ columns, rows }, name, most) => {
    const bar = (v, k) => {
      const text = typeof v === "string" && v.includes("\n") ? el("pre", {}, v) : typeof v === "number" && !Number.isInteger(v) ? String(+v.toPrecision(4)) : exact(v);
      return most[k] > 0 && typeof v === "number" ? el("span", { class: "bar", style: `--part: ${((100 * Math.max(0, v)) / most[k]).toFixed(1)}%` }, text) : text;
    };
    const long = (v) => typeof v === "string" && v.length > 40 && !v.includes("\n");
    const cell = (v, k) => (long(v) ? el("span", { class: "sentence", dir: "auto" }, v) : k ? bar(v, k) : v);
    const cells = (row) => row.map(cell).map((c, k) => (c instanceof Node || !k ? c : document.createTextNode(c)));
    return el("div", { class: "panel broad" }, cupel.table({ caption: name, head: columns, rows: rows.map(cells), kind: "records" }));
  };

  /** The largest number of each column over all variants; 1 for shares; 0 where a column holds words. */
  cupel.mostOf = (contents) => (contents[0]?.columns || []).map((_, k) => {
    const values = contents.flatMap((c) => c.rows.map((row) => row[k])).filter((v) => v !== null && v !== undefined);
    if (!values.length || values.some((v) => typeof v !== "number" || v < 0)) return 0;
    const top = d3.max(values);
    return top <= 1 && values.some((v) => !Number.isInteger(v)) ? 1 : top;
  });
})();
