// window.cupel, first part: elements, numbers, colours, and drawing only what is near the screen.
//
//   cupel.el(tag, attributes, ...children)      an element; strings become text, never HTML
//   cupel.exact(value)                          a number with at most six significant digits; "-" for none
//   cupel.colour(i), cupel.symbol(i)            of the i-th variant; colours are CSS variables, so themes switch by themselves
//   cupel.legend(names, order)                  colour and symbol of each name, as a list
//   cupel.table({caption, head, rows})          an accessible table: first column holds the row headers
//   cupel.fit()                                 draws anew what was drawn at another width (after print)
//   cupel.put(node, made)                       replaces what is in `node`, and forgets its plots
//   cupel.figure({title, note, draw, table})    <figure>: heading, drawing (lazy), note, and the numbers in a <details>
//   cupel.lazily(node, draw, height)            calls draw(width) -> Node when `node` nears the screen, again when it changes width
//   cupel.drawAll(most)                         draws everything now, and anew what is wider than `most` (for print)
(() => {
  const cupel = (window.cupel = window.cupel || {});
  const COLOURS = 7;
  const SYMBOLS = ["circle", "square", "triangle", "diamond2", "star", "wye", "cross"];

  cupel.el = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
    return node;
  };
  const el = cupel.el;

  cupel.exact = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "-";
    if (typeof value !== "number") return String(value);
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6)));
  };
  cupel.colour = (i) => `var(--c${(((i % COLOURS) + COLOURS) % COLOURS) + 1})`;
  cupel.symbol = (i) => SYMBOLS[(((i % COLOURS) + COLOURS) % COLOURS)];

  cupel.legend = (names, order) => {
    const mark = (name) => {
      const i = order.indexOf(name), svg = d3.create("svg").attr("viewBox", "-7 -7 14 14").attr("aria-hidden", "true");
      const kind = { circle: d3.symbolCircle, square: d3.symbolSquare, triangle: d3.symbolTriangle, diamond2: d3.symbolDiamond2,
        star: d3.symbolStar, wye: d3.symbolWye, cross: d3.symbolCross }[cupel.symbol(i)];
      svg.append("path").attr("d", d3.symbol(kind, 64)()).attr("fill", cupel.colour(i));
      return svg.node();
    };
    return el("ul", { class: "key" }, names.map((name) => el("li", {}, mark(name), name)));
  };

  cupel.table = ({ caption, head, rows, kind = "" }) => el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    el("table", { class: `plain ${kind}` },
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, head.map((h) => el("th", { scope: "col" }, h)))),
      el("tbody", {}, rows.map(([first, ...rest]) =>
        el("tr", {}, el("th", { scope: "row" }, first instanceof Node ? first : cupel.exact(first)), rest.map((c) => el("td", {}, c instanceof Node ? c : cupel.exact(c))))))));

  const waiting = new Map();
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "600px" });
  const sized = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const item = waiting.get(target);
      if (item && item.width && contentRect.width && Math.abs(contentRect.width - item.width) > 8) draw(target, contentRect.width);
    }
  });

  function draw(node, width) {
    const item = waiting.get(node);
    if (!item) return;
    seen.unobserve(node);
    item.width = width || node.clientWidth || 640;
    let made;
    try {
      made = item.draw(item.width);
    } catch (error) { // one plot that fails must not take the page with it; its numbers stay in the table beside it
      made = el("p", { class: "broken" }, `This plot could not be drawn (${error.message}). Its numbers are in the table.`);
    }
    node.style.minHeight = "";
    node.replaceChildren(made);
    sized.observe(node);
  }

  cupel.lazily = (node, drawing, height = 240) => {
    waiting.set(node, { draw: drawing, width: 0 });
    node.style.minHeight = `${height}px`;
    seen.observe(node);
    return node;
  };
  cupel.redraw = (node) => draw(node, node.clientWidth);
  cupel.drawAll = (most = Infinity) => {
    for (const [node, item] of waiting) if (node.isConnected && (!item.width || item.width > most)) draw(node, Math.min(node.clientWidth || 640, most));
  };
  cupel.fit = () => { for (const [node, item] of waiting) if (item.width && node.isConnected && Math.abs(node.clientWidth - item.width) > 8) draw(node); };
  cupel.forget = (parent) => {
    for (const node of waiting.keys()) if (parent.contains(node)) { seen.unobserve(node); sized.unobserve(node); waiting.delete(node); }
  };

  /** Put `made` into `node`; where something was drawn before, draw at once, so that a control answers without a flicker. */
  cupel.put = (node, made) => {
    const drawn = [...waiting].some(([inner, item]) => item.width && node.contains(inner));
    cupel.forget(node);
    node.replaceChildren(made);
    if (drawn) for (const inner of waiting.keys()) if (node.contains(inner)) draw(inner);
  };

  cupel.figure = ({ title, note, draw: drawing, table, height, label }) => {
    const plot = el("div", { class: "plot" });
    const numbers = table && el("details", { class: "numbers" }, el("summary", {}, "Numbers of this plot"));
    if (numbers) {
      const fill = () => { if (numbers.children.length < 2) numbers.append([].concat(table()).reduce((box, t) => { box.append(t); return box; }, el("div"))); };
      numbers.addEventListener("toggle", () => { if (numbers.open) fill(); });
    }
    const figure = el("figure", {}, title ? el("figcaption", {}, title) : null, plot, note ? el("p", { class: "note" }, note) : null, numbers || null);
    cupel.lazily(plot, (width) => {
      const made = drawing(width);
      const svg = made.matches && made.matches("svg") ? made : made.querySelector && made.querySelector("svg");
      if (svg && !svg.hasAttribute("aria-label")) { svg.setAttribute("role", "img"); svg.setAttribute("aria-label", `${label || title || "plot"}; the same numbers are in the table below`); }
      return made;
    }, height);
    return figure;
  };
})();
