// window.cupel, fifth part: a graph in columns on a canvas, to drag, pan, zoom, and walk through by keyboard.
//
//   cupel.graph({columns, nodes, edges, look, label, tell, choose}, width) -> {node, at, draw, select, zoom, fit}
//       columns: [name]    nodes: [{column, group}], in the order they stand in a column    edges: [[from, to]]
//       look(): {nodes: [{hidden, dim, size, ring, mark}], edges: [{kind, width}]}: what a node and an edge look like now;
//               size and ring are radii of the mark and of the outline around it; kind is 0 (not drawn) or 1 to 4
//       tell(i or -1, x, y), choose(i or -1): the pointer or the keyboard is at node i; node i was clicked or entered
// What does not move is a picture, kept behind; a drag paints one node and its edges over it, moving the ground moves it.
// A new picture is painted aside, some edges a frame, and put in place when it is whole: no frame waits for it.
(() => {
  const cupel = window.cupel, { el } = cupel;
  const SLICE = 150; // edges that one frame has time for
  const ROWS = [20, 34], LEAST_HIGH = 440, GAP = 12, TOP = 46, SIDE = 34, LEAST = 46, LABEL = 11;
  const GROUPS = ["--c1", "--c7", "--c2", "--c4"]; // as `groups` in report/paths.py
  const KINDS = ["", "--edge", "--c1", "--c4", "--ink"];
  const live = new Set(); // graphs on the page, drawn anew when the theme changes or paper is asked for
  const again = () => { for (const g of live) if (g.node.isConnected) g.draw(); else live.delete(g); };
  new MutationObserver(again).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", again);

  /** A mark: circle for what both share, square and diamond for one class, triangle for the attack alone. */
  cupel.mark = (c, group, x, y, r) => {
    if (group === 1) { c.moveTo(x + r, y); c.arc(x, y, r, 0, 7); return; }
    const s = r * [0.886, 1, 1.253, 1.4][group]; // equal areas
    const points = group === 0 ? [[-s, -s], [s, -s], [s, s], [-s, s]] : group === 2 ? [[0, -s], [s, 0], [0, s], [-s, 0]] : [[0, -s], [s * 0.92, s * 0.7], [-s * 0.92, s * 0.7]];
    points.forEach(([dx, dy], i) => (i ? c.lineTo(x + dx, y + dy) : c.moveTo(x + dx, y + dy)));
    c.closePath();
  };
  cupel.markColour = (group) => `var(${GROUPS[group]})`;

  function placed(columns, nodes, width) {
    const held = columns.map((_, c) => { const own = nodes.filter((n) => n.column === c); return [own.length, GAP * Math.max(0, new Set(own.map((n) => n.group)).size - 1)]; });
    const row = Math.max(ROWS[0], Math.min(ROWS[1], ...held.map(([many, gaps]) => (LEAST_HIGH - TOP - 24 - gaps) / (many || 1))));
    const tall = held.map(([many, gaps]) => many * row + gaps), height = Math.round(Math.max(LEAST_HIGH, Math.max(...tall) + TOP + 24)), step = Math.max(LEAST, (width - 2 * SIDE) / Math.max(1, columns.length - 1));
    const xs = nodes.map((n) => SIDE + n.column * step), ys = new Array(nodes.length);
    columns.forEach((_, c) => {
      let y = TOP + (height - TOP - 12 - tall[c]) / 2 + row / 2, last = null;
      nodes.forEach((n, i) => {
        if (n.column !== c) return;
        if (last !== null && n.group !== last) y += GAP;
        last = n.group;
        ys[i] = y;
        y += row;
      });
    });
    return { xs, ys, step, height, wide: 2 * SIDE + step * (columns.length - 1) };
  }

  cupel.graph = ({ columns, nodes, edges, look, label, tell, choose, kept }, width) => {
    const { xs, ys, step, height, wide } = placed(columns, nodes, width), ratio = Math.max(1, Math.min(2, window.devicePixelRatio || 1));
    for (const [i, [x, y]] of kept) { xs[i] = x * wide; ys[i] = y; } // where the reader put them, also after a change of width
    const touching = nodes.map(() => []);
    edges.forEach(([a, b], e) => { touching[a].push(e); touching[b].push(e); });
    const canvas = el("canvas", { class: "graph", width: Math.round(width * ratio), height: Math.round(height * ratio), tabindex: "0", role: "application", "aria-roledescription": "graph", "aria-label": label });
    canvas.style.width = `${width}px`;
    const [front, back] = [0, 1].map(() => el("canvas", { width: canvas.width, height: canvas.height })), screen = canvas.getContext("2d");
    let view = null, now = look(), colours = {}, pointed = -1, chosen = -1, held = null, asked = 0, stale = true;
    let picture = { paper: front, view: null }, job = null, spare = back;

    const fit = () => { const k = Math.max(0.6, Math.min(1, width / wide)); view = { k, x: Math.min(0, width - wide * k), y: (height - height * k) / 2 }; redraw(); };
    const sx = (i) => xs[i] * view.k + view.x, sy = (i) => ys[i] * view.k + view.y, scale = () => Math.sqrt(view.k);
    function read() {
      const css = getComputedStyle(canvas.isConnected ? canvas : document.documentElement);
      for (const name of ["--ink", "--soft", "--ground", "--line", "--edge", ...GROUPS, ...KINDS.slice(1)]) colours[name] = css.getPropertyValue(name).trim();
    }

    function paths(c, list, alpha) {
      for (const e of list) { // each on its own: one long path of many curves takes several times as long
        const { kind, width: w } = now.edges[e], [a, b] = edges[e], x1 = sx(a), x2 = sx(b), bend = (x2 - x1) / 2;
        if (!kind) continue;
        c.globalAlpha = (kind === 1 ? 0.35 : 0.7) * alpha;
        c.strokeStyle = colours[KINDS[kind]];
        c.lineWidth = w * Math.min(1.5, scale());
        c.beginPath();
        c.moveTo(x1, sy(a));
        c.bezierCurveTo(x1 + bend, sy(a), x2 - bend, sy(b), x2, sy(b));
        c.stroke();
      }
      c.globalAlpha = 1;
    }

    function marks(c, list) {
      for (const i of list) {
        const n = now.nodes[i];
        if (n.hidden) continue;
        const x = sx(i), y = sy(i), k = scale();
        c.globalAlpha = n.dim ? 0.25 : 1;
        c.beginPath();
        cupel.mark(c, nodes[i].group, x, y, Math.max(1, n.size * k));
        c.fillStyle = colours[GROUPS[nodes[i].group]];
        c.fill();
        c.strokeStyle = colours["--ground"];
        c.lineWidth = 1;
        c.stroke();
        if (n.ring) {
          c.beginPath();
          cupel.mark(c, nodes[i].group, x, y, n.ring * k);
          c.strokeStyle = colours["--ink"];
          c.lineWidth = 1.2;
          c.stroke();
        }
        if (n.mark) arrow(c, x + Math.max(n.size, n.ring || 0) * k + 4, y, n.mark);
        if (view.k >= 1.8) words(c, nodes[i].name, x, y + Math.max(n.size, n.ring || 0) * k + 10, colours["--soft"]);
      }
      c.globalAlpha = 1;
    }

    function arrow(c, x, y, up) {
      c.beginPath();
      c.moveTo(x, y - 3.5 * up);
      c.lineTo(x + 3.5, y + 2.5 * up);
      c.lineTo(x - 3.5, y + 2.5 * up);
      c.fillStyle = colours["--ink"];
      c.fill();
    }
    function words(c, text, x, y, colour) {
      c.font = `${LABEL}px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif`;
      c.textAlign = "center";
      c.textBaseline = "middle";
      c.fillStyle = colour;
      c.fillText(text, x, y);
    }
    /** As much of a name as its column is wide; the whole name stands beside the graph. */
    function cut(c, text, room) {
      c.font = `${LABEL}px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif`;
      if (c.measureText(text).width <= room) return text;
      let n = text.length;
      while (n > 1 && c.measureText(`${text.slice(0, n)}…`).width > room) n--;
      return n > 1 ? `${text.slice(0, n)}…` : "";
    }
    /** Names of columns in two lines: what neighbours share stands once, over all of them. */
    function heads(c) {
      const every = Math.ceil(40 / (step * view.k)), at = (i) => (SIDE + i * step) * view.k + view.x;
      const split = columns.map((name) => { const dot = name.lastIndexOf("."); return dot > 0 ? [name.slice(0, dot), name.slice(dot + 1)] : ["", name]; });
      const inside = (x, room) => Math.min(room, 2 * Math.max(0, Math.min(x, width - x) - 3));
      columns.forEach((_, i) => {
        if ((columns.length - 1 - i) % every === 0) words(c, cut(c, split[i][1], inside(at(i), step * view.k * every - 6)), at(i), 25, colours["--soft"]);
        const shared = split[i][0];
        if (!shared || (i && split[i - 1][0] === shared)) return;
        let last = i;
        while (last + 1 < columns.length && split[last + 1][0] === shared) last++;
        const x = (at(i) + at(last)) / 2, room = inside(x, at(last) - at(i) + step * view.k - 6);
        if (room > 20) words(c, cut(c, shared, room), x, 10, colours["--soft"]);
        c.fillStyle = colours["--edge"];
        if (last > i) c.fillRect(at(i) - 8, 17, at(last) - at(i) + 16, 1);
      });
    }

    const all = (keep) => nodes.map((_, i) => i).filter(keep);
    /** A picture of all that is drawn but the held node: the next edges of it, or its marks and heads at the end. */
    function paint() {
      const c = spare.getContext("2d"), but = held && held.far ? held.i : -1;
      if (stale) {
        const list = edges.map((_, e) => e).filter((e) => now.edges[e].kind && !edges[e].includes(but)).sort((a, b) => now.edges[a].kind - now.edges[b].kind);
        job = { list, done: 0, but };
        stale = false;
        c.setTransform(1, 0, 0, 1, 0, 0);
        c.clearRect(0, 0, spare.width, spare.height);
      }
      c.setTransform(ratio, 0, 0, ratio, 0, 0);
      paths(c, job.list.slice(job.done, job.done + SLICE), 1);
      job.done += SLICE;
      if (job.done < job.list.length) return;
      marks(c, all((i) => i !== job.but));
      c.clearRect(0, 0, width, 34);
      heads(c);
      [picture, spare] = [{ paper: spare, view: { ...view } }, picture.paper];
      job = null;
    }

    function frame() {
      asked = 0;
      const gliding = held && held.far && held.i < 0;
      if ((stale || job) && !gliding) paint();
      screen.setTransform(1, 0, 0, 1, 0, 0);
      screen.clearRect(0, 0, canvas.width, canvas.height);
      if (picture.view) { // as it would lie now
        const by = view.k / picture.view.k;
        screen.setTransform(by, 0, 0, by, (view.x - picture.view.x * by) * ratio, (view.y - picture.view.y * by) * ratio);
        screen.drawImage(picture.paper, 0, 0);
      }
      if (job) ask();
      screen.setTransform(ratio, 0, 0, ratio, 0, 0);
      const lit = [...new Set([pointed, chosen, held ? held.i : -1])].filter((i) => i >= 0 && !now.nodes[i].hidden);
      for (const i of lit) {
        paths(screen, touching[i], 1.4);
        const ends = touching[i].filter((e) => now.edges[e].kind).map((e) => (edges[e][0] === i ? edges[e][1] : edges[e][0]));
        marks(screen, [i, ...ends]);
        screen.beginPath();
        screen.arc(sx(i), sy(i), Math.max(now.nodes[i].size, now.nodes[i].ring || 0) * scale() + 4, 0, 7);
        screen.strokeStyle = colours["--ink"];
        screen.lineWidth = i === chosen ? 2.5 : 1.2;
        screen.stroke();
        if (view.k < 1.8) words(screen, nodes[i].name, sx(i), sy(i) - Math.max(now.nodes[i].size, now.nodes[i].ring || 0) * scale() - 10, colours["--ink"]);
      }
    }
    const ask = () => { if (!asked) asked = requestAnimationFrame(frame); };
    function redraw() { stale = true; ask(); }

    /** The nearest node that is drawn, within reach of a finger or a pointer. */
    function under(x, y, reach = 12) {
      let best = -1, least = reach * reach;
      for (let i = 0; i < nodes.length; i++) {
        if (now.nodes[i].hidden) continue;
        const d = (sx(i) - x) ** 2 + (sy(i) - y) ** 2;
        if (d < least) { least = d; best = i; }
      }
      return best;
    }
    const spot = (event) => { const box = canvas.getBoundingClientRect(); return [((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height]; };
    function point(i) { if (i !== pointed) { pointed = i; ask(); } tell(i, i < 0 ? 0 : sx(i), i < 0 ? 0 : sy(i)); }
    function select(i) { chosen = i; ask(); choose(i); }

    canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      const [x, y] = spot(event), i = under(x, y, event.pointerType === "touch" ? 20 : 12);
      held = { i, x, y, far: false, from: { ...view } };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = spot(event);
      if (!held) { point(under(x, y)); canvas.style.cursor = pointed < 0 ? "grab" : "pointer"; return; }
      if (!held.far && Math.hypot(x - held.x, y - held.y) <= 4) return;
      if (!held.far && held.i >= 0) stale = true; // once without it
      held.far = true;
      if (pointed >= 0) point(-1);
      canvas.style.cursor = "grabbing";
      if (held.i >= 0) move(held.i, (x - view.x) / view.k, (y - view.y) / view.k);
      else { view.x = held.from.x + x - held.x; view.y = held.from.y + y - held.y; }
      ask();
    });
    function move(i, x, y) { xs[i] = x; ys[i] = y; kept.set(i, [x / wide, y]); }
    function release(event) {
      if (!held) return;
      const { i, far } = held;
      held = null;
      canvas.style.cursor = "grab";
      if (far) redraw();
      else if (event.type === "pointerup") select(i === chosen ? -1 : i);
    }
    canvas.addEventListener("pointerup", release);
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => { if (!held) point(-1); });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // else the page could not be scrolled past
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 300), ...spot(event));
    }, { passive: false });
    function zoom(by, x = width / 2, y = height / 2) {
      const k = Math.max(0.4, Math.min(8, view.k * by)), real = k / view.k;
      view = { k, x: x - (x - view.x) * real, y: y - (y - view.y) * real };
      redraw();
    }

    /** Where an arrow key leads: the next node of the column, or the nearest in the next column that has one. */
    function step_to(dx, dy) {
      const here = pointed >= 0 ? pointed : chosen, open = all((i) => !now.nodes[i].hidden && !now.nodes[i].dim);
      if (here < 0) return open.at(-1) ?? -1;
      const rest = open.filter((i) => (dx ? (nodes[i].column - nodes[here].column) * dx > 0 : nodes[i].column === nodes[here].column && (ys[i] - ys[here]) * dy > 0));
      const cost = (i) => (dx ? 1e4 * Math.abs(nodes[i].column - nodes[here].column) : 0) + Math.abs(ys[i] - ys[here]);
      return rest.reduce((best, i) => (best < 0 || cost(i) < cost(best) ? i : best), -1);
    }
    const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    canvas.addEventListener("keydown", (event) => {
      const arrow = ARROWS[event.key], key = event.key;
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (arrow && event.shiftKey && (pointed >= 0 || chosen >= 0)) { const i = pointed >= 0 ? pointed : chosen; move(i, xs[i] + 10 * arrow[0], ys[i] + 10 * arrow[1]); redraw(); }
      else if (arrow) { const i = step_to(...arrow); if (i >= 0) { show(i); point(i); } }
      else if (key === "Enter" || key === " ") select(pointed);
      else if (key === "Escape") { point(-1); select(-1); }
      else if (key === "+" || key === "=") zoom(1.25);
      else if (key === "-") zoom(0.8);
      else if (key === "0") fit();
      else return;
      event.preventDefault();
    });
    canvas.addEventListener("blur", () => { if (!held) point(-1); });
    /** Bring a node into sight. */
    function show(i) {
      const dx = Math.min(0, width - 20 - sx(i)) + Math.max(0, 20 - sx(i)), dy = Math.min(0, height - 20 - sy(i)) + Math.max(0, TOP - 6 - sy(i));
      if (dx || dy) { view.x += dx; view.y += dy; redraw(); }
    }

    const graph = {
      node: canvas, fit, zoom, busy: () => Boolean(asked || job || stale),
      draw: () => { read(); now = look(); redraw(); },
      select: (i) => { chosen = i; if (i >= 0) show(i); ask(); },
      at: (i) => { const box = canvas.getBoundingClientRect(); return [box.left + (sx(i) * box.width) / width, box.top + (sy(i) * box.height) / height]; },
    };
    canvas.cupelGraph = graph;
    live.add(graph);
    read();
    fit();
    requestAnimationFrame(() => graph.draw()); // colours are known once it is on the page
    return graph;
  };
})();
