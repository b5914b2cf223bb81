// One signed-in person's chat: which conversation is open, and what each part of the page tells the others.

import { Problem, call, newKey } from "./api.js";
import { Composer } from "./composer.js";
import { $, announce, h, icon, pause } from "./dom.js";
import { Live } from "./live.js";
import { Outbox } from "./outbox.js";
import { Replies } from "./replies.js";
import { Sidebar, UNTITLED } from "./sidebar.js";
import { note, tell } from "./status.js";
import { Thread } from "./thread.js";

const PAGE = 50;
const OLDER_PAGE = 200;
const NEWER_PAGE = 200;
const NEWER_PAGES_MAX = 5;
const BACKOFF_MS = [1000, 2000, 4000];
const PENDING_MS = [1500, 3000, 6000, 15_000];
const SPOKEN_CHARS_MAX = 1000;

const thread = new Thread({ scroller: $("messages"), list: $("thread"), jump: $("jump"), hooks: {} });

/** Everything that belongs to one signed-in person; made anew for the next. */
export class Chat {
  place = null; // {id} or, as long as it exists only here, {startKey}
  #leaving;
  #opening = new AbortController();
  #loadingOlder = false;
  #painting = false;
  #pendingTimer;
  #closed = false;
  #unanswered = null; // a message that certainly has no reply on its way
  #held = []; // messages that may be the reply which is being read

  /** `leaving()` is called before another conversation is opened. */
  constructor(user, leaving) {
    this.user = user;
    this.#leaving = leaving;
    thread.hooks.older = () => this.#loadOlder();
    thread.hooks.again = () => this.#send(thread.lastPrompt.text);
    this.replies = new Replies({
      asked: (id, message) => this.#received(id, message),
      changed: (id) => this.#replyChanged(id),
      ended: (id, reply) => this.#replyEnded(id, reply),
      reached: (problem) => tell("refusing", problem?.status === 503),
    });
    this.outbox = new Outbox(user.id, this.replies, {
      changed: () => this.#outboxChanged(),
      placed: (startKey, id) => this.#placed(startKey, id),
      acknowledged: (entry, message) => this.#acknowledged(entry, message),
      trouble: (problem) => tell("refusing", problem?.status >= 500),
      full: () => tell("full", true),
    });
    this.sidebar = new Sidebar(user.id, {
      open: (place) => this.go(place),
      renamed: (id, title) => this.place?.id === id && this.#setTitle(title),
      deleted: () => this.go({ startKey: newKey() }),
      unstarted: () => this.outbox.unstarted.map((entry) => ({ startKey: entry.startKey, title: titleOf(entry.text) })),
    });
    this.composer = new Composer(user.id, {
      send: (text) => this.#send(text),
      stop: () => this.stop(),
      lastPrompt: () => this.#lastPrompt,
    });
    this.live = new Live({
      message: (message) => this.#heard(message),
      conversation: (conversation) => this.#conversationChanged(conversation),
      conversation_deleted: ({ id }) => this.#conversationGone(id),
      reply: ({ conversation_id: id, running }) => this.#replyElsewhere(id, running),
      committed: ({ conversation_id: id, up_to: upTo }) => id === this.place?.id && thread.committed(upTo),
      resync: () => this.#resync(),
    });
  }

  start() {
    this.route();
    this.sidebar.refresh();
    this.live.run();
    this.outbox.resume();
  }

