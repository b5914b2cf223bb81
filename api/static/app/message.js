// One message on the page: what stands in it, and how far it has come.
//
// sending    on its way to Chatkeep
// waiting    kept in this browser until it can be sent
// pending    saved: in the log, fsynced; on its way to the database
// committed  stored: in the database
// failed     refused, with the reason

import { clock, fully } from "./dates.js";
import { arrange, copyButton, h, icon } from "./dom.js";
import { Markdown, plain } from "./markdown.js";

const STATES = {
  sending: ["Sending", "On its way"],
  waiting: ["Waiting", "Kept in this browser until it can be sent"],
  pending: ["Saved", "Safe in the log, and on its way to the database"],
  committed: ["Stored", "In the database"],
  failed: ["Not sent", "Refused"],
};

/** The element of a message; `update` is called again whenever the message has changed. */
export class MessageView {
  id = null;
  day = null;
  #state = null;
  #markdown;
  #copy;
  #text = null;

  constructor(role) {
    this.role = role;
    this.body = h("div", { class: "body" });
    this.foot = h("footer");
    this.time = h("time");
    this.element = h("article", { class: role, data: { role } }, h("h3", { class: "unseen" }, role === "user" ? "You" : "Chatkeep"), this.body, this.foot);
    if (role !== "assistant") return;
    this.#markdown = new Markdown(this.body);
    this.#copy = copyButton("Copy", () => this.#text); // one for good: it may have the focus, or be saying that it has copied
  }

  /** A message that the server has. */
  update(message) {
    this.id = message.id;
    this.element.dataset.id = message.id;
    this.element.removeAttribute("aria-busy");
    this.element.classList.remove("writing");
    this.#show(message.content, true);
    this.#stamp(new Date(message.created_at));
    if (this.role === "user") {
      this.#setState(this.#state === "committed" ? "committed" : message.state);
      this.#showState();
    } else {
      this.element.dataset.state = this.element.dataset.state === "committed" ? "committed" : message.state;
      arrange(this.foot, [this.time, ...(message.status === "incomplete" ? cutShort(this.#copy) : [this.#copy])]);
    }
  }

  /** Everything up to here is in the database. */
  committed() {
    if (this.role === "user" && this.#state === "pending") {
      this.#setState("committed");
      this.#showState();
    } else if (this.role === "assistant") {
      this.element.dataset.state = "committed";
    }
  }

  /** Its own text, as it was written. */
  get text() {
    return this.#text;
  }

  /** Its text as one reads it aloud. */
  get spoken() {
    return this.body.innerText;
  }

  get pending() {
    return this.element.dataset.state === "pending";
  }

  /** A message that is not acknowledged yet; `actions` are buttons. */
  updateEntry(entry, state, note, actions) {
    this.#show(entry.text, true);
    this.#stamp(new Date(entry.created));
    this.#setState(state);
    this.#showState(...(note ? [h("span", { class: "note" }, note)] : []), ...actions);
  }

  /** A reply as far as it has come. */
  updateReply(text, note) {
    this.element.setAttribute("aria-busy", "true");
    this.element.classList.add("writing");
    this.#stamp(new Date());
    this.#show(text, false);
    if (!this.foot.querySelector(".pulse")) this.foot.replaceChildren(h("span", { class: "pulse", "aria-hidden": "true" }), h("span", { class: "note" }));
    this.foot.lastElementChild.textContent = note;
  }

  #show(text, finished) {
    if (this.#markdown) this.#markdown.show(text, finished);
    else if (text !== this.#text) this.body.replaceChildren(...plain(text));
    this.#text = text;
  }

  #stamp(date) {
    this.day ??= date;
    if (this.id !== null) this.day = date;
    this.time.dateTime = date.toISOString();
    this.time.textContent = clock(date);
    this.time.title = fully(date);
  }

  #setState(state) {
    this.#state = this.element.dataset.state = state;
  }

  /** The tick stands at the end, and the time before it, so that neither moves when the word changes. */
  #showState(...before) {
    const [name, meaning] = STATES[this.#state];
    this.foot.replaceChildren(...before, h("span", { class: "state" }, name), this.time, icon(this.#state));
    this.foot.title = `${name}: ${meaning.toLowerCase()}`;
  }
}

/** For a reply that is not whole; as long as nothing came after it, it can be asked for again. */
function cutShort(copy) {
  const again = h("button", { type: "button", class: "quiet again" }, icon("retry"), "Try again");
  return [h("span", { class: "short" }, "Cut short"), copy, again];
}

/** What stands in place of a reply that did not come. */
export function lackElement(detail, label, retry) {
  const button = h("button", { type: "button", class: "quiet", onclick: retry }, icon("retry"), label);
  return h("div", { class: "lack" }, h("p", {}, icon("failed"), detail), button);
}
