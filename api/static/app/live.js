// What happens elsewhere: one event stream a user, with polling where it cannot be had.
//
// A tab that nobody looks at lets its connection go after a minute (a browser has six for all its tabs) and takes up again where it was.

import { Problem, events } from "./api.js";
import { pause } from "./dom.js";

const BACKOFF_MS = [500, 1000, 2000, 4000];
const HIDDEN_MS = 60_000;

export class Live {
  #hooks;
  #lastEventId = "";
  #connection = null;
  #wake = new AbortController();
  #stopped = false;
  #hideTimer;

  /**
   * Hooks: `message`, `conversation`, `conversation_deleted`, `reply`, `committed` with an event's data, and `resync()`,
   * which a first visit gets, too.
   */
  constructor(hooks) {
    this.#hooks = hooks;
    this.visibility = () => this.#visibilityChanged();
    document.addEventListener("visibilitychange", this.visibility);
  }

  async run() {
    for (let failures = 0; !this.#stopped; ) {
      try {
        await this.#listen(() => (failures = 0));
      } catch (error) {
        if (this.#stopped || error.status === 401) return;
        if (!(error instanceof Problem) && error.name !== "AbortError") reportError(error); // a fault of ours ends no stream for good
        failures += 1;
        if (failures > 1 && !document.hidden) this.#hooks.resync(); // polling
      }
      await this.#wanted(BACKOFF_MS[Math.min(failures, BACKOFF_MS.length) - 1] ?? BACKOFF_MS[0]);
    }
  }

  /** Tries again now, if it is waiting to. */
  hurry() {
    this.#wake.abort();
    this.#wake = new AbortController();
  }

  stop() {
    this.#stopped = true;
    clearTimeout(this.#hideTimer);
    document.removeEventListener("visibilitychange", this.visibility);
    this.#connection?.abort();
    this.#wake.abort();
  }

  async #listen(opened) {
    this.#connection = new AbortController();
    const options = { lastEventId: this.#lastEventId, signal: this.#connection.signal, opened };
    for await (const { event, data, id } of events("GET", "/api/events", options)) {
      if (this.#stopped) return;
      if (id) this.#lastEventId = id;
      this.#hooks[event]?.(data);
    }
  }

  async #wanted(milliseconds) {
    await pause(milliseconds, this.#wake.signal);
    while (document.hidden && this.#hideTimer === null && !this.#stopped) await pause(1000, this.#wake.signal);
  }

  #visibilityChanged() {
    clearTimeout(this.#hideTimer);
    this.#hideTimer = undefined;
    if (!document.hidden) return this.hurry();
    this.#hideTimer = setTimeout(() => {
      this.#hideTimer = null; // let go
      this.#connection?.abort();
    }, HIDDEN_MS);
    return undefined;
  }
}
