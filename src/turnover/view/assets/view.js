// The page: routes, lists, keys and decisions. Numbers come from the server on demand.

import { cleaning } from "./cleaning.js";
import { count, counted, element, link } from "./elements.js";
import {
  errorEntry, errorNumbers, fillBadge, fillError, fillInstance, instanceEntry, instanceWhat,
} from "./panes.js";

const get = (id) => document.getElementById(id);
const TYPING_MS = 80;
const FIRST_INSTANCES = 10;
const FIRST_ERRORS = 6;
const MORE = 40;

const run = { decisions: new Map() };
const shown = { list: null, error: null, instance: null };
const view = { by: "turnover", label: "", errors: FIRST_INSTANCES, instances: FIRST_ERRORS };
let redecide = () => {};
const cleaner = cleaning(run, { ask, put, route, what: (one) => instanceWhat(run, one) });

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is `turnover view` still running?");
  }
  const answer = await response.json().catch(() => ({ error: `the server failed (${response.status})` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function complain(error) {
  if (error.name === "AbortError") return;
  get("alert").textContent = error.message;
  get("alert").hidden = false;
}

const calm = () => {
  get("alert").hidden = true;
};

// A new question for a part of the page cancels the one before.
const asked = new Map();
async function asking(part, path) {
  asked.get(part)?.abort();
  const control = new AbortController();
  asked.set(part, control);
  get(part).setAttribute("aria-busy", "true");
  try {
    const answer = await ask(path, { signal: control.signal });
    if (control.signal.aborted) throw new DOMException("", "AbortError");
    calm();
    return answer;
  } finally {
    if (asked.get(part) === control) get(part).removeAttribute("aria-busy");
  }
}

// Routes: #/errors, #/errors/3, #/errors/3/train/17, #/train, #/train/17.
function route() {
  const [list, first, , second] = location.hash.slice(2).split("/");
  const number = (text) => (/^\d+$/.test(text ?? "") ? Number(text) : null);
  if (list === "train") return { list, error: null, instance: number(first) };
  const error = number(first);
  return { list: "errors", error, instance: error === null ? null : number(second) };
}

function filterQuery(form, start) {
  const query = new URLSearchParams(new FormData(form));
  for (const name of ["low", "high"]) {
    if (!query.has(name)) continue;
    const value = form.elements[name].valueAsNumber;
    query.set(name, String((Number.isFinite(value) ? value : name === "low" ? 0 : 100) / 100));
  }
  query.set("start", String(start));
  return query;
}

function entry(list, one) {
  const isError = list === "errors";
  const href = isError ? `#/errors/${one.error}` : `#/train/${one.row}`;
  const inside = isError ? [errorEntry(run, one), errorNumbers(one)] : instanceEntry(run, one);
  const quiet = isError && !one.significant;
  return element("li", quiet ? "quiet" : "", link("entry", href, ...inside));
}

async function fillList(start = 0) {
  const { list } = route();
  const form = get(`${list}-filter`);
  const { found, items } = await asking("list-pane", `${list}?${filterQuery(form, start)}`);
  const entries = items.map((one) => entry(list, one));
  if (start) get("entries").append(...entries);
  else get("entries").replaceChildren(...entries);
  const listed = get("entries").children.length;
  const what = list === "errors" ? ["error", "errors"] : ["training instance", "training instances"];
  const all = list === "errors" ? run.errors : run.training;
  get("found").textContent = found
    ? `${count(listed)} of ${counted(found, ...what)}${found < all ? ` (${count(all)} in all)` : ""}`
    : "No entry matches the filter.";
  get("more").hidden = listed >= found;
  get("list-pane").dataset.shown = `${list} ${found}`;
  markCurrent();
  return entries[0];
}

function markCurrent() {
  const { list, error, instance } = route();
  const current = new Set([`#/${list}`, `#/errors/${error}`, `#/train/${instance}`]);
  if (list === "errors") current.delete(`#/train/${instance}`);
  current.add(`#/errors/${error}/train/${instance}`);
  for (const node of document.querySelectorAll("a.entry, nav a")) {
    // In an instance's pane the link to the open error is marked as current.
    if (current.has(node.getAttribute("href"))) node.setAttribute("aria-current", "true");
    else node.removeAttribute("aria-current");
  }
}

async function showError(number) {
  const query = new URLSearchParams({ by: view.by, label: view.label, top: view.errors });
  const error = await asking("error-pane", `errors/${number}?${query}`);
  const focused = document.activeElement?.dataset?.name;
  fillError(get("error-pane"), run, error, view, {
    change: (change) => {
      Object.assign(view, change);
      showError(number).catch(complain);
    },
    more: () => extend("error-pane", () => showError(number), () => (view.errors += MORE)),
  });
  get("error-pane").dataset.shown = String(number);
  if (focused) get("error-pane").querySelector(`[data-name="${focused}"]`)?.focus();
  markCurrent();
}

async function showInstance(row) {
  const instance = await asking("instance-pane", `train/${row}?top=${view.instances}`);
  const { list, error } = route();
  const back = list === "errors" ? `#/errors/${error}` : "#/train";
  fillInstance(get("instance-pane"), run, instance, back, {
    decide: cleaner.decide,
    onDecision: (change) => {
      redecide = change;
      change();
    },
    more: () => extend("instance-pane", () => showInstance(row), () => (view.instances += MORE)),
  });
  get("instance-pane").dataset.shown = String(row);
  cleaner.see(instance);
  markCurrent();
}

// The button disappears with its list; focus moves to the first new entry.
async function extend(pane, again, grow) {
  const before = get(pane).querySelectorAll(".helpful .entry").length;
  grow();
  try {
    await again();
    const entries = get(pane).querySelectorAll(".helpful .entry");
    (entries[before] ?? get(pane).querySelector("h2")).focus();
  } catch (error) {
    complain(error);
  }
}

async function put(row, decision) {
  let saved = false;
  try {
    const { decisions } = await ask(`train/${row}/decision`, {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ decision }),
    });
    calm();
    takeDecisions(decisions);
    saved = true;
  } catch (error) {
    complain(error);
  }
  redecide();
  return saved;
}

function takeDecisions(decisions) {
  run.decisions = new Map(decisions);
  const made = run.decisions.size;
  get("count").textContent = count(made);
  get("counted").textContent = made === 1 ? " decision" : " decisions";
  get("export").setAttribute("aria-label", `Export ${counted(made, "decision", "decisions")}`);
  get("export").hidden = !made;
  for (const node of document.querySelectorAll(".badge")) fillBadge(run, node);
}

async function go(moved) {
  const wanted = route();
  const before = { ...shown };
  Object.assign(shown, wanted);
  const depth = wanted.instance !== null ? "instance" : wanted.error !== null ? "error" : "list";
  document.body.dataset.depth = depth;
  document.body.dataset.list = wanted.list;
  get("error-pane").hidden = wanted.error === null;
  get("instance-pane").hidden = wanted.instance === null;
  get("hint").hidden = depth !== "list";
  const tasks = [];
  if (wanted.list !== before.list) {
    for (const list of ["errors", "train"]) get(`${list}-filter`).hidden = list !== wanted.list;
    get("cleaning").hidden = wanted.list !== "train";
    get("list-pane").setAttribute("aria-label", wanted.list === "errors" ? "Errors" : "Training instances");
    tasks.push(fillList());
  }
  if (wanted.error !== null && wanted.error !== before.error) {
    view.errors = FIRST_INSTANCES;
    tasks.push(showError(wanted.error));
  }
  const other = wanted.instance !== before.instance || wanted.list !== before.list;
  if (wanted.instance !== null && other) {
    if (wanted.instance !== before.instance) view.instances = FIRST_ERRORS;
    tasks.push(showInstance(wanted.instance));
  }
  markCurrent();
  if (moved) restoreFocus(before, wanted);
  await Promise.all(tasks);
  if (moved) moveFocus(before, wanted);
}

const visible = (node) => node.offsetParent !== null;

// Going down, focus goes to the title of what was opened; going up, to the entry it came from.
function moveFocus(before, wanted) {
  const opened = (name) => wanted[name] !== null && wanted[name] !== before[name];
  const pane = opened("error") ? "error-pane" : opened("instance") ? "instance-pane" : null;
  if (pane === null) return;
  if (getComputedStyle(get(pane)).overflowY === "auto") get(pane).scrollTop = 0;
  else scrollTo(0, 0);
  get(pane).querySelector("h2").focus({ preventScroll: true });
}

function restoreFocus(before, wanted) {
  const closed = (name) => wanted[name] === null && before[name] !== null;
  if (wanted.list !== before.list || !(closed("error") || closed("instance"))) return;
  const hrefs = closed("error")
    ? [`#/errors/${before.error}`]
    : [`#/errors/${before.error}/train/${before.instance}`, `#/train/${before.instance}`];
  const from = [...document.querySelectorAll("a.entry")].filter(
    (node) => hrefs.includes(node.getAttribute("href")) && visible(node),
  );
  from[0]?.focus();
}

function goUp() {
  const { list, error, instance } = route();
  if (instance !== null && list === "errors") location.hash = `#/errors/${error}`;
  else if (instance !== null || error !== null) location.hash = `#/${list}`;
}

function step(node, key) {
  const list = node.closest(".entries");
  const entries = [...list.querySelectorAll("a.entry")];
  const at = entries.indexOf(node);
  if (key === "ArrowDown") return entries[at + 1];
  if (key === "ArrowUp") return entries[at - 1];
  if (key === "Home") return entries[0];
  if (key === "End") return entries[entries.length - 1];
  const columns = [...(list.closest(".columns")?.querySelectorAll(".entries") ?? [])];
  const beside = columns[columns.indexOf(list) + (key === "ArrowRight" ? 1 : -1)];
  const others = beside?.querySelectorAll("a.entry") ?? [];
  return others[Math.min(at, others.length - 1)];
}

const STEPS = new Set(["ArrowDown", "ArrowUp", "ArrowLeft", "ArrowRight", "Home", "End"]);

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const { target } = event;
  if (event.key === "Escape") {
    // These take the key for themselves: one to empty itself, the other to close.
    if (target.matches?.("select") || (target.type === "search" && target.value)) return;
    goUp();
  } else if (STEPS.has(event.key) && target.matches?.("a.entry")) {
    event.preventDefault();
    step(target, event.key)?.focus();
  } else {
    cleaner.onKey(event).catch(complain);
  }
}

