// The scorecard page: reads the embedded data, fills the controls, and lets window.cupel draw.
(() => {
  const cupel = window.cupel, { el } = cupel, $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent), { variants, readings, baseline } = data;
  const MANY = 8, WIDE = 24, PAPER = 660, AT_FIRST = 6;
  const seeds = data.lacks.includes("values of single seeds") ? [] : data.seeds; // those whose values are here
  cupelTheme.button($("theme"));

  // the table
  $("lacks").hidden = !data.lacks.length;
  $("lacks").textContent = `Only in scorecard.json, to keep this page under 2 MB: ${data.lacks.join(", ")}.`;
  const said = (words) => { $("table-said").textContent = words; };
  const table = cupel.readings($("readings"), readings, variants, (words) => { said(words); $("unsorted").disabled = words.startsWith("In the order"); });
  cupel.page = { data, table };
  const fits = () => { const box = $("readings-box"); box.classList.remove("fits"); box.classList.toggle("fits", $("readings").scrollWidth <= box.clientWidth + 1 && !table.lying); };
  $("lying").checked = table.lying;
  $("lying").parentElement.hidden = variants.length > WIDE; // columns past counting help nobody
  $("find-variants-box").hidden = variants.length <= MANY;
  $("unsorted").addEventListener("click", () => table.unsort());
  $("find-readings").addEventListener("input", (e) => { table.find(e.target.value); fits(); });
  $("find-variants").addEventListener("input", (e) => { table.findVariants(e.target.value); fits(); });
  $("lying").addEventListener("change", (e) => { table.lie(e.target.checked); fits(); });
  $("halves").addEventListener("change", (e) => { table.halves(e.target.checked); fits(); });
  addEventListener("resize", fits);
  fits();

  // one reading, and one against another
  function fill(select, groups) {
    select.replaceChildren(...groups.map(([name, items]) => el("optgroup", { label: name }, items.map(([text, value]) => el("option", { value }, text)))));
  }
  const byProbe = [...d3.group(readings.map((r, i) => [r, i]), ([r]) => r.probe)].map(([probe, items]) => [probe, items.map(([r, i]) => [r.name, i])]);
  const varied = (r) => new Set(r.cells.map((c) => c && c[0])).size > 1;
  const first = (...names) => { for (const name of names) { const i = readings.findIndex((r) => r.name === name && varied(r)); if (i >= 0) return i; } return -1; };
  const values = (r) => r.cells.filter(Boolean).map((c) => c[0]);
  const cell = (r, v) => { const c = r.cells[v]; return c && (c.length === 1 ? Array(3 + seeds.length).fill(c[0]) : c); }; // [v]: all the same
  const axis = (r) => ({ name: r.name, unit: r.unit, better: r.better });
  /** A log box is open only where the axis can be logarithmic; `now` sets it to what suits the reading. */
  function logBox(box, r, now) { box.disabled = !cupel.canLog(values(r)); box.checked = now ? cupel.wantsLog(values(r), r.unit) : box.checked && !box.disabled; }

  function one(now) {
    const r = readings[$("one").value];
    logBox($("one-log"), r, now);
    cupel.intervals($("one-plot"), { reading: axis(r), points: variants.map((name, v) => ({ name, cell: cell(r, v) || [null] })), order: variants, baseline, seeds, log: $("one-log").checked });
  }
  function trade(now) {
    const x = readings[$("x").value], y = readings[$("y").value];
    logBox($("x-log"), x, now);
    logBox($("y-log"), y, now);
    const points = variants.map((name, v) => ({ name, x: cell(x, v), y: cell(y, v) })).filter((p) => p.x && p.y);
    cupel.pareto($("pareto"), { x: axis(x), y: axis(y), points, order: variants, baseline, xlog: $("x-log").checked, ylog: $("y-log").checked });
    if (!now || document.activeElement !== document.body) $("trade-said").textContent = `${y.name} against ${x.name}. ${$("pareto").querySelector(".note").textContent}`;
  }
  if (readings.length) {
    for (const id of ["one", "x", "y"]) fill($(id), byProbe);
    const size = Math.max(0, first("size (bytes)", "operations", "latency, batch of 1 (ms)")), quality = first("robust accuracy", "accuracy", "NDCG at 20");
    $("x").value = size;
    $("y").value = quality >= 0 ? quality : Math.min(readings.length - 1, size ? 0 : 1);
    $("one").value = Math.max(0, first("accuracy", "robust accuracy"));
    $("one").addEventListener("change", () => one(true));
    $("one-log").addEventListener("change", () => one(false));
    for (const id of ["x", "y"]) { $(id).addEventListener("change", () => trade(true)); $(`${id}-log`).addEventListener("change", () => trade(false)); }
    $("swap").addEventListener("click", () => { [$("x").value, $("y").value] = [$("y").value, $("x").value]; trade(true); });
    one(true);
    trade(true);
  } else {
    for (const id of ["one-title", "trade-title"]) $(id).parentElement.hidden = true;
  }

  // training curves and figures of the chosen variants
  const quantities = Object.keys(data.curves), chosen = new Set(variants.slice(0, AT_FIRST));
  $("curves-part").hidden = $("to-curves").hidden = !quantities.length;
  $("curve").append(...quantities.map((q) => el("option", {}, q)));
  $("curve").value = quantities.includes("loss") ? "loss" : quantities[0];
  function curves(now) {
    const steps = Object.entries(data.curves[$("curve").value] || {}), shown = variants.filter((v) => chosen.has(v));
    const all = steps.flatMap(([, by]) => Object.values(by).flatMap((s) => Object.values(s).flat())).map((p) => p[1]);
    $("curve-log").disabled = !cupel.canLog(all);
    $("curve-log").checked = now ? cupel.wantsLog(all, "") : $("curve-log").checked && !$("curve-log").disabled;
    const panels = steps.map(([step, by]) => ({ name: `step: ${step}`, series: shown.filter((v) => by[v]).flatMap((v) => Object.entries(by[v]).map(([seed, points]) => ({ group: v, name: `seed ${seed}`, points }))) })).filter((p) => p.series.length);
    if (!panels.length) return cupel.put($("curves"), el("p", { class: "note" }, "None of the chosen variants was trained."));
    return cupel.lines($("curves"), { panels, x: { name: "epoch", whole: true }, y: { name: $("curve").value, log: $("curve-log").checked }, order: variants, title: `${$("curve").value} in training`, note: "One line for each seed." });
  }

  const slug = (name) => `probe-${name.replace(/[^\w-]/g, "_")}`;
  const groups = [...d3.group(data.figures, (f) => f.probe)];
  function figures() {
    const shown = variants.filter((v) => chosen.has(v));
    cupel.forget($("figures"));
    $("figures").replaceChildren(...groups.map(([probe, found]) => el("section", { class: "probe-figures", "aria-labelledby": slug(probe) }, el("h3", { id: slug(probe) }, probe),
      found.map((f) => el("section", {}, el("h4", {}, f.name), cupel.figureOf(f, shown, variants))))));
    $("chosen").textContent = `${shown.length} of ${variants.length}`;
  }
  $("figures-part").hidden = $("to-figures").hidden = !groups.length;
  $("probes").append(el("ul", {}, groups.map(([probe]) => el("li", {}, el("a", { href: `#${slug(probe)}` }, probe)))));
  $("figures-said").textContent = `Drawn from the first seed (${data.seeds[0]}).` + (data.left_out ? ` ${data.left_out} figures of the later variants are only in scorecard.json, to keep this page under 2 MB.` : "");
  $("choices").append(...variants.map((name) => el("label", { class: "check" }, el("input", { type: "checkbox", value: name, checked: chosen.has(name) }), ` ${name}`)));
  $("choices").addEventListener("change", (e) => { chosen[e.target.checked ? "add" : "delete"](e.target.value); curves(false); figures(); });
  $("find-chosen").addEventListener("input", (e) => { for (const label of $("choices").querySelectorAll("label")) label.hidden = !label.textContent.toLowerCase().includes(e.target.value.toLowerCase()); });
  $("curve").addEventListener("change", () => curves(true));
  $("curve-log").addEventListener("change", () => curves(false));
  if (quantities.length) curves(true);
  figures();

  // copying and printing
  $("copy").addEventListener("click", async () => {
    const text = $("recipe").textContent;
    try {
      await navigator.clipboard.writeText(text);
      $("copied").textContent = "Copied.";
    } catch { // a page on file:// may not write to the clipboard: select the text, so that one key copies it
      getSelection().selectAllChildren($("recipe"));
      $("copied").textContent = "Selected: press Ctrl+C.";
    }
  });
  let slices = null, opened = [];
  addEventListener("beforeprint", () => {
    cupel.drawAll(PAPER);
    opened = [...document.querySelectorAll("main details:not([open], .numbers, .chooser)")];
    for (const d of opened) d.open = true;
    slices = cupel.sliced($("readings"));
    if (slices) { $("readings-box").after(slices); $("readings-box").classList.add("no-print"); }
  });
  addEventListener("afterprint", () => { for (const d of opened) d.open = false; slices?.remove(); slices = null; $("readings-box").classList.remove("no-print"); cupel.fit(); });
  document.documentElement.classList.add("drawn");
})();