  close() {
    this.#closed = true;
    this.#opening.abort();
    clearTimeout(this.#pendingTimer);
    for (const part of [this.outbox, this.sidebar, this.composer]) part.close();
    this.live.stop();
    this.replies.leaveAll();
    thread.clear();
    this.#setTitle(null);
    announce("");
  }

  /** There is reason to hope that the server can be reached again. */
  hurry() {
    this.live.hurry();
    this.outbox.resume();
  }

  // Where we are

  /** Opens what the address says. */
  route() {
    const id = Number(/^\/c\/(\d{1,16})\/?$/.exec(location.pathname)?.[1]);
    const startKey = /^#([0-9a-f]{32})$/.exec(location.hash)?.[1];
    if (id) this.#open({ id });
    else if (location.pathname !== "/") this.#lost();
    else this.#open({ startKey: startKey ?? newKey() });
  }

  /** Goes to a conversation as a person does: with a step in the browser's history. */
  go(place) {
    this.#leaving();
    const waiting = place.startKey && this.outbox.waiting(place).length > 0;
    const address = place.id ? `/c/${place.id}` : waiting ? `/#${place.startKey}` : "/";
    if (address !== location.pathname + location.hash) history.pushState(null, "", address);
    this.#open(place);
  }

  async #open(place) {
    this.#opening.abort();
    this.#opening = new AbortController();
    const { signal } = this.#opening;
    if (this.place?.id && this.place.id !== place.id && this.outbox.waiting(this.place).length === 0) this.replies.leave(this.place.id);
    this.place = place;
    this.#held = [];
    this.#loadingOlder = false;
    clearTimeout(this.#pendingTimer);
    this.composer.open(place.id ?? "new");
    this.#setTitle(place.id ? this.sidebar.get(place.id)?.title : null);
    this.sidebar.setCurrent(place.id ?? place.startKey);
    thread.clear();
    this.composer.focus();
    if (place.id) await this.#load(place, signal);
    else this.#showNew();
  }

  /** Shows the latest page; if it cannot be had, says why and tries again. */
  async #load({ id }, signal) {
    for (let failures = 0; !signal.aborted; failures += 1) {
      try {
        const page = await call("GET", `/api/conversations/${id}/messages?limit=${PAGE}`, { signal });
        const known = this.sidebar.get(id);
        if (known) this.#setTitle(known.title);
        else this.#fetchConversation(id);
        thread.clear();
        for (const message of page.items) this.outbox.match(message);
        if (page.items.length === 0) thread.clear(welcomeView());
        thread.prepend(page.items, page.has_older);
        return this.#loaded(id, page.items.at(-1));
      } catch (error) {
        if (signal.aborted) return undefined;
        if (!(error instanceof Problem)) throw error;
        if (error.status === 404 || error.status === 422) return this.#lost();
        if (error.status === 401) return undefined;
        thread.clear(lostView("This chat cannot be loaded right now.", "Chatkeep tries again by itself."));
        await pause(BACKOFF_MS[Math.min(failures, BACKOFF_MS.length - 1)], signal);
      }
    }
    return undefined;
  }

