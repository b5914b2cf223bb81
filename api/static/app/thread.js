// The messages of the open conversation, and where one is in them.
//
// From top to bottom: what the server has, by id, with the days marked; the reply that is being written; what is not sent yet. A message that
// is acknowledged, and a reply that has ended, become part of the first without being made anew, so nothing moves.

import { dayName, dayNumber } from "./dates.js";
import { arrange, h } from "./dom.js";
import { MessageView, lackElement } from "./message.js";

const NEAR_TOP = 1200; // pixels: older messages are asked for before they are needed
const UNSETTLED_MAX = 200;
const SETTLE_MS = 200;
const NEAR_BOTTOM = 24;

export class Thread {
  #scroller;
  #list;
  #jump;
  #older;
  hooks;
  #stored = []; // views, by id
  #marks = new Map(); // the day mark before a view
  #waiting = new Map(); // key -> view, in the order in which they were written
  #reply = null;
  #lack = null;
  #marked = {}; // class -> the view that has it
  #unsettled = [];
  #settleTimer;
  #pinned = true;
  #place = 0; // the scroll position we know of
  hasOlder = false;

  /** `hooks.older()` is called when older messages are needed, `hooks.again()` when a reply that was cut short is to be tried again. */
  constructor({ scroller, list, jump, hooks }) {
    this.#scroller = scroller;
    this.#list = list;
    this.#jump = jump;
    this.hooks = hooks;
    this.#older = h("div", { class: "older" });
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    jump.addEventListener("click", () => this.toBottom(true));
    list.addEventListener("click", (event) => event.target.closest(".again") && this.hooks.again());
    const observer = new ResizeObserver(() => this.#pinned && this.#stick());
    observer.observe(scroller);
    observer.observe(list);
  }

  /** Empties it. `content` stands there until there are messages. */
  clear(...content) {
    this.#stored = [];
    this.#unsettled = [];
    this.#marks.clear();
    this.#waiting.clear();
    this.#reply = this.#lack = null;
    this.hasOlder = false;
    this.#list.replaceChildren(...content);
    this.#list.classList.toggle("bare", content.length > 0);
    this.#setPinned(true);
  }

  get newest() {
    return this.#stored.at(-1) ?? null;
  }

  get oldestId() {
    return this.#stored[0]?.id ?? null;
  }

  get newestId() {
    return this.newest?.id ?? null;
  }

  get oldestPendingId() {
    return this.#stored.find((view) => view.pending)?.id ?? null;
  }

  get isEmpty() {
    return this.#stored.length + this.#waiting.size === 0 && !this.#reply;
  }

  has(id) {
    return this.#stored[this.#position(id)]?.id === id;
  }

  /** The last thing that the person has written here. */
  get lastPrompt() {
    return this.#stored.findLast((view) => view.role === "user") ?? null;
  }

  /** Puts older messages above the others; what one reads stays where it is. */
  prepend(messages, hasOlder) {
    const anchor = this.#stored[0]?.element;
    const before = anchor?.getBoundingClientRect().top;
    const known = new Set(this.#stored.map((view) => view.id));
    const views = messages.filter((message) => !known.has(message.id)).map(viewOf);
    this.#stored.unshift(...views);
    this.#unsettled.push(...views);
    this.#settleSoon();
    this.hasOlder = hasOlder;
    this.#render();
    if (this.#pinned) this.#stick();
    else if (anchor) this.#scroller.scrollTop += anchor.getBoundingClientRect().top - before;
    this.#place = this.#scroller.scrollTop;
    this.#ask();
  }

  /** Says in place of older messages why they are not there. */
  olderFailed(retry) {
    const again = h("button", { type: "button", class: "quiet", onclick: retry }, "Older messages could not be loaded. Try again");
    this.#older.replaceChildren(again);
  }

  /** Shows a message of the server, new or changed. */
  put(message) {
    const at = this.#position(message.id);
    if (this.#stored[at]?.id === message.id) return this.#stored[at].update(message);
    this.#insert(at, viewOf(message));
    this.#came();
    return undefined;
  }

  /** A waiting message was acknowledged as this one. */
  acknowledge(key, message) {
    const view = this.#waiting.get(key);
    if (!view) return this.put(message);
    this.#waiting.delete(key);
    const at = this.#position(message.id);
    if (this.#stored[at]?.id === message.id) return this.#render(); // another way was faster
    view.update(message);
    return this.#insert(at, view);
  }

  /** Shows what is not sent yet: `[{entry, state, note, actions}]`. */
  wait(items) {
    const wanted = new Map();
    for (const { entry, state, note, actions } of items) {
      const view = this.#waiting.get(entry.key) ?? new MessageView("user");
      view.updateEntry(entry, state, note, actions);
      wanted.set(entry.key, view);
    }
    const more = [...wanted.keys()].some((key) => !this.#waiting.has(key));
    this.#waiting = wanted;
    this.#render();
    if (more) this.toBottom();
  }

  /** Shows the reply that is being written; null when there is none any more. */
  writing(text, note = "") {
    if (text === null) {
      if (!this.#reply) return;
      this.#reply = null;
      this.#render();
      return;
    }
    const fresh = !this.#reply;
    this.#reply ??= new MessageView("assistant");
    this.#reply.updateReply(text, note);
    if (fresh) {
      this.#lack = null;
      this.#render();
    }
    this.#came();
  }

  /** The reply that was being written has become this message. */
  written(message) {
    const view = this.#reply;
    this.#reply = null;
    const at = this.#position(message.id);
    if (!view || this.#stored[at]?.id === message.id) {
      this.#render();
      return this.put(message);
    }
    view.update(message);
    this.#insert(at, view);
    return this.#came();
  }

  /** Says that the last message has no reply, and offers something; null: it has, or may get one. */
  lacks(detail, label, retry) {
    const lack = detail === null ? null : lackElement(detail, label, retry);
    if (!lack && !this.#lack) return;
    this.#lack = lack;
    this.#render();
  }

  /** Everything up to this id is in the database. */
  committed(upTo) {
    for (let at = this.#stored.length - 1; at >= 0; at -= 1) {
      const view = this.#stored[at];
      if (view.id > upTo) continue;
      if (!view.pending) break; // ids are committed in order
      view.committed();
    }
  }

  /** Scrolls to the latest message, and stays there while more comes. */
  toBottom(smoothly = false) {
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.#setPinned(true);
    const far = this.#scroller.scrollHeight - this.#scroller.scrollTop - this.#scroller.clientHeight;
    if (smoothly && !calm && far < 4 * this.#scroller.clientHeight) this.#scroller.scrollTo({ top: this.#scroller.scrollHeight, behavior: "smooth" });
    else this.#stick();
  }

  #insert(at, view) {
    this.#stored.splice(at, 0, view);
    this.#unsettled.push(view);
    this.#lack = null;
    this.#render();
  }

  #position(id) {
    let at = this.#stored.length;
    while (at > 0 && this.#stored[at - 1].id >= id) at -= 1;
    return at;
  }

  /** A view with the day mark before it, if it begins a day. */
  #dated(view, before) {
    if (before && dayNumber(before.day) === dayNumber(view.day)) {
      this.#marks.delete(view);
      return [view.element];
    }
    if (!this.#marks.has(view)) this.#marks.set(view, h("h2", { class: "day" }, dayName(view.day)));
    return [this.#marks.get(view), view.element];
  }

  #render() {
    const nodes = this.hasOlder ? [this.#older] : [];
    let before = null;
    for (const view of this.#stored) {
      nodes.push(...this.#dated(view, before));
      before = view;
    }
    if (this.#reply) nodes.push(this.#reply.element);
    if (this.#lack) nodes.push(this.#lack);
    for (const view of this.#waiting.values()) {
      nodes.push(...this.#dated(view, before));
      before = view;
    }
    if (nodes.length === 0 && this.#list.classList.contains("bare")) return;
    this.#list.classList.remove("bare");
    arrange(this.#list, nodes);
    this.#markLatest();
  }

  /** One's latest message shows its state in words, the newest of all its buttons. (`:has` and `:last-child` in CSS cost a look at all of them.) */
  #markLatest() {
    this.#move("latest", [...this.#waiting.values()].at(-1) ?? this.lastPrompt);
    this.#move("newest", this.newest);
  }

  #move(name, view) {
    const last = this.#marked[name];
    if (view === last) return;
    last?.element.classList.remove(name);
    view?.element.classList.add(name);
    this.#marked[name] = view;
  }

  #settleSoon() {
    if (this.#unsettled.length < UNSETTLED_MAX) return;
    clearTimeout(this.#settleTimer);
    this.#settleTimer = setTimeout(() => this.#settle(), SETTLE_MS);
  }

  /** Tells the browser not to lay out what is far away; it has seen how large that is, and remembers it. */
  #settle() {
    const { top, height } = this.#scroller.getBoundingClientRect();
    const near = ({ element }) => {
      const box = element.getBoundingClientRect();
      return box.bottom > top - 2 * height && box.top < top + 3 * height;
    };
    const far = this.#unsettled.filter((view) => !near(view));
    this.#unsettled = this.#unsettled.filter(near);
    for (const { element } of far) element.classList.add("settled");
  }

  /** Something came at the end: those who read further up are told. (Who is at the end stays there: see the observer.) */
  #came() {
    if (!this.#pinned) this.#showJump("New messages");
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    const distance = scrollHeight - scrollTop - clientHeight;
    const up = scrollTop < this.#place - 1;
    this.#place = scrollTop;
    if (up && distance > 2) this.#setPinned(false);
    else if (distance < NEAR_BOTTOM) this.#setPinned(true);
    this.#settleSoon();
    this.#ask();
  }

  #ask() {
    if (this.hasOlder && this.#stored.length && this.#scroller.scrollTop < NEAR_TOP) this.hooks.older();
  }

  #setPinned(pinned) {
    this.#pinned = pinned;
    if (pinned) this.#jump.hidden = true;
    else if (this.#jump.hidden) this.#showJump("Latest");
  }

  #showJump(words) {
    this.#jump.hidden = false;
    this.#jump.lastElementChild.textContent = words;
  }

  #stick() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#place = this.#scroller.scrollTop;
  }
}

function viewOf(message) {
  const view = new MessageView(message.role);
  view.update(message);
  return view;
}
