// window.cupel, sixth part: the pathways of benign and attacked inputs through a network, side by side with what
// excites each channel.
//
//   cupel.pathways(content, name)   content as report/paths.py made it; conditions are original, target, then strengths
(() => {
  const cupel = window.cupel, { el, exact } = cupel;
  const NONE = 0, QUIET = 1, FIRST = 2, SECOND = 3, SHARED = 4; // kinds of edges, as graph.js colours them
  const VIEWS = ["Original and attacked", "Original class", "Target class", "Attacked"];
  const TOLD = ["strongest for the original class only", "strongest for both classes", "strongest for the target class only", "strongest under attack only"];

  cupel.pathways = (content, name) => {
    const { layers, neurons: n, edges: e, strengths, success, groups } = content, count = n.layer.length;
    const pair = content.pair.map((c) => (/^\d+$/.test(c) ? `class ${c}` : c));
    const order = d3.range(count).sort((a, b) => n.layer[a] - n.layer[b] || n.group[a] - n.group[b] || n.channel[a] - n.channel[b]);
    const rank = new Map(order.map((i, k) => [i, k])); // the graph numbers nodes as they stand
    const nodes = order.map((i) => ({ column: n.layer[i], group: n.group[i], name: String(n.channel[i]) }));
    const links = e.into.map((into, k) => [rank.get(e.source[k]), rank.get(into)]);
    const bound = layers.map((_, l) => { const all = d3.range(count).filter((i) => n.layer[i] === l).flatMap((i) => n.score[i]); return [Math.min(...all), Math.max(...all)]; });
    const most = d3.range(count).map((i) => Math.max(1e-12, ...e.into.flatMap((into, k) => (into === i ? e.influence[k] : []))));
    const state = { strength: strengths.length - 1, view: 0, open: new Set(groups.keys()), shift: new Set(), thin: true, chosen: -1, kept: new Map() };
    const brief = (v) => exact(+v.toPrecision(3));
    let graph = null;

    const radius = (i, c) => { const [low, high] = bound[n.layer[i]]; return 2.5 + 6 * Math.sqrt(Math.max(0, (n.score[i][c] - low) / (high - low || 1))); };
    const attack = () => 2 + state.strength;
    const shown = () => [[0, attack()], [0], [1], [attack()]][state.view];
    const fits = (i) => !state.shift.size || state.shift.has(n.shift[i][state.strength]);

    function kind(k) {
      if (![e.source[k], e.into[k]].every((i) => state.open.has(n.group[i])) || ![e.source[k], e.into[k]].some(fits)) return NONE;
      const on = shown().map((c) => e.path[k][c]);
      if (!on.some(Boolean)) return state.thin ? NONE : QUIET;
      return on.length === 2 ? (on[0] && on[1] ? SHARED : on[0] ? FIRST : SECOND) : state.view === 3 ? SECOND : FIRST;
    }
    function look() {
      const drawn = e.into.map((into, k) => { const here = kind(k); return { kind: here, width: here > QUIET ? 1 + 2 * Math.max(0, Math.max(...shown().map((c) => e.influence[k][c])) / most[into]) : 0.5 }; });
      const reached = new Set(drawn.flatMap((d, k) => (d.kind > QUIET ? [e.source[k], e.into[k]] : [])));
      return {
        edges: drawn,
        nodes: order.map((i) => ({
          hidden: !state.open.has(n.group[i]), dim: !fits(i) || (state.thin && !reached.has(i) && !state.shift.size),
          size: radius(i, shown().at(-1)), ring: state.view === 0 ? radius(i, 0) : 0, mark: state.view % 3 === 0 ? n.shift[i][state.strength] : 0,
        })),
      };
    }

    const pictures = gallery(content.images);
    const title = (i) => `${layers[n.layer[i]][0]}, ${logits(i) ? pair[n.group[i] === 0 ? 0 : 1] : `channel ${n.channel[i]}`}`;
    const moved = (i) => ["lowered by the attack", "", "raised by the attack"][n.shift[i][state.strength] + 1];
    const logits = (i) => n.layer[i] === layers.length - 1;
    const what = (i) => (logits(i) ? `score of ${n.group[i] === 0 ? pair[0] : pair[1]}` : TOLD[n.group[i]]);
    const card = el("div", { class: "channel-card", hidden: true, "aria-hidden": "true" }), said = el("p", { class: "sr", role: "status", "aria-live": "polite" });
    const aside = el("div", { class: "channel", role: "region", "aria-label": `Chosen channel of ${name}` });

    function tell(k, x, y) {
      card.hidden = k < 0;
      if (k < 0 || order[k] === state.chosen) { card.hidden = true; return; }
      const i = order[k], width = graph.node.clientWidth;
      if (card.dataset.of !== String(i)) {
        card.dataset.of = i;
        card.replaceChildren(el("p", {}, el("b", {}, title(i))), el("div", { class: "strip" }, n.patches[i].map((p) => pictures.patch(p, 56, `what excites ${title(i)}`))), el("p", {}, [what(i), moved(i)].filter(Boolean).join("; ")));
        said.textContent = `${title(i)}: ${[what(i), moved(i)].filter(Boolean).join("; ")}`;
      }
      card.style.left = `${Math.max(0, Math.min(x + 14, width - card.offsetWidth - 2))}px`;
      card.style.top = `${y > graph.node.clientHeight / 2 ? Math.max(0, y - card.offsetHeight - 16) : y + 16}px`;
    }

    function choose(k) {
      state.chosen = k < 0 ? -1 : order[k];
      const i = state.chosen;
      card.hidden = true;
      if (i < 0) return aside.replaceChildren(el("p", { class: "note" }, "Click a channel, or go to one with the arrow keys and press Enter: its feature images, scores and strongest connections stand here."));
      const part_seen = n.patches[i].some(([, , , side]) => side < Math.min(content.images.width, content.images.height));
      const words = [pair[0], pair[1], ...strengths.map((s) => `attacked, ${brief(s)}`)];
      const [low, high] = bound[n.layer[i]], part = (v) => (100 * Math.max(0, v - Math.min(0, low))) / (high - Math.min(0, low) || 1);
      const score = el("table", { class: "plain scores" }, el("caption", {}, "Median scores; top: among the strongest of the layer"), el("tbody", {}, words.map((w, c) =>
        el("tr", {}, el("th", { scope: "row" }, w), el("td", {}, el("span", { class: "bar", style: `--part: ${part(n.score[i][c]).toFixed(1)}%` }, brief(n.score[i][c]))), el("td", {}, n.top[i][c] && !logits(i) ? "top" : "")))));
      const now = shown().at(-1), near = (ends, other) => d3.range(e.into.length).filter((q) => e[ends][q] === i).sort((a, b) => e.influence[b][now] - e.influence[a][now]).slice(0, 5)
        .map((q) => el("li", {}, el("button", { type: "button", class: "goto", onclick: () => go(e[other][q]) }, title(e[other][q])), ` ${brief(e.influence[q][now])}`));
      const list = (head, items) => (items.length ? [el("p", { class: "panel-name" }, head), el("ul", { class: "near" }, items)] : []);
      return aside.replaceChildren(
        el("p", { class: "panel-name" }, title(i)), el("p", { class: "note" }, [what(i), moved(i)].filter(Boolean).join("; "), "."),
        el("p", { class: "note" }, part_seen ? "Test inputs that excite it most: what it sees of them, and where." : "Test inputs that excite it most; it sees all of them."),
        el("div", { class: "features" }, n.patches[i].map((p) => pictures.patch(p, 72, `what excites ${title(i)}`)), part_seen ? n.patches[i].map((p) => pictures.whole(p, 72, "the whole input, that part framed")) : null),
        score, ...list("Driven by", near("into", "source")), ...list("Drives", near("source", "into")));
    }
    function go(i) { choose(rank.get(i)); graph.select(rank.get(i)); graph.node.focus({ preventScroll: true }); }
    const redraw = () => { graph?.draw(); if (state.chosen >= 0) choose(rank.get(state.chosen)); key.replaceChildren(...legend()); };

    const toggle = (text, on, flip, mark) => {
      const button = el("button", { type: "button", "aria-pressed": String(on), onclick: () => { button.setAttribute("aria-pressed", String(flip())); redraw(); } }, mark || null, text);
      return button;
    };
    const flip = (set, value) => () => { if (set.has(value)) set.delete(value); else set.add(value); return set.has(value); };
    const sums = groups.map((_, g) => n.group.filter((x) => x === g).length);
    const views = el("select", { onchange: (event) => { state.view = +event.target.value; redraw(); } }, VIEWS.map((v, k) => el("option", { value: k }, v)));
    const levels = el("select", { onchange: (event) => { state.strength = +event.target.value; redraw(); } }, strengths.map((s, k) => el("option", { value: k, selected: k === state.strength }, `${brief(s)} (${Math.round(100 * success[k])} % succeed)`)));
    const tools = el("div", { class: "controls", role: "group", "aria-label": `What the graph of ${name} shows` },
      el("label", {}, "Pathway", views), el("label", {}, "Attack strength", levels),
      el("div", { class: "toggles", role: "group", "aria-label": "Channels by what they matter for" }, groups.map((g, k) => toggle(`${g} (${sums[k]})`, true, flip(state.open, k), swatch(k)))),
      el("div", { class: "toggles", role: "group", "aria-label": "Channels by what the attack does" }, toggle("▲ excited", false, flip(state.shift, 1)), toggle("▼ inhibited", false, flip(state.shift, -1))),
      el("label", { class: "check" }, el("input", { type: "checkbox", checked: true, onchange: (event) => { state.thin = event.target.checked; redraw(); } }), " Pathway only"),
      el("div", { class: "toggles", role: "group", "aria-label": "View" }, [["−", "Zoom out", () => graph.zoom(0.8)], ["+", "Zoom in", () => graph.zoom(1.25)], ["Fit", "Fit the graph", () => graph.fit()]].map(([text, words, act]) => el("button", { type: "button", "aria-label": words, onclick: act }, text))));
    const key = el("ul", { class: "key" });
    const line = (colour, text) => el("li", {}, el("span", { class: "stroke", style: `background: ${colour}`, "aria-hidden": "true" }), text);
    const legend = () => [
      ...(state.view === 0 ? [line("var(--c1)", `pathway of ${pair[0]}`), line("var(--c4)", "pathway under attack"), line("var(--ink)", "in both"), el("li", {}, "filled mark: score under attack; outline: on the original class")] : [line(state.view === 3 ? "var(--c4)" : "var(--c1)", VIEWS[state.view].toLowerCase())]),
      ...(state.view % 3 === 0 ? [el("li", {}, "▲ ▼ raised or lowered most by the attack")] : []),
    ];

    const draw = (width) => {
      graph = cupel.graph({ columns: layers.map(([word]) => word), nodes, edges: links, look, tell, choose, kept: state.kept,
        label: `Channels and connections of ${name}. Arrow keys go from channel to channel, Enter keeps one, plus and minus zoom, 0 fits, Shift with an arrow moves a channel` }, Math.floor(width));
      if (state.chosen >= 0) graph.select(rank.get(state.chosen));
      return el("div", { class: "graph-box" }, graph.node, card);
    };
    const table = () => cupel.table({ caption: `Channels of ${name}: median scores`, head: ["channel", "strongest for", pair[0], pair[1], ...strengths.map((s) => `attacked, ${brief(s)}`)], rows: order.map((i) => [title(i), groups[n.group[i]], ...n.score[i]]) });
    choose(-1);
    key.replaceChildren(...legend());
    const figure = cupel.figure({ label: `Pathways of ${name}`, draw, table, height: 420 });
    return el("div", { class: "panel broad pathways" }, el("p", { class: "panel-name" }, `${name}: ${pair[0]} attacked to be read as ${pair[1]}`), tools, key, el("div", { class: "graph-side" }, figure, aside), said);
  };

  function swatch(group) {
    const node = el("canvas", { width: 28, height: 28, class: "swatch", "aria-hidden": "true" }), c = node.getContext("2d");
    c.beginPath();
    cupel.mark(c, group, 14, 14, 9);
    c.fill(); // a mask: the style gives the colour, so that themes switch
    const url = node.toDataURL();
    return el("span", { class: "swatch", "aria-hidden": "true", style: `background: ${cupel.markColour(group)}; -webkit-mask: url(${url}) center / contain no-repeat; mask: url(${url}) center / contain no-repeat` });
  }

  /** Pictures out of packed images, unpacked when one is first asked for. */
  function gallery({ width, height, channels, bytes }) {
    const made = new Map();
    function source(k) {
      if (!made.has(k)) {
        const raw = Uint8Array.from(atob(bytes[k]), (t) => t.charCodeAt(0)), node = el("canvas", { width, height }), c = node.getContext("2d"), image = c.createImageData(width, height);
        for (let p = 0; p < width * height; p++) for (let j = 0; j < 4; j++) image.data[4 * p + j] = j === 3 ? 255 : raw[p * channels + (channels === 3 ? j : 0)];
        c.putImageData(image, 0, 0);
        made.set(k, node);
      }
      return made.get(k);
    }
    function drawn(k, left, top, wide, high, size, words) {
      const scale = size / Math.max(wide, high), node = el("canvas", { width: Math.round(wide * scale), height: Math.round(high * scale), role: "img", "aria-label": words }), c = node.getContext("2d");
      c.imageSmoothingEnabled = false;
      c.drawImage(source(k), left, top, wide, high, 0, 0, node.width, node.height);
      return [node, c, scale];
    }
    return {
      patch: ([k, top, left, side], size, words) => drawn(k, left, top, side, side, size, words)[0],
      whole: ([k, top, left, side], size, words) => {
        const [node, c, scale] = drawn(k, 0, 0, width, height, size, words);
        c.lineWidth = 2;
        c.strokeStyle = "#ff9561";
        c.strokeRect(left * scale + 1, top * scale + 1, Math.max(2, side * scale - 2), Math.max(2, side * scale - 2));
        return node;
      },
    };
  }
})();
