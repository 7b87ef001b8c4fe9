"use strict";
// Filters, search, sorting, the number of uses, the compared sets. All state lives in the URL's hash, so that a view can be linked to.
document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  const byId = (id) => document.getElementById(id);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const narrow = matchMedia("(max-width: 60rem)").matches;
  const LIMITS = { rank: 5, cells: narrow ? Infinity : 8, rows: narrow ? 3 : 12 }; // shown before "show all"

  const form = byId("filters");
  const search = form.elements.q;
  const orderBy = form.elements.order;
  const choices = all(".choice", form);
  const uses = all("input[name=uses]", form);
  const tables = all("table.board");
  const sections = all("#sections > section");
  const drawn = all("[data-rows]").map((mark) => [mark, mark.dataset.rows.split(" ")]);
  const sorting = { sort: null, published: null }; // by kind of table: key and direction
  const original = new Map(tables.map((table) => [table, [...table.tBodies]]));
  const bodies = [...original.values()].flat();
  const measured = bodies.filter((body) => body.id);
  const byRow = new Map(measured.map((body) => [body.id, body]));
  const facts = new Map(measured.map((body) => [body, JSON.parse(body.dataset.facts)]));
  const texts = new Map(bodies.map((body) => [body, `${body.rows[0].textContent} ${body.dataset.search ?? ""}`.toLowerCase()]));
  const ranks = all("#ranking .cell").map((cell) => [cell, all("li", cell)]);
  const opened = new Set(); // lists of which all is shown
  const pair = byId("compare") && all("select", byId("compare")); // A and B

  const chosen = () => uses.find((input) => input.checked).value;
  const words = () => search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const checked = (choice) => all("input:checked", choice).map((input) => input.value);

  function element(tag, text = "", attributes = {}) {
    const made = document.createElement(tag);
    made.textContent = text; // never markup: texts come from records
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // -- filters ------------------------------------------------------------------------------------------------------

  // Whether a row passes one choice. A published number has no labels or protocol; those choices leave it alone.
  const passes = (body, name, values) =>
    values.length === 0 || !(name in body.dataset) || values.includes(body.dataset[name]);

  function filter() {
    const wanted = choices.map((choice) => [choice.dataset.name, checked(choice)]);
    const sought = words();
    const found = (body) => sought.every((word) => texts.get(body).includes(word));
    for (const body of bodies) body.hidden = !(found(body) && wanted.every(([name, values]) => passes(body, name, values)));
    mark_empty(wanted, bodies.filter(found));
    const hidden = new Set(measured.filter((body) => body.hidden).map((body) => body.id));
    for (const table of tables) {
      const rows = [...table.tBodies].filter((body) => !body.hidden);
      table.closest("section").hidden = rows.length === 0;
      limit(rows, LIMITS.rows, table.parentElement.querySelector(":scope > .all"), "rows");
    }
    for (const [mark, rows] of drawn) mark.toggleAttribute("hidden", rows.every((row) => hidden.has(row)));
    for (const section of sections) {
      const methods = new Set(all("tbody[id]", section).filter((body) => !body.hidden).map((body) => body.dataset.method));
      for (const item of all(".legend [data-method]", section)) item.hidden = !methods.has(item.dataset.method);
    }
    rank(hidden);
    const shown = measured.length - hidden.size;
    byId("count").value = shown === measured.length ? `${shown} rows` : `${shown} of ${measured.length} rows`;
    byId("nothing").hidden = shown > 0 || measured.length === 0;
    const quoted = byId("quoted-count");
    if (quoted) quoted.textContent = bodies.filter((body) => !body.id && !body.hidden).length;
  }

  // The number of measured rows that each option would leave; an option that leaves nothing at all is disabled.
  function mark_empty(wanted, found) {
    for (const choice of choices) {
      const name = choice.dataset.name;
      const others = wanted.filter(([other]) => other !== name);
      const left = found.filter((body) => others.every(([other, values]) => passes(body, other, values)));
      const counts = { measured: {}, published: {} };
      for (const body of left) {
        const kind = counts[body.id ? "measured" : "published"];
        const value = body.dataset[name];
        if (value !== undefined) kind[value] = (kind[value] ?? 0) + 1;
      }
      for (const input of all("input", choice)) {
        const rows = counts.measured[input.value] ?? 0;
        const quoted = counts.published[input.value] ?? 0;
        input.disabled = !input.checked && rows + quoted === 0;
        input.parentElement.classList.toggle("empty", rows + quoted === 0);
        input.parentElement.querySelector("small").textContent = rows || !quoted ? rows : `${quoted} published`;
      }
      const values = checked(choice);
      choice.querySelector("summary b").textContent = values.length === 0 ? "" : values.length === 1 ? values[0] : values.length;
      choice.classList.toggle("active", values.length > 0);
    }
  }

  // Shows the first of several elements, and all of them once the button was pressed.
  function limit(elements, count, button, what) {
    const open = opened.has(button) || elements.length <= count + 1;
    elements.forEach((item, i) => item.classList.toggle("beyond", !open && i >= count));
    button.hidden = open;
    button.textContent = `Show all ${elements.length} ${what}`;
  }

  function rank(hidden) {
    const left = [];
    for (const [cell, items] of ranks) {
      for (const item of items) item.hidden = hidden.has(item.dataset.row);
      const shown = items.filter((item) => !item.hidden);
      const low = shown.length ? facts.get(byRow.get(shown[0].dataset.row)).csv.ci95_low : null;
      shown.forEach((item, i) => {
        const high = facts.get(byRow.get(item.dataset.row)).csv.ci95_high;
        item.querySelector(".near").textContent = i > 0 && low !== null && high !== null && high >= low ? "≈" : "";
      });
      limit(shown, LIMITS.rank, cell.querySelector(".all"), "sets");
      cell.hidden = shown.length < 2;
      if (!cell.hidden) left.push(cell);
    }
    if (!ranks.length) return;
    byId("ranking").hidden = left.length === 0;
    limit(left, LIMITS.cells, byId("more-cells"), "rankings");
  }

  function order() {
    const first = orderBy.value === "protocol" ? "protocol" : "dataset";
    const key = (section) => [section.dataset[first], section.dataset.dataset, section.dataset.protocol];
    const compare = (a, b) => key(a).map((part, i) => part.localeCompare(key(b)[i])).find(Boolean) ?? 0;
    sections.sort(compare).forEach((section) => byId("sections").append(section));
  }

  function sort() {
    for (const table of tables) {
      const wanted = sorting[table.dataset.state];
      let rows = original.get(table);
      for (const head of table.tHead.rows[0].cells) {
        const button = head.querySelector("button");
        const active = button && wanted && button.dataset.key === wanted.key;
        if (active) head.setAttribute("aria-sort", wanted.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
        if (active) rows = sorted(rows, head.cellIndex, "numeric" in button.dataset, wanted.down ? -1 : 1);
      }
      rows.forEach((body) => table.append(body));
    }
  }

  function sorted(rows, column, numeric, sign) {
    const value = (body) => {
      const data = body.rows[0].cells[column].dataset;
      return data[`sort${chosen()}`] ?? data.sort;
    };
    const compare = (a, b) => (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    return rows
      .map((body) => [value(body), body])
      .sort(([a], [b]) => (a === "") - (b === "") || (a === "" ? 0 : sign * compare(a, b))) // what is unknown comes last
      .map(([, body]) => body);
  }

  function share() {
    const count = chosen();
    document.documentElement.dataset.uses = count;
    for (const [mark] of drawn) {
      const x = mark.getAttribute(`data-x${count}`);
      if (x !== null) mark.setAttribute("transform", `translate(${x} ${mark.dataset.y})`);
    }
  }

  // -- CSV of the rows that the filters leave, in the order of the page ------------------------------------------------

  function field(value) {
    if (value === null || typeof value === "number" || typeof value === "boolean") return String(value ?? "");
    const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value; // a spreadsheet would run it as a formula
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function csv() {
    const rows = all("#sections tbody[id]").filter((body) => !body.hidden).map((body) => facts.get(body).csv);
    return [Object.keys(rows[0] ?? {}), ...rows.map(Object.values)].map((row) => `${row.map(field).join(",")}\n`).join("");
  }

  byId("download").addEventListener("click", () => {
    const link = element("a", "", { download: "condense-leaderboard.csv" });
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  // -- two sets or methods side by side --------------------------------------------------------------------------------

  const rowsOf = (key) => measured.filter((body) => key === (key.startsWith("m:") ? `m:${body.dataset.method}` : `s:${body.dataset.set}`));

  function offer() {
    for (const select of pair) {
      const methods = element("optgroup", "", { label: "methods" });
      for (const name of [...new Set(measured.map((body) => body.dataset.method))].sort())
        methods.append(element("option", name, { value: `m:${name}` }));
      select.append(methods);
      for (const section of all("#sections > section")) {
        const group = element("optgroup", "", { label: `${section.dataset.dataset}, ${section.dataset.protocol}` });
        const sets = new Map(all("tbody[id]", section).map((body) => [body.dataset.set, facts.get(body).name]).reverse());
        for (const [set, name] of [...sets].reverse()) group.append(element("option", name, { value: `s:${set}` }));
        select.append(group);
      }
    }
  }

  function table(heads, rows) {
    const made = element("table", "", { class: heads.length > 4 ? "sides many" : "sides" });
    const head = made.createTHead().insertRow();
    for (const text of heads) head.append(element("th", text, { scope: "col" }));
    const body = made.createTBody();
    for (const [first, ...others] of rows) {
      const row = body.insertRow();
      const name = element("th", typeof first === "string" ? first : "", { scope: "row" });
      if (typeof first !== "string") name.append(first);
      row.append(name);
      if (others.length === 0) {
        name.colSpan = heads.length; // a heading of the rows below
        name.scope = "rowgroup";
        row.className = "group";
      }
      others.forEach((text, i) => row.append(element("td", text, { "data-label": heads[i + 1] })));
    }
    const box = element("div", "", { class: "box", tabindex: "0", role: "region", "aria-label": "Comparison" });
    box.append(made);
    return box;
  }

  function pictures(sides) {
    const made = element("div", "", { class: "pictures" });
    for (const [letter, row] of sides) {
      const { name, picture, href } = facts.get(row);
      const figure = element("figure");
      if (picture) {
        const [source, width, height] = picture;
        figure.append(element("img", "", { src: source, width, height, alt: `Images of ${name}` }));
      } else figure.append(element("p", "no picture", { class: "none" }));
      const caption = element("figcaption", `${letter}: ${name}, ${row.dataset.dataset} `);
      caption.append(element("a", "row", { href: `#${row.id}` }), " ", element("a", "record", { href }));
      figure.append(caption);
      made.append(figure);
    }
    return made;
  }

  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(1)}`;
  const ratio = (a, b) => (a > 0 && b > 0 ? `× ${(b / a).toPrecision(2) * 1}` : "–");
  const seconds = (row) => facts.get(row).csv[`seconds_total_${chosen()}`];
  const time = (row) => facts.get(row).row[`time to make and train, shared by ${chosen()}`];

  function sets(a, b) {
    const [left, right] = [facts.get(a[0]), facts.get(b[0])];
    const rows = [];
    const key = (row) => row.dataset.network;
    const total = `shared by ${chosen()}`;
    for (const network of new Set([...a, ...b].map(key))) {
      const [one, two] = [a, b].map((side) => side.find((row) => key(row) === network));
      rows.push([`on ${network}`]);
      for (const name of Object.keys(left.row)) {
        if (name.includes("shared by") && !name.endsWith(total)) continue;
        const values = [one, two].map((row) => (row ? facts.get(row).row[name] : "not judged"));
        let gap = "";
        if (one && two && name === "accuracy, %") gap = signed(facts.get(two).csv.accuracy - facts.get(one).csv.accuracy);
        if (one && two && name.endsWith(total)) gap = ratio(seconds(one), seconds(two));
        rows.push([name, ...values, gap]);
      }
    }
    rows.push(["the set"]);
    for (const name of Object.keys(left.set)) {
      let gap = "";
      if (name === "bytes") gap = ratio(left.csv.bytes_total, right.csv.bytes_total);
      if (name === "time to make") gap = ratio(left.csv.seconds_made, right.csv.seconds_made);
      rows.push([name, left.set[name], right.set[name], gap]);
    }
    const made = [pictures([["A", a[0]], ["B", b[0]]])];
    const alike = ["judged on", "protocol"].every((name) => left.set[name] === right.set[name]);
    if (!alike) made.push(element("p", "Judged on other data or under another protocol: their accuracies cannot be compared.", { class: "warn" }));
    else if (a[0].dataset.ipc !== b[0].dataset.ipc) made.push(element("p", "They have different numbers of images per class.", { class: "about" }));
    made.push(table(["", "A", "B", "B to A"], rows));
    return made;
  }

  function methods(a, b, names) {
    // Never chosen by accuracy, which would favour the method with more sets.
    const apartBy = (x, y) => x.name.length - y.name.length || (x.csv.seed ?? 0) - (y.csv.seed ?? 0) || (x.csv.set > y.csv.set) - (x.csv.set < y.csv.set);
    const first = (rows) => [...rows].sort((x, y) => apartBy(facts.get(x), facts.get(y)))[0];
    const cells = [...new Set(a.map((row) => row.dataset.cell))].filter((cell) => b.some((row) => row.dataset.cell === cell));
    if (cells.length === 0)
      return [element("p", "No cell has both: same data, protocol, images per class and network.", { class: "none" })];
    const couples = cells.map((cell) => [a, b].map((side) => first(side.filter((row) => row.dataset.cell === cell))));
    const gap = ([x, y]) => facts.get(y).csv.accuracy - facts.get(x).csv.accuracy;
    const ahead = couples.filter((couple) => gap(couple) > 0).length;
    const apart = couples.filter(([x, y]) => {
      const [one, two] = [facts.get(x).csv, facts.get(y).csv];
      return one.ci95_low !== null && two.ci95_low !== null && (one.ci95_high < two.ci95_low || two.ci95_high < one.ci95_low);
    }).length;
    const rows = couples.map((couple) => {
      const [x, y] = couple;
      const link = element("a", `${x.dataset.dataset}, ${x.dataset.protocol}, IPC ${x.dataset.ipc}, ${x.dataset.network}`, { href: `#${x.id}` });
      const accuracy = (row) => facts.get(row).row["accuracy, %"];
      const bytes = (row) => facts.get(row).set.bytes;
      return [link, accuracy(x), accuracy(y), signed(gap(couple)), bytes(x), bytes(y), time(x), time(y)];
    });
    const cellsText = `${couples.length} cell${couples.length > 1 ? "s" : ""}`;
    const text = `B (${names[1]}) is ahead of A (${names[0]}) in ${ahead} of ${cellsText} that both have; in ${apart} their 95 % intervals lie apart. Of several sets of a method in a cell, the one with the shortest name and the lowest seed is taken.`;
    const heads = ["cell", "A, %", "B, %", "B − A, points", "A, bytes", "B, bytes", "A, time", "B, time"];
    return [element("p", text, { class: "about" }), table(heads, rows), pictures([["A", couples[0][0]], ["B", couples[0][1]]])];
  }

  function compare() {
    if (!pair) return;
    const keys = pair.map((select) => select.value);
    const [a, b] = keys.map((key) => (key ? rowsOf(key) : []));
    const names = keys.map((key) => (key.startsWith("m:") ? key.slice(2) : key ? facts.get(rowsOf(key)[0]).name : ""));
    const both = a.length > 0 && b.length > 0;
    const view = !both ? [] : keys.every((key) => key.startsWith("s:")) ? sets(a, b) : methods(a, b, names);
    byId("pair").replaceChildren(...view);
    for (const body of measured)
      body.querySelector(".pick").setAttribute("aria-pressed", keys.includes(`s:${body.dataset.set}`));
    const count = keys.filter(Boolean).length;
    byId("picked").hidden = count === 0;
    byId("picked").textContent = count === 2 ? "compare: A and B" : `compare: ${keys[0] ? "A" : "B"} chosen`;
  }

  function pick(key) {
    const keys = pair.map((select) => select.value);
    const at = keys.indexOf(key);
    if (at >= 0) pair[at].value = "";
    else pair[keys[0] === "" ? 0 : 1].value = key;
    compare();
    save();
    if (at < 0 && pair.every((select) => select.value)) byId("compare").scrollIntoView();
  }

  // -- state ---------------------------------------------------------------------------------------------------------

  function save() {
    const state = new URLSearchParams();
    if (search.value) state.set("q", search.value);
    for (const choice of choices) for (const value of checked(choice)) state.append(choice.dataset.name, value);
    if (orderBy.value) state.set("order", orderBy.value);
    if (chosen() !== uses[0].value) state.set("uses", chosen());
    for (const [name, by] of Object.entries(sorting)) if (by) state.set(name, `${by.key}:${by.down ? "desc" : "asc"}`);
    for (const select of pair ?? []) if (select.value) state.set(select.name, select.value);
    const text = state.toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname);
  }

  function restore() {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return reveal(hash); // a link to a row or a section
    const state = new URLSearchParams(hash);
    search.value = state.get("q") ?? "";
    for (const choice of choices) {
      const values = state.getAll(choice.dataset.name);
      for (const input of all("input", choice)) input.checked = values.includes(input.value);
    }
    const has = (select, value) => [...select.options].some((option) => option.value === value);
    for (const select of [orderBy, ...(pair ?? [])]) {
      const value = state.get(select.name) ?? "";
      select.value = has(select, value) ? value : "";
    }
    for (const input of uses) input.checked = input.value === (state.get("uses") ?? uses[0].value);
    if (!uses.some((input) => input.checked)) uses[0].checked = true;
    for (const name of Object.keys(sorting)) {
      const [key, direction] = (state.get(name) ?? "").split(":");
      sorting[name] = key ? { key, down: direction === "desc" } : null;
    }
    show();
  }

  // Opens what a linked element lies in, so that it can be seen.
  function reveal(id) {
    const target = byId(id);
    if (!target) return;
    const list = target.closest("#sections > section, #quoted")?.querySelector(":scope > .all");
    if (target.classList.contains("beyond") && list) {
      opened.add(list);
      filter();
    }
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    if (id === "published") byId("quoted").open = true;
    target.scrollIntoView();
  }

  function show() {
    order();
    sort();
    share();
    filter();
    compare();
  }

  const changed = () => {
    show();
    save();
  };
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    history.replaceState(null, "", location.pathname);
    restore();
  });
  for (const table of tables)
    table.tHead.addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (!button) return;
      const { key, first } = button.dataset;
      const now = sorting[table.dataset.state];
      sorting[table.dataset.state] = { key, down: now?.key === key ? !now.down : first === "desc" };
      sort();
      filter();
      save();
    });
  document.addEventListener("click", ({ target }) => {
    const more = target.closest("button.all");
    if (more) {
      opened.add(more);
      filter();
    }
    const button = target.closest(".pick");
    if (button) pick(`s:${button.closest("tbody").dataset.set}`);
    const link = target.closest('a[href^="#"]');
    if (link) setTimeout(() => reveal(location.hash.slice(1))); // also where the hash is already that one
    for (const choice of choices) if (!choice.contains(target)) choice.open = false;
  });
  document.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape") return;
    const open = choices.find((choice) => choice.open);
    if (!open) return;
    open.open = false;
    open.querySelector("summary").focus();
  });
  if (pair) {
    const parts = byId("compare").querySelector("form");
    parts.addEventListener("change", changed);
    parts.addEventListener("submit", (event) => event.preventDefault());
    parts.addEventListener("reset", () => setTimeout(changed));
    byId("swap").addEventListener("click", () => {
      [pair[0].value, pair[1].value] = [pair[1].value, pair[0].value];
      changed();
    });
  }
  if (narrow) for (const part of all("#filters .tools, #sections .fold")) part.open = false;
  // Linked rows must not lie under the bar of filters where it sticks to the top.
  const bar = () => document.documentElement.style.setProperty("--bar", getComputedStyle(form).position === "sticky" ? `${form.offsetHeight}px` : "0px");
  new ResizeObserver(bar).observe(form);
  window.addEventListener("hashchange", restore);
  order();
  if (pair) offer();
  bar();
  show();
  restore();
});
