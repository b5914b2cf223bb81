// Messages from the moment they are written until their reply has come, kept in this browser so that no reload, crash or cut loses one.
//
// An entry: {key, conversation, startKey, text, created, acknowledged, failed, lacking}
//
// key           the Idempotency-Key: however often an entry is sent, from however many tabs, it is stored once
// conversation  its id; null while the conversation itself is still to be created, with `startKey` as that call's key
// acknowledged  the message's id, once the server has it
// failed        why the server will never take it
// lacking       why it has no reply; the same key tries again
//
// The entries of one conversation go out one by one, each after the reply to the one before it. A lock lets one tab do that; where
// browsers have none (plain HTTP), two tabs may send the same entry, which the key makes harmless.

import { Problem, call, newKey } from "./api.js";
import { pause } from "./dom.js";
import { exclusive, forget, namesUnder, recall, remember, watch } from "./store.js";

const BACKOFF_MS = [500, 1000, 2000, 4000, 5000];
const AFTER_REPLY = "Goes out after this reply";
const OTHERS_FIRST_MS = 1000; // the tab that it was written in sends it, unless that is closed just then
const KEPT_MS = 7 * 86_400_000; // an acknowledged entry whose conversation was never opened again
const FOLLOW_MS = 400;
const CLOCKS_DIFFER_MS = 10_000;

export class Outbox {
  #user;
  #replies;
  #hooks;
  #entries = new Map();
  #working = new Set();
  #wake = new AbortController();
  #closed = false;

