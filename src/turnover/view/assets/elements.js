// What the page is made of: nodes, numbers in words, texts, bars. Everything a run holds goes through
// textContent, since a training text may hold markup.

const MINUS = "\u2212";
const UNKNOWN = "\u2013";
const LONG_TEXT = 480;

export function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function link(className, href, ...children) {
  const node = element("a", className, ...children);
  node.href = href;
  return node;
}

export function button(className, ...children) {
  const node = element("button", className, ...children);
  node.type = "button";
  return node;
}

const typographic = (text) => text.replace("-", MINUS);

export function nats(value) {
  if (value === null) return UNKNOWN;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.001 || size >= 10000) {
    const [digits, power] = size.toExponential(1).split("e");
    return `${value < 0 ? MINUS : ""}${digits}e${typographic(String(Number(power)))}`;
  }
  return `${value < 0 ? MINUS : ""}${size.toFixed(size < 100 ? 3 : 1)}`;
}

export const signed = (value) => `${value > 0 ? "+" : ""}${nats(value)}`;
export const inZ = (value) =>
  value === null ? UNKNOWN : `${value > 0 ? "+" : ""}${typographic(value.toFixed(1))}`;
export const count = (value) => value.toLocaleString("en");
export const percent = (share) => (share === null ? UNKNOWN : `${(100 * share).toFixed(1)}%`);

export function inQ(value) {
  if (value === null) return UNKNOWN;
  return value < 0.001 ? "< 0.001" : value.toFixed(3);
}

export const counted = (value, one, many) => `${count(value)} ${value === 1 ? one : many}`;

export function figure(name, value, unit) {
  const shown = element("span", "value", value);
  if (unit) shown.append(" ", element("small", "", unit));
  return element("span", "figure", element("span", "name", name), " ", shown);
}

export function chip(kind, name, value) {
  return element("span", `chip ${kind}`, name ? `${name}: ` : null, element("b", "", value));
}

const WORD = /(\p{L}[\p{L}\p{M}\p{N}'’-]*)/u;

// Words that stand in nearly every text say nothing about why two go together.
const FREQUENT = 0.1;
const FEW = 20;

export function sharedWords(text, others) {
  const words = (some) => new Set(some.toLowerCase().split(WORD).filter((part) => WORD.test(part)));
  const counts = new Map();
  for (const other of others) {
    for (const word of words(other)) counts.set(word, (counts.get(word) || 0) + 1);
  }
  const rare = (word) => others.length < FEW || counts.get(word) <= FREQUENT * others.length;
  return new Set([...words(text)].filter((word) => word.length > 2 && counts.has(word) && rare(word)));
}

function marked(text, shared) {
  if (!shared || !shared.size) return [text];
  return text
    .split(WORD)
    .map((part) => (shared.has(part.toLowerCase()) ? element("mark", "", part) : part));
}

export function excerpt(text, shared) {
  const node = element("span", "excerpt", ...marked(text, shared));
  node.dir = "auto";
  return node;
}

export function wholeText(text) {
  const node = element("p", "text", text);
  node.dir = "auto";
  if (text.length <= LONG_TEXT) return node;
  const more = button("as-link", "show all");
  node.replaceChildren(`${text.slice(0, LONG_TEXT).replace(/\s+\S{0,30}$/, "")} … `, more);
  more.addEventListener("click", () => {
    node.replaceChildren(text);
    node.tabIndex = -1;
    node.focus();
  });
  return node;
}

export function picture(side, row, name, className) {
  const node = element("img", className);
  node.src = `image/${side}/${row}.png`;
  node.alt = name;
  node.loading = "lazy";
  return node;
}

const share = (value, scale) => `${scale > 0 ? Math.min(100, (100 * Math.abs(value)) / scale) : 0}%`;

export function bar(value, tick, scale) {
  const fill = element("span", "fill");
  const mark = element("span", "tick");
  fill.style.width = share(value, scale);
  mark.style.left = share(tick, scale);
  const node = element("span", "bar", fill, mark);
  node.setAttribute("aria-hidden", "true");
  return node;
}
