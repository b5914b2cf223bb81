// What people and models wrote becomes elements here, and nowhere else.
//
// Markdown becomes HTML (marked), raw HTML in it stays visible as text, and DOMPurify takes out whatever is not on the list below. Trusted
// Types hold this door from the other side: the browser takes HTML from DOMPurify's policy only. No image is ever loaded: an image's address
// would tell somebody that, and what, was read.

import { Marked } from "../vendor/marked.js";
import DOMPurify from "../vendor/purify.js";
import { copyButton, h } from "./dom.js";

const TAGS = [
  ...["p", "br", "hr", "h4", "h5", "h6", "strong", "em", "del", "a", "code", "pre", "blockquote", "ul", "ol", "li"],
  ...["table", "thead", "tbody", "tr", "th", "td"],
];
const ALLOWED = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "class", "start", "align"],
  ADD_URI_SAFE_ATTR: ["start", "align"], // these are never addresses; the next line would refuse them
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const COLOURED = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true };
const COLOURED_CHARS_MAX = 50_000;
const SAFE_ADDRESS = /^(?:https?:\/\/|mailto:)/i;

const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (character) => escapes[character]);

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  renderer: {
    html: ({ text }) => escape(text),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    image: ({ href, text }) => link(href, escape(text || "image")),
    link({ href, tokens }) {
      return link(href, this.parser.parseInline(tokens));
    },
  },
});

/** A link if it leads somewhere harmless, otherwise its text alone. */
function link(href, html) {
  return SAFE_ADDRESS.test(href) ? `<a href="${escape(href)}">${html}</a>` : html;
}

/** Keeps `box` showing `text` as it grows: only the blocks that changed are made anew, so what stands above them stays as it is. */
export class Markdown {
  #box;
  #blocks = []; // {raw, level, nodes}

  constructor(box) {
    this.#box = box;
  }

  /** `finished`: nothing comes after it, so an open code block may be coloured. */
  show(text, finished) {
    const tokens = marked.lexer(finished ? text : soFar(text)).filter((token) => token.type !== "space");
    const same = this.#blocks.findIndex((block, index) => block.raw !== tokens[index]?.raw.trimEnd());
    const kept = same === -1 ? this.#blocks.length : same;
    for (const block of this.#blocks.splice(kept)) for (const node of block.nodes) node.remove();
    for (const token of tokens.slice(kept)) {
      const level = levelOf(token, this.#blocks.at(-1)?.level ?? 3);
      const nodes = [...elements(marked.parser([token]), level).childNodes];
      this.#box.append(...nodes);
      this.#blocks.push({ raw: token.raw.trimEnd(), level, nodes });
    }
    this.#colour(finished);
  }

  #colour(finished) {
    for (const [index, block] of this.#blocks.entries()) {
      if (block.coloured || !(finished || index < this.#blocks.length - 1)) continue;
      block.coloured = true;
      for (const node of block.nodes) if (node.querySelectorAll) for (const code of node.querySelectorAll("pre code")) colour(code);
    }
  }
}

/**
 * Text that is still growing, without what would make it jump: a last line that may yet become anything ("-" under a line makes a heading of
 * it, until a word follows), and with bold and code closed that are only open so far.
 */
function soFar(text) {
  const fences = text.match(/^ {0,3}(?:```|~~~).*$/gm) ?? [];
  if (fences.length % 2 || (fences.length && text.endsWith(fences.at(-1)))) return text; // in code, nothing is to be guessed
  const shown = text.replace(/(^|\n)[ \t]*(?:[-=*+>#|~_`]+|\d+[.)]?)[ \t]*$/, "$1").trimEnd();
  const last = shown.slice(shown.lastIndexOf("\n\n") + 1);
  const open = ["`", "**"].find((mark) => last.split(mark).length % 2 === 0);
  if (!open) return shown;
  return shown.endsWith(open) ? shown.slice(0, -open.length) : shown + open;
}

/** A person's own text: exactly as it was written, with fenced code in boxes. */
export function plain(text) {
  const parts = text.split(/^(```[^\n`]*\n[\s\S]*?\n```)[ \t]*$\n?/m);
  return parts
    .filter((part) => part !== "")
    .map((part) => {
      const fenced = /^```([^\n`]*)\n([\s\S]*?)\n```$/.exec(part);
      if (!fenced) return h("p", { class: "plain", dir: "auto" }, part.replace(/\n$/, ""));
      const box = codeBox(h("code", {}, fenced[2]), fenced[1].trim().split(/\s/)[0]);
      colour(box.querySelector("pre code"));
      return box;
    });
}

/** Headings go on from the message's own (h3), without gaps, whatever the text does. */
function levelOf(token, last) {
  return token.type === "heading" ? Math.min(3 + token.depth, last + 1, 6) : last;
}

function elements(html, level) {
  const fragment = DOMPurify.sanitize(html.replace(/(<\/?)h[1-6]\b/g, `$1h${Math.max(4, level)}`), ALLOWED);
  for (const anchor of fragment.querySelectorAll("a")) {
    anchor.rel = "noopener noreferrer nofollow";
    anchor.target = "_blank";
  }
  for (const block of fragment.children) block.dir = "auto"; // only these: an element with a direction of its own tells its parent nothing
  for (const code of fragment.querySelectorAll("pre > code")) {
    const language = /(?:^|\s)language-(\S+)/.exec(code.className)?.[1] ?? "";
    code.removeAttribute("class");
    code.textContent = code.textContent.replace(/\n$/, "");
    code.parentElement.replaceWith(codeBox(code, language));
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = h("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function codeBox(code, language) {
  code.dataset.language = language.toLowerCase();
  const name = language || "code";
  return h(
    "div",
    { class: "code" },
    h("div", { class: "code-top" }, h("span", {}, name), copyButton("Copy code", () => code.textContent)),
    h("pre", { tabindex: "0", role: "group", "aria-label": `Code, ${name}`, dir: "ltr" }, code),
  );
}

let highlighter;

async function colour(code) {
  const { language } = code.dataset;
  const text = code.textContent;
  if (!language || text.length > COLOURED_CHARS_MAX) return;
  highlighter ??= import("../vendor/highlight.js").then((module) => module.default);
  const hljs = await highlighter.catch(() => (highlighter = null)); // it could not be loaded now: the code stays as it is, without colours
  if (!hljs?.getLanguage(language)) return;
  const html = hljs.highlight(text, { language, ignoreIllegals: true }).value;
  code.replaceChildren(DOMPurify.sanitize(html, COLOURED));
}
