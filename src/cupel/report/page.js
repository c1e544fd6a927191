(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const svg = document.getElementById("pareto"), NS = "http://www.w3.org/2000/svg";
  const pick = { x: document.getElementById("x"), y: document.getElementById("y") };
  const box = { left: 70, right: 700, top: 15, bottom: 345 };
  const find = (...words) => Math.max(0, ...words.map(w => data.rows.findIndex(r => r.reading === w)).filter(i => i >= 0).slice(0, 1));

  for (const axis of ["x", "y"]) {
    data.rows.forEach((row, i) => pick[axis].add(new Option(`${row.probe}: ${row.reading}`, i)));
    pick[axis].addEventListener("change", draw);
  }
  pick.x.value = find("size bytes", "operations");
  pick.y.value = find("robust accuracy", "accuracy");

  function add(kind, attributes, text) {
    const node = document.createElementNS(NS, kind);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
    return node;
  }

  function scale(row, from, to) {
    const seen = Object.values(row.cells).flatMap(c => c.slice(0, 3)).filter(v => v !== null);
    let low = Math.min(...seen), high = Math.max(...seen);
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    low -= pad; high += pad;
    return { at: v => from + (to - from) * (v - low) / (high - low), ticks: [0, 1, 2, 3, 4].map(i => low + (high - low) * i / 4) };
  }

  const short = (v, unit) => unit === "share" ? v.toFixed(2) : Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(v);

  function draw() {
    svg.replaceChildren();
    const rx = data.rows[pick.x.value], ry = data.rows[pick.y.value];
    if (!rx || !ry) return;
    const sx = scale(rx, box.left, box.right), sy = scale(ry, box.bottom, box.top);
    for (const t of sx.ticks) {
      add("line", { x1: sx.at(t), x2: sx.at(t), y1: box.top, y2: box.bottom, class: "axis" });
      add("text", { x: sx.at(t), y: box.bottom + 16, "text-anchor": "middle", class: "tick" }, short(t, rx.unit));
    }
    for (const t of sy.ticks) {
      add("line", { x1: box.left, x2: box.right, y1: sy.at(t), y2: sy.at(t), class: "axis" });
      add("text", { x: box.left - 8, y: sy.at(t) + 4, "text-anchor": "end", class: "tick" }, short(t, ry.unit));
    }
    add("text", { x: (box.left + box.right) / 2, y: 388, "text-anchor": "middle" }, `${rx.probe}: ${rx.reading} (${rx.unit})`);
    add("text", { x: 14, y: 180, "text-anchor": "middle", transform: "rotate(-90 14 180)" }, `${ry.probe}: ${ry.reading} (${ry.unit})`);
    const placed = [];
    for (const name of data.variants) {
      const cx = rx.cells[name], cy = ry.cells[name];
      if (!cx || !cy || cx[0] === null || cy[0] === null) continue;
      const x = sx.at(cx[0]), y = sy.at(cy[0]);
      add("line", { x1: sx.at(cx[1] ?? cx[0]), x2: sx.at(cx[2] ?? cx[0]), y1: y, y2: y, class: "range" });
      add("line", { x1: x, x2: x, y1: sy.at(cy[1] ?? cy[0]), y2: sy.at(cy[2] ?? cy[0]), class: "range" });
      const dot = add("circle", { cx: x, cy: y, r: 5 });
      dot.append(document.createElementNS(NS, "title"));
      dot.firstChild.textContent = `${name}: ${cx[3]}, ${cy[3]}`;
      let ty = y - 10;
      while (placed.some(p => Math.abs(p[0] - x) < 90 && Math.abs(p[1] - ty) < 14)) ty += 15;
      placed.push([x, ty]);
      const end = x > box.right - 90;
      add("text", { x: x + (end ? -9 : 9), y: ty, "text-anchor": end ? "end" : "start" }, name);
    }
  }
  draw();
})();
