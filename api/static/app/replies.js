// Replies that are being written: asked for, followed, stopped.
//
// A reply belongs to the server. Whoever loses the connection follows it again from the last event seen (`GET …/stream`), and if nothing runs
// any more, the history says how it ended.

import { Problem, call, events } from "./api.js";
import { pause } from "./dom.js";

const BACKOFF_MS = [300, 1000, 2000, 3000, 5000];

export class Replies {
  #running = new Map(); // conversation id -> reply
  #hooks;

  /** `asked(id, message)`, `changed(id)`, `ended(id, reply)`; `reached(problem or null)` after each try to follow. */
  constructor(hooks) {
    this.#hooks = hooks;
  }

  /** The reply that this page knows to be running: `{text, stopping}`, or undefined. */
  get(id) {
    const reply = this.#running.get(id);
    return reply?.seen ? reply : undefined;
  }

  /** Whether this page is reading a reply there, or asking for one. */
  isBusy(id) {
    return this.#running.has(id);
  }

  /** Sends a message and reads its reply. Raises `Problem` if the message was not acknowledged; afterwards see `reply.message`, `reply.problem`. */
  async ask(id, text, key, acknowledged) {
    const reply = this.#begin(id);
    try {
      await this.#read(reply, "POST", `/api/chat/${id}/message`, { json: { message: text }, key }, acknowledged);
    } catch (error) {
      if (reply.left) return reply;
      if (!reply.question || !(error instanceof Problem && error.passing)) {
        this.#end(reply);
        throw error;
      }
    }
    return this.#finish(reply);
  }

  /** Follows whatever runs in this conversation to its end; gives null if nothing does. */
  async follow(id) {
    const known = this.#running.get(id);
    if (known) return known.ended;
    return this.#finish(this.#begin(id));
  }

  /** Asks the server to stop; what it has written so far is kept. */
  async stop(id) {
    const reply = this.#running.get(id);
    if (!reply || reply.stopping) return;
    reply.stopping = true;
    this.#hooks.changed(id);
    try {
      await call("POST", `/api/chat/${id}/stop`);
    } catch (error) {
      reply.stopping = false;
      this.#hooks.changed(id);
      throw error;
    }
  }

  /** Stops reading, not writing: a browser has few connections, and this reply can be followed again. */
  leave(id) {
    const reply = this.#running.get(id);
    if (!reply?.question) return; // not acknowledged yet: its sender waits for that
    reply.left = true;
    reply.connection.abort();
    this.#end(reply);
  }

  leaveAll() {
    for (const reply of [...this.#running.values()]) {
      reply.left = true;
      reply.connection.abort();
      this.#end(reply);
    }
  }

  #begin(id) {
    const reply = { id, text: "", lastEventId: "", question: null, message: null, problem: null, seen: false, stopping: false, left: false };
    reply.connection = new AbortController();
    reply.ended = new Promise((resolve) => (reply.settle = resolve));
    this.#running.set(id, reply);
    return reply;
  }

  async #read(reply, method, path, options, acknowledged = () => {}) {
    const stream = events(method, path, { ...options, signal: reply.connection.signal });
    for await (const { event, data, id } of stream) {
      if (id && id !== "0-0") reply.lastEventId = id;
      if (event === "user_message") {
        reply.question = data.id;
        reply.seen = true;
        acknowledged(data);
        this.#hooks.asked(reply.id, data);
      } else if (event === "delta") {
        reply.text += data.text;
        reply.seen = true;
        this.#hooks.changed(reply.id);
      } else if (event === "assistant_message") {
        reply.message = data;
      } else if (event === "error") {
        const problem = new Problem(data.status, data.detail, { kind: data.type });
        if (problem.status === 503 && !reply.message) throw new Problem(0, data.detail); // this reader's trouble, not the reply's
        reply.problem = problem;
      }
    }
    reply.over = Boolean(reply.message || reply.problem);
  }

  /** Follows until there is an end; gives null if there was nothing. */
  async #finish(reply) {
    for (let failures = 0; !reply.over && !reply.message && !reply.left; ) {
      let status = 200;
      try {
        const options = { lastEventId: reply.lastEventId, opened: (code) => (status = code) };
        await this.#read(reply, "GET", `/api/chat/${reply.id}/stream`, options);
        this.#hooks.reached(null);
        failures = 0;
        if (status === 204) break;
      } catch (error) {
        if (reply.left) break;
        if (!(error instanceof Problem)) throw error;
        if (!error.passing) break;
        this.#hooks.reached(error);
      }
      if (!reply.over) await pause(BACKOFF_MS[Math.min(failures++, BACKOFF_MS.length - 1)], reply.connection.signal);
    }
    this.#end(reply);
    return reply.seen ? reply : null;
  }

  #end(reply) {
    if (this.#running.get(reply.id) === reply) {
      this.#running.delete(reply.id);
      this.#hooks.ended(reply.id, reply);
    }
    reply.settle(reply.seen ? reply : null);
  }
}
