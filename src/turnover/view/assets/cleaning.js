// Cleaning labels: what is left, undo, keys, and the effect of the decisions so far.

import { chip, count, counted, element, link, percent } from "./elements.js";

const get = (id) => document.getElementById(id);
const SETTLED_MS = 400;
const TYPED_IN = "input:not([type=checkbox]), select, textarea";

// `page` has ask(path), put(row, decision), which resolves to whether it was saved, route(), and what(one), which
// shows a training row.
export function cleaning(run, page) {
  const undoable = [];
  let shown = null;
  let deciding = false;
  let measuring = false;
  let outdated = false;
  let measured = false;
  let timer;

  const likely = () => run.doubts?.likely ?? [];

  // The doubtful row without a decision after (1) or before (-1) a row, around the ends.
  function beside(row, direction) {
    const rows = likely();
    const at = rows.includes(row) ? rows.indexOf(row) : direction > 0 ? -1 : 0;
    for (let i = 1; i <= rows.length; i++) {
      const one = rows[(at + direction * i + 2 * rows.length) % rows.length];
      if (one !== row && !run.decisions.has(one)) return one;
    }
    return null;
  }

  function open(row) {
    if (row !== null) location.hash = `#/train/${row}`;
  }

  function show() {
    const rows = likely();
    const left = rows.filter((row) => !run.decisions.has(row)).length;
    get("undo").disabled = !undoable.length;
    if (run.doubts === null) get("left").textContent = run.undoubted;
    else if (!rows.length) get("left").textContent = "No label is more probably wrong than right.";
    else {
      const of = `${counted(rows.length, "label", "labels")} more probably wrong than right`;
      get("left").textContent = `Decided ${count(rows.length - left)}, left ${count(left)} of the ${of}.`;
    }
  }

  // Decides, unless nothing would change, and remembers what to go back to.
  async function decide(row, decision) {
    const before = run.decisions.get(row) ?? null;
    if (before === decision) return true;
    const saved = await page.put(row, decision);
    if (saved) {
      undoable.push({ row, before });
      settle();
    }
    return saved;
  }

  async function undo() {
    const last = undoable.pop();
    if (last === undefined) return;
    if (!(await page.put(last.row, last.before))) {
      undoable.push(last);
      return;
    }
    settle();
    if (page.route().instance !== last.row) open(last.row);
  }

  function settle() {
    show();
    if (run.no_effect !== null) return;
    clearTimeout(timer);
    measured = page.route().list === "train";
    if (measured) timer = setTimeout(measure, SETTLED_MS);
  }

  // One question at a time: what changes meanwhile is asked for afterwards.
  async function measure() {
    if (measuring) {
      outdated = true;
      return;
    }
    measuring = true;
    outdated = false;
    const node = get("effect");
    node.setAttribute("aria-busy", "true");
    try {
      say(node, await page.ask("effect"));
    } catch (error) {
      node.textContent = error.message;
    } finally {
      measuring = false;
      node.removeAttribute("aria-busy");
      if (outdated) measure();
    }
  }

  function say(node, found) {
    const points = 100 * (found.after - found.before);
    const changed = `${points < 0 ? "\u2212" : "+"}${Math.abs(points).toFixed(1)} points`;
    const after = found.decisions
      ? `${percent(found.before)} → ${percent(found.after)} of ${counted(found.test_rows, "test row", "test rows")} ` +
        `right with ${counted(found.decisions, "decision", "decisions")}: ${changed}, ` +
        `${count(found.gained)} gained and ${count(found.lost)} lost.`
      : `${percent(found.before)} of ${counted(found.test_rows, "test row", "test rows")} right without decisions.`;
    node.replaceChildren(
      element("strong", "", after),
      ` One small head on the pretrained encoder, trained on ${counted(found.training_rows, "row", "rows")}: ` +
        `${found.seconds.toFixed(1)} s.`,
    );
    node.dataset.decisions = String(found.decisions);
  }

  async function decideByKey(row, decision) {
    if (!decision || shown?.row !== row) return;
    const saved = await decide(row, decision);
    const { list, instance } = page.route();
    if (saved && list === "train" && instance === row) open(beside(row, 1));
  }

  const KEYS = {
    k: (row) => decideByKey(row, run.keep),
    x: (row) => decideByKey(row, run.remove),
    r: (row) => decideByKey(row, shown?.suggested),
    u: undo,
    n: (row) => open(beside(row, 1)),
    p: (row) => open(beside(row, -1)),
  };

  // A key that comes while a decision is being saved, or before the next row is there, was not meant for it.
  async function onKey(event) {
    if (deciding || event.repeat || run.refusal !== null || !get("keys").checked) return;
    if (event.target.matches?.(TYPED_IN)) return;
    const act = Object.hasOwn(KEYS, event.key) ? KEYS[event.key] : null;
    if (act === null) return;
    deciding = true;
    try {
      await act(page.route().instance);
    } finally {
      deciding = false;
    }
  }

  function begin() {
    if (run.doubts === null) document.querySelector('#train-filter [value="doubt"]').remove();
    get("undo").addEventListener("click", undo);
    get("measure").addEventListener("click", measure);
    get("measure").hidden = run.no_effect !== null;
    if (run.no_effect !== null) get("effect").textContent = run.no_effect;
    for (const node of document.querySelectorAll("#cleaning .decides")) node.hidden = run.refusal !== null;
    show();
  }

  // The first instance computes the features, while its reader still reads it. The effect of decisions among the
  // errors, where it is not shown, is measured here.
  async function see(instance) {
    shown = instance;
    const tile = get("nearest");
    tile.hidden = run.no_effect !== null || page.route().list !== "train";
    if (tile.hidden) return;
    if (!measured) measure();
    measured = true;
    try {
      const { neighbors } = await page.ask(`train/${instance.row}/neighbors`);
      if (shown === instance) tile.append(nearest(page, neighbors));
    } catch (error) {
      tile.append(element("p", "note", error.message));
    }
  }

  return { begin, decide, onKey, see, show };
}

function nearest(page, neighbors) {
  const entries = neighbors.map((one) => {
    const similarity = element("small", "", `similarity ${one.similarity.toFixed(2)}`);
    return element("li", "", link("entry", `#/train/${one.row}`, page.what(one), similarity));
  });
  return element("ol", "entries", ...entries);
}

export function suggestion(instance) {
  return `relabel to ${instance.suggested}, ${percent(instance.probability_of_suggested)}`;
}

export function doubtTile(run, instance) {
  if (instance.wrong === null) return null;
  const wrong = element("p", "large", percent(instance.wrong), " ", element("small", "", "wrong"));
  const instead = element(
    "p",
    "numbers",
    chip("", "suggested", instance.suggested),
    ` ${percent(instance.probability_of_suggested)}`,
  );
  const node = element("div", "tile", element("h3", "", "Probability that the label is wrong"), wrong, instead);
  node.append(element("p", "note", `By ${run.doubts.source}.`));
  return node;
}