  #loaded(id, last) {
    if (last?.role === "assistant") this.outbox.answered(id, last.id);
    this.#outboxChanged();
    this.#replyChanged(id);
    thread.toBottom();
    this.#watchPending();
    if (last?.role === "user" || this.sidebar.isRunning(id)) this.#follow(id);
  }

  #showNew() {
    thread.clear(welcomeView());
    this.composer.setRunning(false, false);
    this.#outboxChanged();
  }

  #lost() {
    this.place = { startKey: newKey() };
    this.composer.open("new");
    this.composer.setRunning(false, false);
    this.sidebar.setCurrent(null);
    this.#setTitle("Not found");
    thread.clear(lostView("There is no such chat.", "It may have been deleted, or belong to another account."));
  }

  #setTitle(title) {
    $("title").textContent = title ?? UNTITLED;
    document.title = title ? `${title} · Chatkeep` : "Chatkeep";
  }

  // Sending

  #send(text) {
    if (thread.isEmpty) thread.clear();
    if (this.place.startKey) history.replaceState(null, "", `/#${this.place.startKey}`); // until it has an id
    this.outbox.add(this.place, text);
  }

  #outboxChanged() {
    if (!this.place || this.#closed) return;
    thread.wait(this.outbox.waiting(this.place).map((entry) => this.#shown(entry)));
    this.#showLack();
    this.sidebar.render();
  }

  /** What the thread needs to know of an entry. */
  #shown(entry) {
    if (!entry.failed) {
      const state = entry.state === "waiting" || (!entry.state && !navigator.onLine) ? "waiting" : "sending";
      return { entry, state, note: entry.note, actions: state === "waiting" ? [this.#action("edit", "Edit", () => this.#takeBack(entry))] : [] };
    }
    const actions = [
      this.#action("retry", "Retry", () => this.outbox.retry(entry.key)),
      this.#action("edit", "Edit", () => this.#takeBack(entry)),
    ];
    return { entry, state: "failed", note: entry.failed, actions };
  }

  #action(name, label, act) {
    return h("button", { type: "button", class: "quiet", onclick: act }, icon(name), label);
  }

  #takeBack(entry) {
    this.outbox.discard(entry.key);
    this.composer.write(entry.text);
    if (thread.isEmpty && this.place.startKey) this.#showNew();
  }

  #placed(startKey, id) {
    if (this.place?.startKey !== startKey) return;
    this.place = { id };
    history.replaceState(null, "", `/c/${id}`);
    this.composer.renamePlace(id);
    this.sidebar.setCurrent(id);
  }

  #acknowledged(entry, message) {
    if (this.place?.id === message.conversation_id) {
      thread.acknowledge(entry.key, message);
      this.#watchPending();
    }
    this.#touch(message);
  }

  get #lastPrompt() {
    return this.outbox.waiting(this.place).at(-1)?.text ?? thread.lastPrompt?.text ?? null;
  }

  // Replies

  /** A reply's question, as its stream has it. */
  #received(id, message) {
    this.sidebar.setRunning(id, true);
    if (id !== this.place?.id) return;
    this.#showHeld(message.id); // they came before this question, so they are not the reply to it
    this.#show(message);
    this.#replyChanged(id);
    announce("Chatkeep is replying.");
  }

  /** Paints the reply at most once a frame, however fast it comes. */
  #replyChanged(id) {
    if (id !== this.place?.id) return;
    const reply = this.replies.get(id);
    this.composer.setRunning(Boolean(reply), Boolean(reply?.stopping));
    if (!reply || this.#painting) return;
    this.#painting = true;
    requestAnimationFrame(() => {
      this.#painting = false;
      const now = this.place?.id === id ? this.replies.get(id) : undefined;
      if (now) thread.writing(now.text, now.stopping ? "Stopping…" : "");
    });
  }

  #replyEnded(id, reply) {
    if (!reply.left) this.sidebar.setRunning(id, false);
    if (reply.message) this.outbox.answered(id, reply.message.id);
    if (reply.message) this.#touch(reply.message);
    if (id !== this.place?.id || reply.left || this.#closed) return;
    this.composer.setRunning(false, false);
    if (reply.message) thread.written(reply.message);
    this.#showHeld();
    if (!reply.seen) return; // nothing was running
    if (reply.message) {
      announce(`Chatkeep: ${thread.newest.spoken.slice(0, SPOKEN_CHARS_MAX)}`);
      if (reply.problem) note(reply.problem.message); // the API's own words: they say why
      this.#watchPending();
    } else {
      thread.writing(null);
      if (reply.problem) this.#blame(reply);
      this.#unanswered = reply.question;
      this.#catchUp(id);
    }
  }

  /** Keeps with the message why it has no reply, so that the page can offer another try. */
  #blame(reply) {
    const entry = this.outbox.behind(reply.question);
    if (entry) this.outbox.lacks(entry, reply.problem.words);
    announce(reply.problem.words);
  }

  async #follow(id) {
    const reply = await this.replies.follow(id);
    if (reply || id !== this.place?.id) return;
    this.#unanswered = thread.newestId;
    await this.#catchUp(id);
  }

  /** Says so if the last message has no reply and none is coming. */
  #showLack() {
    const last = thread.newest;
    const id = this.place?.id;
    if (!id || last?.role !== "user" || this.replies.isBusy(id) || this.sidebar.isRunning(id)) return thread.lacks(null);
    const entry = this.outbox.behind(last.id);
    if (entry?.again || !(entry?.lacking || last.id === this.#unanswered)) return thread.lacks(null);
    if (entry) return thread.lacks(entry.lacking ?? "The reply was interrupted.", "Retry", () => this.outbox.retry(entry.key));
    return thread.lacks("There is no reply to this.", "Ask again", () => this.#send(last.text));
  }

  async stop() {
    const { id } = this.place;
    if (!id || !this.replies.get(id)) return;
    try {
      await this.replies.stop(id);
      announce("Stopping.");
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      note(`It could not be stopped. ${error.words}`);
    }
  }

  // Other tabs, other devices, and what was missed

  #show(message) {
    const entry = thread.has(message.id) ? null : this.outbox.match(message);
    if (entry) thread.acknowledge(entry.key, message);
    else thread.put(message);
    this.#watchPending();
  }

  #heard(message) {
    const id = message.conversation_id;
    if (message.role === "assistant") this.outbox.answered(id, message.id);
    this.#touch(message);
    if (id !== this.place?.id || this.#hold(message)) return;
    this.#show(message);
    this.#showLack();
    if (message.role === "assistant") announce(`Chatkeep: ${thread.newest.spoken.slice(0, SPOKEN_CHARS_MAX)}`);
  }

  #touch(message) {
    const title = message.role === "user" ? titleOf(message.content) : null;
    const id = message.conversation_id;
    if (!this.sidebar.touch(id, message.created_at, title)) this.#fetchConversation(id);
    else if (id === this.place?.id) this.#setTitle(this.sidebar.get(id).title);
  }

  async #fetchConversation(id) {
    try {
      this.#conversationChanged(await call("GET", `/api/conversations/${id}`));
    } catch (error) {
      if (!(error instanceof Problem)) throw error; // the list shows it with the next change
    }
  }

  #conversationChanged(conversation) {
    if (this.#closed) return;
    this.sidebar.put(conversation);
    if (conversation.id === this.place?.id) this.#setTitle(conversation.title);
  }

  /** Words that were not sent yet outlive their conversation, if it is open here. */
  #conversationGone(id) {
    const isOpen = id === this.place?.id;
    const unsent = isOpen ? [...this.outbox.waiting(this.place).map((entry) => entry.text), this.composer.take()].join("\n\n").trim() : "";
    this.outbox.discardAll(id);
    this.composer.forget(id);
    this.sidebar.remove(id);
    if (!isOpen) return;
    history.replaceState(null, "", "/");
    this.#open({ startKey: newKey() });
    if (unsent) this.composer.write(unsent);
    note(unsent ? "This chat was deleted. What you had not sent yet is in the message box." : "This chat was deleted.");
  }

  #replyElsewhere(id, running) {
    this.sidebar.setRunning(id, running);
    if (id !== this.place?.id) return;
    if (running) this.#follow(id);
    else if (!this.replies.isBusy(id)) this.#catchUp(id);
  }

  async #resync() {
    await Promise.all([this.sidebar.refresh(), this.place?.id ? this.#catchUp(this.place.id) : null]);
    if (thread.newest?.role === "user" && this.place?.id && !this.#closed) await this.#follow(this.place.id);
  }

  /** Reads what came after the newest message that is shown. */
  async #catchUp(id) {
    const { signal } = this.#opening;
    try {
      for (let pages = 0; thread.newestId && id === this.place?.id && !signal.aborted; pages += 1) {
        if (pages === NEWER_PAGES_MAX) return this.#open({ id }); // too far behind: begin anew at the end
        const page = await call("GET", `/api/conversations/${id}/messages?after=${thread.newestId}&limit=${NEWER_PAGE}`, { signal });
        for (const message of page.items) this.#caughtUp(message);
        if (!page.has_newer) break;
      }
    } catch (error) {
      if (signal.aborted) return undefined; // another conversation was opened meanwhile
      if (!(error instanceof Problem)) throw error;
      if (error.status === 404) return this.#conversationGone(id);
    }
    if (id !== this.place?.id || signal.aborted) return undefined;
    return this.#showLack();
  }

  #caughtUp(message) {
    if (message.role === "assistant") this.outbox.answered(message.conversation_id, message.id);
    if (!this.#hold(message)) this.#show(message);
  }

  /** The reply that is being read comes as its own stream, and is not shown twice meanwhile; only its end tells which one it was. */
  #hold(message) {
    const held = message.role === "assistant" && this.replies.isBusy(message.conversation_id) && !thread.has(message.id);
    if (held) this.#held.push(message);
    return held;
  }

  #showHeld(before = Infinity) {
    const shown = this.#held.filter((message) => message.id < before);
    this.#held = this.#held.filter((message) => message.id >= before);
    for (const message of shown) this.#show(message);
  }

  /** The event stream says when messages are in the database; if it does not, look. */
  #watchPending(tries = 0) {
    clearTimeout(this.#pendingTimer);
    if (thread.oldestPendingId === null || this.#closed) return;
    this.#pendingTimer = setTimeout(async () => {
      const { id } = this.place ?? {};
      const { signal } = this.#opening;
      const first = thread.oldestPendingId;
      if (!id || first === null) return;
      if (!document.hidden) {
        const page = await call("GET", `/api/conversations/${id}/messages?after=${first - 1}&limit=${NEWER_PAGE}`, { signal }).catch(nothing);
        if (id !== this.place?.id || signal.aborted) return;
        const stored = page?.items.filter((message) => message.state === "committed").at(-1);
        if (stored) thread.committed(stored.id);
      }
      this.#watchPending(tries + 1);
    }, PENDING_MS[Math.min(tries, PENDING_MS.length - 1)]);
  }

  async #loadOlder() {
    const { id } = this.place ?? {};
    if (this.#loadingOlder || !id) return;
    this.#loadingOlder = true;
    const { signal } = this.#opening;
    try {
      const page = await call("GET", `/api/conversations/${id}/messages?before=${thread.oldestId}&limit=${OLDER_PAGE}`, { signal });
      if (signal.aborted) return;
      this.#loadingOlder = false;
      thread.prepend(page.items, page.has_older);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      thread.olderFailed(() => {
        this.#loadingOlder = false;
        this.#loadOlder();
      });
    }
  }
}

/** For a look that is taken again anyway: no answer is no error. */
function nothing(error) {
  if (error instanceof Problem || error.name === "AbortError") return null;
  throw error;
}

/** The title that the server will make of a first message, until it says so itself. */
const titleOf = (text) => text.trim().replace(/\s+/g, " ").slice(0, 80);

function welcomeView() {
  const legend = [["pending", "Saved", "the moment you send"], ["committed", "Stored", "for good, shortly after"]];
  return h(
    "div",
    { class: "hello" },
    h("p", { class: "hello-title" }, "What is on your mind?"),
    h("ul", {}, ...legend.map(([name, word, when]) => h("li", {}, icon(name), h("b", {}, word), ` ${when}`))),
  );
}

function lostView(title, detail) {
  return h("div", { class: "hello" }, h("p", { class: "hello-title" }, title), h("p", {}, detail));
}