function listen() {
  let typing;
  for (const form of document.querySelectorAll(".filters")) {
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      clearTimeout(typing);
      const wait = event.target.matches("select") ? 0 : TYPING_MS;
      typing = setTimeout(() => fillList().catch(complain), wait);
    });
    form.querySelector("details").open = matchMedia("(min-width: 760px)").matches;
  }
  get("more").addEventListener("click", () => {
    fillList(get("entries").children.length)
      .then((first) => first?.querySelector("a").focus())
      .catch(complain);
  });
  get("help-button").addEventListener("click", () => {
    get("help").hidden = !get("help").hidden;
    get("help-button").setAttribute("aria-expanded", String(!get("help").hidden));
  });
  get("skip").addEventListener("click", () => get("entries").querySelector("a")?.focus());
  addEventListener("hashchange", () => go(true).catch(complain));
  addEventListener("keydown", onKey);
}

async function begin() {
  listen();
  const about = await ask("about");
  Object.assign(run, about);
  takeDecisions(about.decisions);
  cleaner.begin();
  document.title = `${run.name}: turnover view`;
  get("run").textContent = run.name;
  get("to-errors").querySelector("small").textContent = count(run.errors);
  get("to-train").querySelector("small").textContent = count(run.training);
  get("path").textContent = run.path;
  get("apply").textContent = `turnover review RUN --decisions ${run.path}`;
  get("meanings").append(...run.meanings.map((text) => element("p", "", text)));
  for (const name of ["true", "predicted", "label"]) {
    for (const node of document.querySelectorAll(`select[name="${name}"]`)) {
      node.append(
        ...run.classes.map((one) => {
          const option = element("option", "", one);
          option.value = one;
          return option;
        }),
      );
    }
  }
  await go(false);
}

begin().catch(complain);
