"use strict";

(() => {
  const PAGE = 25;
  const LONG_TEXT = 480;
  const FREQUENT = 0.1;
  const FEW = 20;
  const { errors, instances, floor } = JSON.parse(document.getElementById("data").textContent);

  // Everything goes through textContent, never innerHTML: training texts may hold markup.
  function element(tag, className, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  const words = (text) => text.toLowerCase().match(/\p{L}[\p{L}\p{M}\p{N}'’-]*/gu) || [];

  // Words in nearly every text do not explain why two texts go together.
  const frequent = new Set();
  const counts = new Map();
  for (const [, , text] of instances) {
    for (const word of new Set(words(text || ""))) counts.set(word, (counts.get(word) || 0) + 1);
  }
  counts.forEach((count, word) => {
    if (count > FREQUENT * instances.length && instances.length >= FEW) frequent.add(word);
  });

  function marked(text, shared) {
    if (!shared) return [text];
    return text
      .split(/(\p{L}[\p{L}\p{M}\p{N}'’-]*)/u)
      .map((part) => (shared.has(part.toLowerCase()) ? element("mark", "", part) : part));
  }

  function picture(image, name, className) {
    const node = element("img", className);
    node.src = image;
    node.alt = name || "";
    return node;
  }

  function textBlock(text, shared) {
    if (text === null) return element("p", "text left-out", "text left out of this report");
    const block = element("p", "text", ...marked(text, shared));
    block.dir = "auto";
    if (text.length <= LONG_TEXT) return block;
    const more = element("button", "link", "show all");
    more.type = "button";
    more.setAttribute("aria-expanded", "false");
    const start = text.slice(0, LONG_TEXT).replace(/\s+\S{0,30}$/, "");
    block.replaceChildren(...marked(start, shared), " … ", more);
    more.addEventListener("click", () => block.replaceChildren(...marked(text, shared)));
    return block;
  }

  function figure(name, value, unit) {
    const shown = element("span", "value", value);
    if (unit) shown.append(" ", element("small", "", unit));
    return element("span", "figure-pair", element("span", "name", name), " ", shown);
  }

  function influential(error, item, tickAt, ...numbers) {
    const [id, label, text, image] = instances[item.instance];
    const bar = element("span", "bar", element("span", "fill"), element("span", "floor"));
    bar.setAttribute("aria-hidden", "true");
    bar.firstChild.style.width = `${item.bar}%`;
    bar.lastChild.style.left = `${tickAt}%`;
    return element(
      "li",
      item.noise ? "influential noise" : "influential",
      element(
        "div",
        "head",
        element("span", "score", item.score, " ", element("small", "", "nats")),
        element("span", "chip", label),
        element("code", "", id),
      ),
      bar,
      element("div", "numbers", ...numbers),
      image ? picture(image, text, "picture") : textBlock(text, shared(error)),
    );
  }

  function shared(error) {
    error.words ??= new Set(words(error.text || "").filter((word) => !frequent.has(word)));
    return error.words;
  }

  function byTurnover(error) {
    return (item) =>
      influential(
        error,
        item,
        item.error_at ?? error.floor_at,
        item.error ? figure("standard error", item.error, "nats") : null,
        figure("z", item.z),
        figure("q", item.q),
        item.noise ? element("span", "verdict", "not distinguishable from noise") : null,
      );
  }

  function byGram(error) {
    return (item) =>
      influential(error, item, item.error_at, figure("standard error", item.error, "nats"));
  }

  function column(kind, title, remark, items, shown) {
    const list = element("ol", "", ...items.map(shown));
    const heading = element("h3", kind, title, " ", element("small", "", remark));
    const body = items.length ? list : element("p", "empty", "None listed.");
    return element("div", `column ${kind}`, heading, body);
  }

  function columns(error, { helpful, harmful }, shown) {
    return element(
      "div",
      "columns",
      column("helpful", "Helpful", `to “${error.true}”`, helpful, shown),
      column("harmful", "Harmful", `pushed toward “${error.predicted}”`, harmful, shown),
    );
  }

  function key(tick) {
    return element("p", "key", `Bars show the size of a score; the tick on each bar marks ${tick}.`);
  }

  function fill(card, error) {
    const body = element(
      "div",
      "body",
      error.image ? picture(error.image, error.text, "picture") : textBlock(error.text),
    );
    if (error.gram) body.append(element("h3", "method", "By turn-over"));
    body.append(columns(error, error, byTurnover(error)), key(floor === "noise floor" ? "the noise floor" : "its standard error"));
    if (error.gram) {
      body.append(element("h3", "method", "By gram"));
      body.append(columns(error, error.gram, byGram(error)), key("its standard error"));
    }
    card.append(body);
  }

  function card(error) {
    let excerpt;
    if (error.image) {
      excerpt = element("span", "excerpt", picture(error.image, error.text, "small"));
    } else if (error.text === null) {
      excerpt = element("span", "excerpt left-out", "text left out of this report");
    } else {
      excerpt = element("span", "excerpt", error.text.slice(0, 400));
    }
    excerpt.dir = "auto";
    const labels = element(
      "span",
      "labels",
      element("span", "chip", "true: ", element("b", "", error.true)),
      element("span", "chip wrong", "predicted: ", element("b", "", error.predicted)),
      element("code", "", error.id),
    );
    const numbers = element(
      "span",
      "numbers",
      figure("confidence", error.confidence),
      figure("largest |z|", error.largest_z),
      figure("significant", error.significant),
      figure(floor, error.noise_floor, "nats"),
    );
    const node = element("details", "error", element("summary", "", labels, excerpt, numbers));
    if (!error.sort.significant) node.classList.add("quiet");
    node.addEventListener("toggle", () => {
      if (node.open && !node.querySelector(".body")) fill(node, error);
    });
    return node;
  }

  function listErrors() {
    const get = (id) => document.getElementById(id);
    const [search, sort, direction, only] = ["search", "sort", "direction", "only-significant"].map(get);
    const [list, shown, more] = ["list", "shown", "more"].map(get);
    const haystack = new Map(
      errors.map((e) => [e, [e.id, e.true, e.predicted, e.text || ""].join("\n").toLowerCase()]),
    );
    let found = [];

    function extend() {
      const from = list.children.length;
      list.append(...found.slice(from, from + PAGE).map(card));
      const count = list.children.length;
      more.hidden = count >= found.length;
      more.textContent = `Show more (${found.length - count} left)`;
      const total = errors.length === found.length ? "" : `, ${errors.length} in all`;
      shown.textContent = found.length
        ? `Showing ${count} of ${found.length} ${found.length === 1 ? "error" : "errors"}${total}`
        : "No error matches. Try a shorter search, or clear the filter.";
      return list.children[from];
    }

    function update() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const sign = direction.dataset.order === "descending" ? -1 : 1;
      // An undefined value is last in either order.
      const rank = (e) => e.sort[sort.value] ?? sign * Infinity;
      found = errors
        .filter((e) => !only.checked || e.sort.significant > 0)
        .filter((e) => words.every((word) => haystack.get(e).includes(word)))
        .map((e) => [rank(e), e])
        .sort(([a], [b]) => (a === b ? 0 : sign * (a - b)))
        .map(([, e]) => e);
      list.replaceChildren();
      extend();
    }

    search.addEventListener("input", update);
    sort.addEventListener("change", update);
    only.addEventListener("change", update);
    direction.addEventListener("click", () => {
      const descending = direction.dataset.order === "descending";
      direction.dataset.order = descending ? "ascending" : "descending";
      direction.textContent = descending ? "Low to high" : "High to low";
      update();
    });
    // The button may vanish with the last page, and focus with it.
    more.addEventListener("click", () => extend()?.querySelector("summary").focus());
    get("controls").addEventListener("submit", (event) => event.preventDefault());
    get("controls").hidden = false;
    update();
  }

  function sortRanking(table) {
    const headers = [...table.querySelectorAll("th[data-key]")];
    const body = table.tBodies[0];

    function order(header) {
      const key = header.dataset.key;
      // The first choice of a column brings what matters to the top: harmful, significant, memorized.
      const first = key === "self" ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const next = header.getAttribute("aria-sort") === first ? second : first;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const value = (row) => (key in row.dataset ? Number(row.dataset[key]) : sign * Infinity);
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => (a === b ? 0 : sign * (a - b)));
      body.append(...rows.map(([, row]) => row));
    }

    headers.forEach((header) => {
      header.querySelector("button").addEventListener("click", () => order(header));
    });
  }

  if (errors.length) listErrors();
  const ranking = document.getElementById("ranking");
  if (ranking) sortRanking(ranking);
})();
