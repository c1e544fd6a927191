// window.cupel, eighth part: the table of readings. The cells are the ones that report/table.py wrote; nothing is written anew,
// they only change places.
//
//   cupel.readings(table, readings, variants, said)    returns {sort(r), unsort(), find(words), findVariants(words), halves(yes), lie(yes), lying, order}
//       readings: [{probe, name, better, cells: [[value, ...] or null, one per variant]}];  said(words): tells what happened
(() => {
  const cupel = window.cupel, { el } = cupel;

  cupel.readings = (table, readings, variants, said) => {
    const model = read(table, readings, variants);
    const state = { order: variants.map((_, v) => v), sorted: null, worst: false, lying: table.classList.contains("variants-down") };
    const shownReading = readings.map(() => true), shownVariant = variants.map(() => true);

    const roles = () => (window.requestIdleCallback || setTimeout)(() => model.role(table, state.lying));
    roles();
    const button = (th, act) => { const b = el("button", { type: "button", class: "sort", onclick: act }); b.append(...th.childNodes); th.append(b); return b; };
    model.readingHeads.forEach((th, r) => button(th, () => api.sort(r)));
    table.addEventListener("mouseover", (event) => { // details for the mouse; "One reading, every variant" has them for everybody
      const td = event.target.closest("td");
      if (!td || td.title) return;
      const [r, v] = model.place.get(td) || [], cell = r === undefined ? null : readings[r].cells[v];
      if (cell) td.title = `${variants[v]}, ${readings[r].name}: ${cupel.exact(cell[0])}` + (cell.length > 1 ? `; 95%: ${cupel.exact(cell[1])} to ${cupel.exact(cell[2])}` : "");
    });

    function place() {
      if (state.lying) {
        model.body.append(...state.order.map((v) => model.lines[v]));
      } else {
        model.headLine.append(...state.order.map((v) => model.variantHeads[v]));
        readings.forEach((_, r) => model.rows[r].append(...state.order.map((v) => model.cells[r][v])));
      }
      model.readingHeads.forEach((th, r) => {
        if (r !== state.sorted) return th.removeAttribute("aria-sort");
        th.setAttribute("aria-sort", state.worst === (readings[r].better === "higher") ? "ascending" : "descending");
      });
    }

    function hide() {
      model.readingHeads.forEach((th, r) => (th.hidden = !shownReading[r]));
      model.groups.forEach(({ head, members, line }) => {
        const n = members.filter((r) => shownReading[r]).length;
        head.hidden = !n;
        if (line) line.hidden = !n;
        head.colSpan = state.lying ? Math.max(1, n) : 1 + shownVariant.filter(Boolean).length;
        head.style.setProperty("--span", n);
      });
      table.style.setProperty("--columns", shownReading.filter(Boolean).length);
      for (let v = 0; v < variants.length; v++) {
        model.variantHeads[v].hidden = !shownVariant[v] && !state.lying;
        if (state.lying) model.lines[v].hidden = !shownVariant[v];
      }
      readings.forEach((_, r) => {
        if (!state.lying) model.rows[r].hidden = !shownReading[r];
        model.cells[r].forEach((td, v) => { const off = state.lying ? !shownReading[r] : !shownVariant[v]; if (td.hidden !== off) td.hidden = off; });
      });
    }

    const api = {
      get order() { return state.order.map((v) => variants[v]); },
      get lying() { return state.lying; },
      sort(r) {
        state.worst = state.sorted === r && !state.worst;
        state.sorted = r;
        const sign = (readings[r].better === "higher" ? -1 : 1) * (state.worst ? -1 : 1), at = (v) => readings[r].cells[v]?.[0] ?? null;
        state.order.sort((a, b) => { const [p, q] = [at(a), at(b)]; return p === null || q === null ? (p === null) - (q === null) : sign * (p - q) || a - b; });
        place();
        said(`Sorted by ${readings[r].name}, ${readings[r].better === "none" ? (state.worst ? "largest" : "smallest") : state.worst ? "worst" : "best"} first.`);
      },
      unsort() { state.order.sort((a, b) => a - b); state.sorted = null; state.worst = false; place(); said("In the order of the recipe."); },
      find(words) { filter(shownReading, readings.map((r) => `${r.probe} ${r.name}`), words, "readings"); },
      halves(yes) {
        table.classList.toggle("no-halves", !yes);
        if (!table.classList.contains("bare")) return; // else the style hides them
        for (const td of model.cells.flat()) {
          if (!yes) model.whole.set(td, td.firstChild.data);
          td.firstChild.data = yes ? model.whole.get(td) ?? td.firstChild.data : td.firstChild.data.replace(/ ±.*/, "");
        }
      },
      findVariants(words) { filter(shownVariant, variants, words, "variants"); },
      lie(yes) {
        if (yes === state.lying) return;
        state.lying = yes;
        build(table, model, readings, variants, yes);
        roles();
        place();
        hide();
      },
    };
    function filter(shown, names, words, what) {
      const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
      names.forEach((name, i) => (shown[i] = wanted.every((w) => name.toLowerCase().includes(w))));
      hide();
      said(`${shown.filter(Boolean).length} of ${shown.length} ${what} shown.`);
    }
    return api;
  };

  /** Heads and cells by reading and variant, from either layout. */
  function read(table, readings, variants) {
    const lying = table.classList.contains("variants-down"), place = new Map();
    const model = { role: spoken, whole: new Map(), place, groups: groupsOf(readings), lines: [], rows: [] };
    const bodyRows = [...table.tBodies].flatMap((b) => [...b.rows]).filter((row) => !row.classList.contains("probe"));
    if (lying) {
      model.variantHeads = bodyRows.map((row) => row.cells[0]);
      model.readingHeads = [...table.tHead.rows[1].cells].slice(1);
      model.cells = readings.map((_, r) => bodyRows.map((row) => row.cells[r + 1]));
      model.lines = bodyRows;
      model.body = table.tBodies[0];
      model.groups.forEach((g, i) => (g.head = table.tHead.rows[0].cells[i + 1]));
    } else {
      model.variantHeads = [...table.tHead.rows[0].cells].slice(1);
      model.readingHeads = bodyRows.map((row) => row.cells[0]);
      model.cells = bodyRows.map((row) => [...row.cells].slice(1));
      model.rows = bodyRows;
      model.headLine = table.tHead.rows[0];
      model.groups.forEach((g, i) => { g.line = table.tBodies[i].rows[0]; g.head = g.line.cells[0]; });
    }
    model.cells.forEach((line, r) => line.forEach((td, v) => place.set(td, [r, v])));
    return model;
  }

  /** Roles for the layout whose rows are flex boxes: some browsers take a table's meaning from its layout. */
  function spoken(table, lying) {
    const set = (node, role) => (lying ? node.setAttribute("role", role) : node.removeAttribute("role"));
    set(table, "table");
    for (const part of [table.tHead, ...table.tBodies]) {
      set(part, "rowgroup");
      for (const row of part.rows) {
        set(row, "row");
        for (const c of row.cells) set(c, c.tagName === "TD" ? "cell" : c.scope === "row" ? "rowheader" : "columnheader");
      }
    }
  }

  function groupsOf(readings) {
    const groups = [];
    readings.forEach((reading, r) => { if (r && readings[r - 1].probe === reading.probe) groups.at(-1).members.push(r); else groups.push({ probe: reading.probe, members: [r] }); });
    return groups;
  }

  /** The other layout, from the same heads and cells. */
  function build(table, model, readings, variants, lying) {
    const scope = (nodes, word) => nodes.forEach((th) => th.setAttribute("scope", word));
    scope(model.readingHeads, lying ? "col" : "row");
    scope(model.variantHeads, lying ? "row" : "col");
    [...table.children].forEach((part) => { if (part.tagName !== "CAPTION") part.remove(); });
    table.classList.toggle("variants-down", lying);
    table.classList.toggle("variants-across", !lying);
    model.variantHeads.forEach((th) => (th.hidden = false));
    if (lying) {
      model.groups.forEach((g) => { g.head = el("th", { scope: "colgroup" }, g.probe); g.line = null; });
      model.lines = variants.map((_, v) => el("tr", {}, model.variantHeads[v], readings.map((_, r) => model.cells[r][v])));
      model.body = el("tbody", {}, model.lines);
      table.append(el("thead", {}, el("tr", { class: "probe" }, el("td"), model.groups.map((g) => g.head)), el("tr", {}, el("th", { scope: "col" }, "variant"), model.readingHeads)), model.body);
    } else {
      model.headLine = el("tr", {}, el("th", { scope: "col" }, "reading"), model.variantHeads);
      model.rows = readings.map((_, r) => el("tr", {}, model.readingHeads[r], model.cells[r]));
      table.append(el("thead", {}, model.headLine));
      for (const g of model.groups) {
        g.head = el("th", { scope: "rowgroup", colspan: variants.length + 1 }, g.probe);
        g.line = el("tr", { class: "probe" }, g.head);
        table.append(el("tbody", {}, g.line, g.members.map((r) => model.rows[r])));
      }
    }
  }

  /** Copies of a table too wide for paper, each with some of its columns; put them after `box` while printing. */
  cupel.sliced = (table, across = 6) => {
    const heads = [...table.tHead.rows].at(-1).cells;
    const columns = [...heads].map((th, i) => [th, i]).filter(([th, i]) => i > 0 && !th.hidden);
    if (columns.length <= across) return null;
    const rows = [...table.tBodies].flatMap((b) => [...b.rows]).filter((row) => !row.hidden);
    const slice = (part) => el("table", { class: table.classList.contains("bare") ? "readings bare" : "readings" }, el("thead", {}, el("tr", {}, el("th", {}), part.map(([th]) => el("th", {}, th.textContent)))),
      el("tbody", {}, rows.map((row) => el("tr", { class: row.className || null }, row.cells[0].cloneNode(true), row.classList.contains("probe") ? [] : part.map(([, i]) => row.cells[i].cloneNode(true))))));
    const parts = d3.range(0, columns.length, across).map((k) => slice(columns.slice(k, k + across)));
    return el("div", { class: "only-print" }, parts);
  };
})();
