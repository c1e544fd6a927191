// What the pages of `cupel ui` do in the browser. Every text arrives escaped from the server, or is set as text here.
(() => {
  const one = (id) => document.getElementById(id);
  const LIST_EVERY = 2000, RUN_EVERY = 1000; // milliseconds between two questions to the server

  document.querySelectorAll("button.theme").forEach((button) => {
    if (!window.cupelTheme) return;
    button.hidden = false;
    window.cupelTheme.button(button);
  });

  if (one("rows")) list();
  else if (document.querySelector("main[data-empty='1']")) await_first();
  if (one("live")) live();
  if (one("points")) comparison();

  /** Asks `address` again and again while the page is in view; a server that went away is asked again too. */
  function poll(address, pause, took) {
    let last = null;
    const ask = async () => {
      if (!document.hidden) {
        try {
          const answer = await fetch(address, { cache: "no-store" });
          const text = answer.ok ? await answer.text() : last;
          if (text !== last && took(text, last) === "enough") return;
          last = text;
        } catch { /* the server was stopped; it may come back */ }
      }
      setTimeout(ask, pause);
    };
    ask();
  }

  function await_first() {
    poll("/rows", LIST_EVERY, (text) => { if (text.trim()) location.reload(); });
  }

  function list() {
    const body = one("rows"), search = one("search"), compare = one("compare"), chosen = one("chosen"), heads = [...document.querySelectorAll("th[data-key]")];
    let key = -1, direction = 1;

    const boxes = () => [...body.querySelectorAll("input[name=run]")];
    const count = () => {
      const n = boxes().filter((b) => b.checked).length;
      compare.disabled = n < 2;
      chosen.textContent = n === 0 ? "choose two or more" : n === 1 ? "1 chosen; choose another" : `${n} chosen`;
    };
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of body.rows) {
        row.hidden = !words.every((w) => row.dataset.search.includes(w));
        shown += !row.hidden;
      }
      one("none").hidden = shown > 0;
    };
    const value = (row) => {
      // A row that cannot be read has one long cell in place of five: it counts as empty there.
      const cell = row.cells.length < heads.length + 1 && key > 0 ? (key === heads.length - 1 ? row.cells[row.cells.length - 1] : null) : row.cells[key + 1];
      return cell?.dataset.sort ?? "";
    };
    const sort = () => {
      heads.forEach((h, i) => (i === key ? h.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending") : h.removeAttribute("aria-sort")));
      if (key < 0) return;
      const order = new Intl.Collator("en", { numeric: true });
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => (a === "") - (b === "") || direction * order.compare(a, b));
      body.append(...rows.map(([, row]) => row));
    };
    heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
      [key, direction] = key === i ? [i, -direction] : [i, 1];
      sort();
    }));
    search.addEventListener("input", filter);
    search.addEventListener("keydown", (e) => { if (e.key === "Enter") e.preventDefault(); });
    body.addEventListener("change", count);
    count(); filter(); // the browser may have kept words and ticks over a reload

    poll("/rows", LIST_EVERY, (text) => {
      const ticked = new Set(boxes().filter((b) => b.checked).map((b) => b.value));
      const at = document.activeElement, run = at?.closest("tr")?.dataset.run, tag = at?.tagName;
      body.innerHTML = text;
      for (const box of boxes()) box.checked = ticked.has(box.value) && !box.disabled;
      sort(); filter(); count();
      if (run !== undefined) [...body.rows].find((r) => r.dataset.run === run)?.querySelector(tag.toLowerCase())?.focus();
    });
  }

  function live() {
    const state = one("state"), bar = document.querySelector(".far progress");
    poll(one("live").dataset.address, RUN_EVERY, (text) => {
      const told = JSON.parse(text);
      if (told.state === "finished") { location.reload(); return "enough"; }
      state.textContent = told.state === "gone" ? "the folder is gone" : told.state;
      state.className = `state ${told.state}`;
      one("resume").hidden = told.state !== "stopped";
      if (told.state === "gone") return "enough";
      bar.max = told.total || 1;
      bar.value = told.done;
      one("count").textContent = told.count;
      one("what").textContent = told.what || "nothing yet";
    });
  }

  function comparison() {
    const against = one("against"), search = one("search"), sure = one("sure");
    against.querySelector("button").hidden = true;
    against.querySelector("select").addEventListener("change", () => against.submit());

    const rows = [...document.querySelectorAll("table.against tbody tr")];
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let head = null, shown = 0, all = 0;
      for (const row of rows) {
        if (row.classList.contains("probe")) { head = row; head.hidden = true; continue; }
        row.hidden = !(words.every((w) => row.dataset.search.includes(w)) && (!sure.checked || row.dataset.sure === "1"));
        all += 1;
        if (!row.hidden) { shown += 1; head.hidden = false; }
      }
      one("none").hidden = shown > 0;
      one("shown").textContent = `${shown} of ${all} rows`;
    };
    search.addEventListener("input", filter);
    sure.addEventListener("change", filter);
    filter();
    plot();
  }

  function plot() {
    const data = JSON.parse(one("points").textContent), tagged = data.runs.map((name, i) => `${i + 1} ${name}`);
    // All points of a run share its colour and symbol, which follow a name's place in `order` and come round again.
    let round = 1;
    while (round < 50 && window.cupel.colour(round) !== window.cupel.colour(0)) round += 1;
    const order = [];
    data.points.forEach((p, i) => { order[(p.run % round) + round * i] = p.name; });
    one("key").append(window.cupel.legend(tagged, tagged));
    const pick = { x: one("x"), y: one("y") }, log = { x: one("xlog"), y: one("ylog") };
    for (const axis of ["x", "y"]) data.axes.forEach((a, i) => pick[axis].add(new Option(a.name, i)));
    const find = (...wanted) => Math.max(0, ...wanted.map((w) => data.axes.findIndex((a) => a.reading === w)).filter((i) => i >= 0).slice(0, 1));
    const values = (i) => data.points.map((p) => p.cells[i]?.[0]).filter((v) => v !== undefined);

    const draw = () => {
      const points = data.points.filter((p) => p.cells[pick.x.value] && p.cells[pick.y.value])
        .map((p) => ({ name: p.name, x: p.cells[pick.x.value], y: p.cells[pick.y.value] }));
      window.cupel.pareto(one("pareto"), { x: data.axes[pick.x.value], y: data.axes[pick.y.value], points, order, xlog: log.x.checked, ylog: log.y.checked });
    };
    const choose = (axis) => {
      const i = pick[axis].value, possible = window.cupel.canLog(values(i));
      log[axis].disabled = !possible;
      log[axis].checked = possible && window.cupel.wantsLog(values(i), data.axes[i].unit);
    };
    if (!data.axes.length) return;
    pick.x.value = find("size_bytes", "operations");
    pick.y.value = find("robust_accuracy", "accuracy");
    for (const axis of ["x", "y"]) {
      choose(axis);
      pick[axis].addEventListener("change", () => { choose(axis); draw(); });
      log[axis].addEventListener("change", draw);
    }
    draw();
  }
})();
