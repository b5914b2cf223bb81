// The message box: what is written, what is kept of it, and which button is offered.

import { $ } from "./dom.js";
import { forget, recall, remember } from "./store.js";

const KEEP_MS = 250;

export class Composer {
  #user;
  #hooks;
  #box = $("message");
  #place = null; // the name of the draft
  #timer;
  #running = false;
  #off = new AbortController();

  /** Hooks: `send(text)`, `stop()`, `lastPrompt()`. */
  constructor(user, hooks) {
    this.#user = user;
    this.#hooks = hooks;
    const on = { signal: this.#off.signal };
    $("composer").addEventListener("submit", (event) => this.#submit(event), on);
    $("stop").addEventListener("click", () => this.#hooks.stop(), on);
    this.#box.addEventListener("input", () => this.#changed(), on);
    this.#box.addEventListener("keydown", (event) => this.#pressed(event), on);
    addEventListener("pagehide", () => this.#keep(), on);
  }

  close() {
    clearTimeout(this.#timer);
    this.#off.abort();
    this.#box.value = "";
  }

  /** Goes to another conversation's draft. */
  open(place) {
    this.#keep();
    this.#place = place;
    this.#box.value = recall(this.#name()) ?? "";
    this.#offer();
    this.#fit();
  }

  /** The conversation has a name now; its draft goes with it. */
  renamePlace(place) {
    forget(this.#name());
    this.#place = place;
    this.#keep();
  }

  write(text) {
    this.#box.value = text;
    this.#changed();
    this.focus();
  }

  /** What stands in the box and was not sent; it is no draft of this place any more. */
  take() {
    const text = this.#box.value;
    this.#box.value = "";
    this.#keep();
    return text;
  }

  /** There is no such place any more. */
  forget(place) {
    forget(this.#name(place));
  }

  focus() {
    if (matchMedia("(hover: hover)").matches) this.#box.focus({ preventScroll: true }); // elsewhere the keyboard would cover half of the page
  }

  /** With a reply running, what an empty box offers is to stop it. */
  setRunning(running, stopping) {
    this.#running = running;
    $("stop").disabled = stopping;
    this.#offer();
  }

  #submit(event) {
    event.preventDefault();
    const text = this.#box.value;
    if (!text.trim()) return;
    this.#box.value = "";
    this.#changed();
    this.#keep();
    this.#hooks.send(text);
    this.#box.focus({ preventScroll: true });
  }

  #pressed(event) {
    // 229: what Safari says of the Enter that ends a composition
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      $("composer").requestSubmit();
    } else if (event.key === "ArrowUp" && this.#box.value === "" && !event.isComposing) {
      const text = this.#hooks.lastPrompt();
      if (!text) return;
      event.preventDefault();
      this.write(text);
      this.#box.setSelectionRange(text.length, text.length);
    }
  }

  #changed() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#keep(), KEEP_MS);
    this.#offer();
    this.#fit();
  }

  #keep() {
    clearTimeout(this.#timer);
    if (this.#place === null || this.#off.signal.aborted) return;
    if (this.#box.value) remember(this.#name(), this.#box.value);
    else forget(this.#name());
  }

  #name(place = this.#place) {
    return `${this.#user}:draft:${place}`;
  }

  #offer() {
    const empty = !this.#box.value.trim();
    const focused = document.activeElement;
    $("stop").hidden = !this.#running;
    $("send").hidden = this.#running && empty;
    $("send").disabled = empty;
    if (focused !== document.activeElement || focused?.hidden) this.#box.focus({ preventScroll: true });
  }

  /** For browsers without `field-sizing`. */
  #fit() {
    if (CSS.supports("field-sizing", "content")) return;
    this.#box.style.height = "auto";
    this.#box.style.height = `${this.#box.scrollHeight}px`;
  }
}
