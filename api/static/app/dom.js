// Building the page: elements, icons, and the one voice that screen readers hear.

export const $ = (id) => document.getElementById(id);

/** An element. Properties that begin with "on" are listeners, `data` is the dataset; text children are text, never HTML. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the symbols in index.html; it says nothing to a screen reader. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** Makes `parent` hold exactly these nodes. What is in place already is not touched, so focus and selection stay. */
export function arrange(parent, nodes) {
  let here = parent.firstChild;
  const focused = document.activeElement;
  for (const node of nodes) {
    if (node === here) here = here.nextSibling;
    else parent.insertBefore(node, here);
  }
  while (here) {
    const next = here.nextSibling;
    here.remove();
    here = next;
  }
  if (focused !== document.activeElement && focused?.isConnected) focused.focus({ preventScroll: true });
}

let speaking;

/** Says something to screen readers. Nothing else on the page is a live region, apart from the errors of the sign-in form. */
export function announce(text) {
  const voice = $("announcer");
  clearTimeout(speaking);
  voice.textContent = "";
  speaking = setTimeout(() => (voice.textContent = text), 60); // an empty moment: the same text twice is said twice
}

/** Copies text; false if the browser does not let us. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copySelected(text); // there is no clipboard on plain HTTP, and elsewhere it may be forbidden
  }
}

function copySelected(text) {
  const focused = document.activeElement;
  const box = h("textarea", { class: "unseen", readonly: true });
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus({ preventScroll: true });
  return done;
}

/** A button that copies what `text()` gives, and says that it has. */
export function copyButton(label, text) {
  const words = h("span", {}, label);
  const button = h("button", { type: "button", class: "quiet copy", onclick: copied }, icon("copy"), words);
  async function copied() {
    words.textContent = (await copy(text())) ? "Copied" : "Not copied";
    announce(`${words.textContent}.`);
    setTimeout(() => (words.textContent = label), 2000);
  }
  return button;
}

let offered;

/** Offers to take something back for a while. `done` is called when the time is over, `undo` when the button is pressed; one of them, once. */
export function offerUndo(text, { undo, done, seconds = 8 }) {
  offered?.(false);
  const toast = $("toast");
  const [words, button] = toast.children;
  words.textContent = text;
  button.textContent = "Undo";
  toast.hidden = false;
  announce(`${text}. Press Undo to take it back.`);
  let timer;
  const settle = (undone) => {
    if (offered !== settle) return;
    offered = null;
    clearTimeout(timer);
    toast.hidden = true;
    toast.onpointerenter = toast.onpointerleave = toast.onfocusin = toast.onfocusout = button.onclick = null;
    (undone ? undo : done)();
  };
  const run = () => (timer = setTimeout(settle, seconds * 1000, false));
  const pause = () => clearTimeout(timer);
  toast.onpointerenter = toast.onfocusin = pause; // nobody has to hurry who is already there
  toast.onpointerleave = toast.onfocusout = run;
  button.onclick = () => settle(true);
  offered = settle;
  run();
}

/** What is offered is settled now: nobody can press Undo any more. */
export function settleUndo() {
  offered?.(false);
}

/** Waits; resolves early when `signal` says so. */
export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    if (signal?.aborted) return resolve();
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
