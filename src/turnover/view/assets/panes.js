// The two panes: an error with the training instances behind it, and a training instance with the
// errors that it helps and hurts.

import { doubtTile, suggestion } from "./cleaning.js";
import {
  bar, button, chip, count, counted, element, excerpt, figure, inQ, inZ, link, nats, percent, picture,
  sharedWords, signed, wholeText,
} from "./elements.js";

export function badge(run, row) {
  const node = element("span", "badge");
  node.dataset.row = row;
  fillBadge(run, node);
  return node;
}

export function fillBadge(run, node) {
  const decision = run.decisions.get(Number(node.dataset.row));
  node.hidden = decision === undefined;
  if (node.hidden) return;
  const plain = decision === run.keep || decision === run.remove;
  node.textContent = plain ? decision : `→ ${decision}`;
  node.dataset.kind = plain ? decision : "relabel";
}

export function errorEntry(run, one) {
  const what = run.images ? picture("test", one.row, one.text, "small") : excerpt(one.text);
  return element(
    "span",
    "what",
    element(
      "span",
      "chips",
      chip("", "true", one.true),
      chip("wrong", "predicted", one.predicted),
      element("code", "", one.key),
    ),
    what,
  );
}

export function errorNumbers(one) {
  return element(
    "span",
    "numbers",
    figure("confidence", percent(one.confidence)),
    figure("max |z|", one.largest_z === null ? nats(null) : one.largest_z.toFixed(1)),
    figure("significant", count(one.significant)),
  );
}

function inGroup(one) {
  const label = chip("", "class", one.label);
  return one.group === null ? [label] : [label, chip("", "group", one.group)];
}

export function instanceWhat(run, one, shared) {
  const chips = element(
    "span",
    "chips",
    chip("", "", one.label),
    element("code", "", one.key),
    badge(run, one.row),
  );
  const what = run.images
    ? picture("train", one.row, one.text, "small")
    : excerpt(one.text, shared);
  return element("span", "what", chips, what);
}

export function instanceEntry(run, one) {
  const numbers = element("span", "numbers", figure("test set", signed(one.overall_score), "nats"));
  if (one.self_score !== null) numbers.append(figure("itself", signed(one.self_score), "nats"));
  numbers.append(figure("helps", count(one.helped)), figure("hurts", count(one.hurt)));
  if (one.wrong !== null) {
    numbers.append(figure("label wrong", percent(one.wrong)), figure("suggested", one.suggested));
  }
  return [instanceWhat(run, one), numbers];
}

// A score with the numbers beside it: z and q by turn-over, or the standard error by gram.
function scored(run, one, by, noiseFloor, scale) {
  const { gram } = one;
  const byGram = by === "gram";
  const quiet = !byGram && !one.significant_here;
  const score = byGram ? gram.score : one.score;
  const shown = bar(score, byGram ? gram.error : noiseFloor, scale);
  const turnover = [
    byGram ? figure("turn-over", signed(one.score)) : null,
    figure("z", inZ(one.z)),
    figure("q", inQ(one.q)),
  ];
  let beside = null;
  if (byGram) beside = figure("± gram", nats(gram.error));
  else if (gram) beside = figure("gram", `${signed(gram.score)} ± ${nats(gram.error)}`);
  const numbers = element("span", "numbers", ...turnover, beside);
  if (quiet) numbers.append(element("span", "verdict", run.not_significant));
  const head = element("span", "score", signed(score), " ", element("small", "", "nats"));
  return { quiet, head, shown, numbers };
}

const size = (one, by) => Math.abs((by === "gram" ? one.gram?.score : one.score) ?? 0);

function sides(run, data, titles, by, entry) {
  const everyone = [...data.helpful, ...data.harmful];
  const scale = Math.max(0, ...everyone.map((one) => size(one, by)));
  const columns = ["helpful", "harmful"].map((side) => {
    const [title, remark] = titles[side];
    const heading = element("h3", side, title, " ", element("small", "", remark));
    if (!data[side].length) {
      return element("div", `column ${side}`, heading, element("p", "note", "None."));
    }
    const list = element("ol", "entries", ...data[side].map((one) => entry(one, scale)));
    return element("div", `column ${side}`, heading, list);
  });
  return element("div", "columns", ...columns);
}

function influential(run, error, by, shared) {
  return (one, scale) => {
    const { quiet, head, shown, numbers } = scored(run, one, by, error.noise_floor, scale);
    const href = `#/errors/${error.error}/train/${one.row}`;
    const what = instanceWhat(run, one, shared);
    return element("li", quiet ? "quiet" : "", link("entry", href, head, shown, numbers, what));
  };
}

function target(run, instance) {
  return (one, scale) => {
    const { quiet, head, shown, numbers } = scored(run, one, "turnover", one.noise_floor, scale);
    const href = `#/errors/${one.error}/train/${instance.row}`;
    const what = errorEntry(run, one);
    return element("li", quiet ? "quiet" : "", link("entry", href, head, shown, numbers, what));
  };
}

function select(name, options, chosen, change) {
  const node = element("select", "");
  for (const [value, text] of options) {
    const option = element("option", "", text);
    option.value = value;
    node.append(option);
  }
  node.value = chosen;
  node.dataset.name = name;
  node.addEventListener("change", () => change(node.value));
  return element("label", "", `${name} `, node);
}

