"use strict";
// Filters, sorting and the number of uses. All state lives in the URL's hash, so that a view can be linked to.
document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("filters");
  const selects = [...form.querySelectorAll("select")];
  const filters = selects.filter((select) => select.name !== "order");
  const uses = [...form.querySelectorAll("input[name=uses]")];
  const tables = [...document.querySelectorAll("table.board")];
  const sections = [...document.querySelectorAll("#sections > section")];
  const drawn = [...document.querySelectorAll("[data-rows]")].map((mark) => [mark, mark.dataset.rows.split(" ")]);
  const sorting = { sort: null, published: null }; // by kind of table: key and direction
  const original = new Map(tables.map((table) => [table, [...table.tBodies]]));

  const chosen = () => uses.find((input) => input.checked).value;

  function filter() {
    const wanted = filters.filter((select) => select.value);
    const hidden = new Set();
    let shown = 0;
    let total = 0;
    for (const table of tables) {
      const measured = table.dataset.state === "sort";
      for (const body of original.get(table)) {
        // A published number has no track or protocol; those filters leave it alone.
        body.hidden = !wanted.every((select) => (body.dataset[select.name] ?? select.value) === select.value);
        if (body.hidden && body.id) hidden.add(body.id);
        total += measured;
        shown += measured && !body.hidden;
      }
      table.closest("section").hidden = original.get(table).every((body) => body.hidden);
    }
    for (const [mark, rows] of drawn) mark.toggleAttribute("hidden", rows.every((row) => hidden.has(row)));
    for (const section of sections) {
      const bodies = [...section.querySelectorAll("tbody[id]")].filter((body) => !body.hidden);
      for (const item of section.querySelectorAll(".legend [data-method]"))
        item.hidden = !bodies.some((body) => body.dataset.method === item.dataset.method);
    }
    document.getElementById("count").value = shown === total ? `${total} rows` : `${shown} of ${total} rows`;
    document.getElementById("nothing").hidden = shown > 0 || total === 0;
  }

  function order() {
    const first = form.elements.order.value === "protocol" ? "protocol" : "dataset";
    const key = (section) => [section.dataset[first], section.dataset.dataset, section.dataset.protocol];
    const compare = (a, b) => key(a).map((part, i) => part.localeCompare(key(b)[i])).find(Boolean) ?? 0;
    const parent = document.getElementById("sections");
    sections.sort(compare).forEach((section) => parent.append(section));
  }

  function sort() {
    for (const table of tables) {
      const wanted = sorting[table.dataset.state];
      const heads = [...table.tHead.rows[0].cells];
      let bodies = original.get(table);
      for (const head of heads) {
        const button = head.querySelector("button");
        const active = button && wanted && button.dataset.key === wanted.key;
        if (active) head.setAttribute("aria-sort", wanted.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
        if (active) bodies = sorted(bodies, head.cellIndex, "numeric" in button.dataset, wanted.down ? -1 : 1);
      }
      bodies.forEach((body) => table.append(body));
    }
  }

  function sorted(bodies, column, numeric, sign) {
    const value = (body) => {
      const data = body.rows[0].cells[column].dataset;
      return data[`sort${chosen()}`] ?? data.sort;
    };
    const compare = (a, b) => (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    return bodies
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

  function save() {
    const state = new URLSearchParams();
    for (const select of selects) if (select.value) state.set(select.name, select.value);
    if (chosen() !== uses[0].value) state.set("uses", chosen());
    for (const [name, by] of Object.entries(sorting)) if (by) state.set(name, `${by.key}:${by.down ? "desc" : "asc"}`);
    const text = state.toString();
    history.replaceState(null, "", text ? `#${text}` : location.pathname);
  }

  function restore() {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return; // a link to a row or a section
    const state = new URLSearchParams(hash);
    for (const select of selects) {
      const value = state.get(select.name) ?? "";
      select.value = [...select.options].some((option) => option.value === value) ? value : "";
    }
    for (const input of uses) input.checked = input.value === (state.get("uses") ?? uses[0].value);
    if (!uses.some((input) => input.checked)) uses[0].checked = true;
    for (const name of Object.keys(sorting)) {
      const [key, direction] = (state.get(name) ?? "").split(":");
      sorting[name] = key ? { key, down: direction === "desc" } : null;
    }
    show();
  }

  function show() {
    order();
    sort();
    share();
    filter();
  }

  form.addEventListener("change", () => {
    show();
    save();
  });
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
      save();
    });
  window.addEventListener("hashchange", restore);
  show();
  restore();
});