  /** Hooks: `changed()`, `placed(startKey, id)`, `acknowledged(entry, message)`, `trouble(problem or null)`, `full()`. */
  constructor(user, replies, hooks) {
    this.#user = user;
    this.#replies = replies;
    this.#hooks = hooks;
    for (const name of namesUnder(this.#name(""))) this.#take(recall(name));
    watch((name, value) => this.#changedElsewhere(name, value));
  }

  /** Sends what is waiting. Called again when there is reason to hope. */
  resume() {
    this.#wake.abort();
    this.#wake = new AbortController();
    for (const entry of this.#entries.values()) this.#work(lane(entry));
  }

  close() {
    this.#closed = true;
    this.#wake.abort();
  }

  add(place, text) {
    const before = [...this.#entries.values()].find((entry) => place.id && entry.conversation === place.id);
    const startKey = place.startKey ?? before?.startKey ?? null; // the same lane as those before it
    const entry = { key: newKey(), conversation: place.id ?? null, startKey, text, created: Date.now() };
    const note = this.#replies.isBusy(entry.conversation) ? AFTER_REPLY : "";
    if (this.#working.has(lane(entry)) || note) Object.assign(entry, { state: "waiting", note });
    this.#entries.set(entry.key, entry);
    this.#keep(entry);
    this.#hooks.changed();
    this.#work(lane(entry));
  }

  /** What waits in this place, in the order in which it was written. */
  waiting(place) {
    return this.#ordered().filter((entry) => !entry.acknowledged && !entry.shown && isIn(entry, place));
  }

  /** Conversations that exist only here so far: the first entry of each. */
  get unstarted() {
    const first = new Map();
    for (const entry of this.#ordered()) if (entry.conversation === null && !first.has(entry.startKey)) first.set(entry.startKey, entry);
    return [...first.values()];
  }

  /** The acknowledged entry behind this message, if this browser sent it and has seen no reply. */
  behind(messageId) {
    return [...this.#entries.values()].find((entry) => entry.acknowledged === messageId) ?? null;
  }

  /** How many messages the server does not have. */
  get unsent() {
    return [...this.#entries.values()].filter((entry) => !entry.acknowledged).length;
  }

  /**
   * The entry that this message, which came another way than in answer to its sending, seems to be. From now on it is not shown as waiting,
   * so that nobody sees it twice; it is sent all the same, because only the server knows.
   */
  match(message) {
    if (message.role !== "user") return null;
    const since = Date.parse(message.created_at) + CLOCKS_DIFFER_MS;
    const seems = (entry) => entry.conversation === message.conversation_id && !entry.acknowledged && entry.created < since;
    const entry = this.#ordered().find((one) => seems(one) && !one.shown && one.text === message.content) ?? null;
    if (entry) entry.shown = true;
    return entry;
  }

  /** There is a reply after this message, so nothing has to be kept. */
  answered(conversation, upTo) {
    for (const entry of [...this.#entries.values()]) {
      if (entry.conversation === conversation && entry.acknowledged && entry.acknowledged < upTo) this.#drop(entry);
    }
  }

  /** Why this message has no reply. */
  lacks(entry, detail) {
    entry.lacking = detail;
    this.#keep(entry);
  }

  retry(key) {
    const entry = this.#entries.get(key);
    if (!entry) return;
    entry.failed = entry.lacking = null;
    entry.again = true;
    this.#keep(entry);
    this.#hooks.changed();
    this.#work(lane(entry));
  }

  discard(key) {
    const entry = this.#entries.get(key);
    if (entry) this.#drop(entry);
    this.#hooks.changed();
  }

  /** Their conversation is gone. */
  discardAll(conversation) {
    for (const entry of [...this.#entries.values()]) if (entry.conversation === conversation) this.#drop(entry);
  }

  // Sending

  async #work(name) {
    if (this.#working.has(name)) return;
    this.#working.add(name);
    try {
      for (let next; !this.#closed && (next = this.#next(name)); ) {
        if ((await exclusive(`${this.#user}-${name}`, () => this.#deliver(next.key))) === "stop") return;
      }
    } finally {
      this.#working.delete(name);
    }
  }

  #next(name) {
    return this.#ordered().find((entry) => lane(entry) === name && isDue(entry));
  }

  async #deliver(key) {
    const kept = recall(this.#name(key)); // another tab may have been here before us
    const entry = this.#entries.get(key);
    if (!entry || (kept?.acknowledged && !entry.again) || (!kept && !entry.unkept)) {
      if (kept) this.#take(kept);
      else this.#entries.delete(key);
      this.#hooks.changed();
      return undefined;
    }
    for (let failures = 0; !this.#closed && this.#entries.has(key); failures += 1) {
      try {
        await this.#send(entry);
        return undefined;
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        if (error.status === 401) return this.#hold(entry, "stop");
        if (error.status !== 409 && !error.passing) return this.#refused(entry, error);
        await this.#rest(entry, error, failures);
      }
    }
    return undefined;
  }

  async #send(entry) {
    if (this.#replies.isBusy(entry.conversation)) {
      this.#say(entry, "waiting", AFTER_REPLY);
      await this.#replies.follow(entry.conversation);
    }
    this.#say(entry, "sending");
    if (entry.conversation === null) await this.#start(entry);
    const reply = await this.#replies.ask(entry.conversation, entry.text, entry.key, (message) => this.#acknowledge(entry, message));
    if (reply?.left) return;
    if (reply?.problem && !reply.message) this.lacks(entry, reply.problem.words);
    this.#hooks.changed();
  }

  async #start(entry) {
    const { startKey } = entry;
    const session = await call("POST", "/api/chat/start", { json: {}, key: startKey });
    for (const other of this.#entries.values()) {
      if (other.startKey !== startKey || other.conversation !== null) continue;
      other.conversation = session.conversation_id;
      this.#keep(other);
    }
    this.#hooks.placed(startKey, session.conversation_id);
  }

  #acknowledge(entry, message) {
    entry.acknowledged = message.id;
    entry.again = false;
    this.#keep(entry);
    this.#hooks.trouble(null);
    this.#hooks.acknowledged(entry, message);
  }

  #refused(entry, problem) {
    this.#hooks.trouble(null);
    if (entry.acknowledged) this.lacks(entry, problem.words);
    else entry.failed = problem.words;
    entry.again = false;
    this.#keep(entry);
    this.#hooks.changed();
  }

  async #rest(entry, problem, failures) {
    if (problem.status === 409) {
      this.#say(entry, "waiting", AFTER_REPLY);
      await this.#replies.follow(entry.conversation);
      return pause(FOLLOW_MS, this.#wake.signal);
    }
    this.#say(entry, "waiting", problem.status === 0 ? "" : problem.words);
    this.#hooks.trouble(problem);
    const backoff = BACKOFF_MS[Math.min(failures, BACKOFF_MS.length - 1)];
    return pause(Math.max(backoff, problem.retryAfter * 1000), this.#wake.signal);
  }

  #hold(entry, answer) {
    this.#say(entry, "waiting", "");
    return answer;
  }

  #say(entry, state, note = "") {
    Object.assign(entry, { state, note });
    this.#hooks.changed();
  }

  // Keeping

  #name(key) {
    return `${this.#user}:outbox:${key}`;
  }

  #ordered() {
    return [...this.#entries.values()].sort((one, other) => one.created - other.created);
  }

  #keep({ state, note, shown, again, unkept, ...entry }) {
    const known = this.#entries.get(entry.key);
    if (!known) return; // taken back while it was on its way
    const kept = remember(this.#name(entry.key), entry);
    known.unkept = !kept;
    if (!kept) this.#hooks.full();
  }

  #drop(entry) {
    this.#entries.delete(entry.key);
    forget(this.#name(entry.key));
  }

  #take(entry) {
    if (entry.acknowledged && Date.now() - entry.created > KEPT_MS) forget(this.#name(entry.key));
    else this.#entries.set(entry.key, Object.assign(this.#entries.get(entry.key) ?? {}, entry));
  }

  #changedElsewhere(name, value) {
    const prefix = this.#name("");
    if (this.#closed || !name.startsWith(prefix)) return;
    if (value === null) {
      this.#entries.delete(name.slice(prefix.length));
    } else {
      const known = this.#entries.get(value.key);
      this.#take(value);
      if (known && known.conversation === null && value.conversation) this.#hooks.placed(value.startKey, value.conversation);
      setTimeout(() => this.#work(lane(value)), OTHERS_FIRST_MS);
    }
    this.#hooks.changed();
  }
}

const lane = (entry) => (entry.startKey ? `n${entry.startKey}` : `c${entry.conversation}`);
const isDue = (entry) => !entry.failed && (!entry.acknowledged || entry.again);

function isIn(entry, place) {
  return place.id ? entry.conversation === place.id : entry.conversation === null && entry.startKey === place.startKey;
}