function title(back, kind, key) {
  const heading = element("h2", "", `${kind} `, element("code", "", key));
  heading.tabIndex = -1;
  const up = link("back", back, element("span", "narrow", "← Back"), element("span", "wide", "Close ✕"));
  return element("div", "title", up, heading);
}

function moreButton(data, more) {
  if (!data.more) return null;
  const node = button("more", "Show more");
  node.addEventListener("click", more);
  return node;
}

export function fillError(pane, run, error, view, act) {
  const whole = run.images
    ? picture("test", error.row, error.text, "picture")
    : wholeText(error.text);
  const chips = element(
    "p",
    "chips",
    chip("", "true", error.true),
    chip("wrong", "predicted", error.predicted),
  );
  const figures = errorNumbers(error);
  figures.append(figure(run.floor, nats(error.noise_floor), "nats"));
  const classes = [["", "any"], ...run.classes.map((name) => [name, name])];
  const choices = element("div", "choices");
  if (run.gram) {
    const rankings = [["turnover", "turn-over"], ["gram", "gram"]];
    choices.append(select("Ranked by", rankings, view.by, (by) => act.change({ by })));
  }
  choices.append(select("Of class", classes, view.label, (label) => act.change({ label })));
  const texts = [...error.helpful, ...error.harmful].map((one) => one.text);
  const shared = run.images ? null : sharedWords(error.text, texts);
  const titles = {
    helpful: ["Helpful", `to “${error.true}”`],
    harmful: ["Harmful", `pushed toward “${error.predicted}”`],
  };
  const tick = view.by === "gram" ? "its standard error" : `the ${run.floor}`;
  pane.replaceChildren(
    title("#/errors", "Error", error.key),
    whole,
    chips,
    figures,
    choices,
    sides(run, error, titles, view.by, influential(run, error, view.by, shared)),
    element("p", "note", `Bars show the size of a score; the tick on each marks ${tick}.`),
  );
  const more = moreButton(error, act.more);
  if (more) pane.append(more);
}

function measured(name, found, remark) {
  if (found === null) return element("div", "tile", element("h3", "", name), element("p", "note", "not estimated"));
  const score = element("p", "large", signed(found.score), " ", element("small", "", "nats"));
  const numbers = element("p", "numbers", figure("z", inZ(found.z)), figure("q", inQ(found.q)));
  const node = element("div", "tile", element("h3", "", name), score, numbers);
  node.append(element("p", "note", remark));
  if (!found.significant_here) node.classList.add("quiet");
  return node;
}

const FEW_CLASSES = 4;

function decisionControl(run, instance, act) {
  const group = element("fieldset", "decision", element("legend", "", "Decision"));
  if (run.refusal !== null) {
    group.append(element("p", "note", run.refusal));
    return group;
  }
  const others = run.classes.filter((name) => name !== instance.label);
  const few = others.length <= FEW_CLASSES;
  const rest = others.filter((name) => few && name !== instance.suggested);
  const suggested = instance.suggested === null ? [] : [instance.suggested];
  const words = [run.keep, run.remove, ...suggested, ...rest];
  const buttons = words.map((word) => {
    const plain = word === run.keep || word === run.remove;
    const relabel = word === instance.suggested ? suggestion(instance) : `relabel: ${word}`;
    const node = button("", plain ? word : relabel);
    node.addEventListener("click", () => {
      act.decide(instance.row, run.decisions.get(instance.row) === word ? null : word);
    });
    return [word, node];
  });
  group.append(...buttons.map(([, node]) => node));
  let chosen = null;
  if (!few) {
    const options = [["", "none"], ...others.map((name) => [name, name])];
    const label = select("Relabel", options, "", (value) => act.decide(instance.row, value || null));
    chosen = label.querySelector("select");
    group.append(label);
  }
  group.append(element("p", "note", "Saved at once; choose the same again to undo it."));
  act.onDecision(() => {
    const decision = run.decisions.get(instance.row);
    for (const [word, node] of buttons) node.setAttribute("aria-pressed", String(word === decision));
    if (chosen) chosen.value = others.includes(decision) ? decision : "";
  });
  return group;
}

export function fillInstance(pane, run, instance, back, act) {
  const whole = run.images
    ? picture("train", instance.row, instance.text, "picture")
    : wholeText(instance.text);
  const of = `of ${count(run.training)}`;
  const own = instance.own
    ? `number ${count(instance.own.rank)} ${of}, from the most memorized`
    : "";
  const overall = `number ${count(instance.overall.rank)} ${of}, from the most harmful`;
  const nearest = element("div", "tile", element("h3", "", "Nearest training rows, by the encoder"));
  nearest.id = "nearest";
  nearest.hidden = true;
  const tiles = element(
    "div",
    "tiles",
    doubtTile(run, instance),
    measured("Influence on itself", instance.own, own),
    measured("Influence on the whole test set", instance.overall, overall),
    nearest,
  );
  const sure = (some) => `${counted(some, "error", "errors")} with q ≤ ${run.significant_q}`;
  const titles = {
    helpful: ["Helps", sure(instance.helped)],
    harmful: ["Hurts", sure(instance.hurt)],
  };
  pane.replaceChildren(
    title(back, "Training instance", instance.key),
    whole,
    element("p", "chips", ...inGroup(instance), badge(run, instance.row)),
    decisionControl(run, instance, act),
    tiles,
    sides(run, instance, titles, "turnover", target(run, instance)),
    element("p", "note", `The tick on each bar marks that error's ${run.floor}.`),
  );
  const more = moreButton(instance, act.more);
  if (more) pane.append(more);
}
