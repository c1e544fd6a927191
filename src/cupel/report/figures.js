// window.cupel, seventh part: any figure of a probe, by its kind.
//
//   cupel.figureOf(figure, shown, order)   an element with the figure of the `shown` variants side by side
//       figure: {probe, name, kind, all, by: {variant: content}, none: [variants], left: [variants]}   (report/figures.py)
// A kind that nothing here draws is told as text, and says so: a figure never vanishes.
(() => {
  const cupel = window.cupel, { el, exact } = cupel;
  const content = (figure, name) => ({ ...figure.all, ...figure.by[name] });
  const some = (names) => (names.length > 6 ? `${names.slice(0, 6).join(", ")} and ${names.length - 6} more` : names.join(", "));

  const panels = (figure, shown, make) => el("div", { class: `panels ${figure.kind}` }, shown.map((name) => make(content(figure, name), name)));

  /** Lines: a panel for each series, variants in it as colours. */
  function lines(figure, shown, order) {
    const found = shown.map((name) => [name, content(figure, name)]), first = found[0][1];
    const names = [...new Set(found.flatMap(([, c]) => Object.keys(c.series)))];
    const node = el("div");
    cupel.lines(node, {
      panels: names.map((name) => ({ name, series: found.filter(([, c]) => c.series[name]).map(([group, c]) => ({ group, name: "", points: c.series[name] })) })),
      x: { name: first.x, whole: first.whole, domain: first.diagonal ? [0, 1] : undefined }, y: { name: first.y, domain: first.share ? [0, 1] : undefined },
      order, diagonal: first.diagonal, title: figure.name, note: first.note || null,
    });
    return untitled(node);
  }

  function dots(figure, shown, order) {
    const found = shown.map((name) => [name, content(figure, name)]), labels = [...new Set(found.flatMap(([, c]) => c.labels))];
    const node = el("div");
    cupel.dots(node, {
      labels, value: { name: found[0][1].value }, order, title: figure.name,
      series: found.map(([group, c]) => ({ group, values: labels.map((l) => c.values[c.labels.indexOf(l)] ?? null) })),
    });
    return untitled(node);
  }

  const untitled = (node) => { node.querySelector("figcaption")?.remove(); return node; }; // the section's heading says it

  function facts(figure, shown) {
    const maps = shown.map((name) => new Map(content(figure, name).facts)), keys = [...new Set(maps.flatMap((m) => [...m.keys()]))];
    return cupel.table({ caption: `${figure.probe}: ${figure.name}`, head: ["", ...shown], rows: keys.map((k) => [k, ...maps.map((m) => { const v = m.get(k); return typeof v === "boolean" ? (v ? "yes" : "no") : v; })]) });
  }

  const tops = (figure) => cupel.mostOf(Object.keys(figure.by).map((name) => content(figure, name)));
  const helps = (figure) => HELP[figure.kind] && (figure.kind !== "records" || tops(figure).some((top) => top > 0)); // no bars, no word of them

  const MAKERS = {
    lines, dots, facts,
    confusion: (figure, shown) => panels(figure, shown, cupel.confusion),
    reliability: (figure, shown, order) => panels(figure, shown, (c, name) => cupel.reliability(c, name, order.indexOf(name))),
    images: (figure, shown) => panels(figure, shown, cupel.images),
    heat: (figure, shown) => panels(figure, shown, cupel.heat),
    records: (figure, shown) => panels(figure, shown, (c, name) => cupel.records(c, name, tops(figure))),
    pathways: (figure, shown) => panels(figure, shown, cupel.pathways),
    listing: (figure, shown) => panels(figure, shown, (c, name) => told(name, c.text)),
  };
  const told = (name, text) => el("div", { class: "panel broad" }, el("p", { class: "panel-name" }, name), el("pre", { tabindex: "0" }, text));
  const plainly = (figure, shown) => panels(figure, shown, (c, name) => told(name, JSON.stringify(c, null, 1)));

  const HELP = {
    confusion: "Truth down, answer across; tinted by the share of its row: blue right, orange wrong.",
    reliability: "Dots on the dashed line: the network is as often right as it is sure. Below: how many inputs were that sure.",
    images: "Pictures of the first seed; changes and maps are red above zero and blue below, each on its own scale.",
    records: "Bars: share of the largest value over all variants; of 1 for shares.",
    pathways: "Layers from left to right, a mark for each channel, as large as it is strong. Drag marks and ground; Ctrl and the wheel zoom; point at a channel to see what excites it, click to keep it.",
    listing: "This figure has no drawing of its own, so it is told in words.",
  };

  cupel.figureOf = (figure, shown, order) => {
    const drawn = shown.filter((name) => figure.by[name]), notes = [];
    const absent = (names, words) => { const here = names.filter((n) => shown.includes(n)); if (here.length) notes.push(el("p", { class: "note" }, `${words}: ${some(here)}.`)); };
    if (drawn.length && helps(figure)) notes.push(el("p", { class: "note" }, HELP[figure.kind]));
    absent(figure.none, "Nothing to show for");
    absent(figure.left, "Only in scorecard.json, to keep this page small");
    let made = null;
    try {
      made = drawn.length ? (MAKERS[figure.kind] || plainly)(figure, drawn, order) : null;
    } catch (error) { // drawn wrongly must not mean lost
      made = el("div", {}, el("p", { class: "broken" }, `This figure could not be drawn (${error.message}).`), plainly(figure, drawn));
    }
    return el("div", { class: "figure" }, notes, made);
  };
})();
