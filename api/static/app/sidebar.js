// The list of conversations: by last activity, in groups, with search, rename and delete.

import { call } from "./api.js";
import { groupName } from "./dates.js";
import { $, announce, arrange, h, icon, offerUndo, settleUndo } from "./dom.js";
import { note } from "./status.js";
import { exclusive, forget, namesUnder, recall, remember, watch } from "./store.js";

const PAGE = 50;
const AGAIN_MS = 4000;
const NEAR_END = 400; // pixels
const TITLE_CHARS_MAX = 200;
export const UNTITLED = "New chat";

export class Sidebar {
  #user;
  #hooks;
  #nav = $("conversations");
  #items = new Map(); // id -> conversation
  #rows = new Map(); // id or start key -> list item
  #running = new Set();
  #cursor = null;
  #loading = false;
  #failed = false;
  #loaded = false;
  #current = null;
  #query = "";
  #stale = false;
  #changed = new Set(); // ids that were told of while the list was being read: that is newer
  #deletions = Promise.resolve();
  #again;
  #off = new AbortController();

  /** Hooks: `open(place)`, `renamed(id, title)`, `deleted(id)`, `unstarted()` for what exists only in this browser. */
  constructor(user, hooks) {
    this.#user = user;
    this.#hooks = hooks;
    const on = { signal: this.#off.signal };
    this.#nav.addEventListener("scroll", () => this.#loadMore(), { ...on, passive: true });
    this.#nav.addEventListener("click", (event) => this.#clicked(event), on);
    this.#nav.addEventListener("keydown", (event) => this.#pressed(event), on);
    $("search").addEventListener("input", () => this.#search($("search").value), on);
    $("search").addEventListener("keydown", (event) => this.#pressedInSearch(event), on);
    $("rename").addEventListener("click", () => this.#menu((id) => this.#rename(id)), on);
    $("delete").addEventListener("click", () => this.#menu((id) => this.#delete(id)), on);
    addEventListener("pagehide", settleUndo, on);
    watch((name) => name.startsWith(this.#leaving("")) && this.render(), on);
    for (const name of namesUnder(this.#leaving(""))) this.#finishDeleting(recall(name));
  }

  close() {
    settleUndo();
    this.#off.abort();
    clearTimeout(this.#again);
    this.#nav.replaceChildren();
    $("search").value = "";
  }

  /** Reads the list anew, as far as it had been read. */
  async refresh() {
    this.#stale = this.#loading; // what is being read may be from before whatever was missed
    if (this.#loading) return;
    const wanted = Math.max(PAGE, this.#items.size);
    const fresh = new Map();
    let cursor = null;
    await this.#load(async () => {
      do {
        const page = await this.#page(cursor);
        for (const item of page.items) fresh.set(item.id, item);
        cursor = page.next_cursor;
      } while (cursor && fresh.size < wanted);
      for (const id of this.#changed) fresh.delete(id);
      for (const id of [...this.#changed, this.#current]) {
        if (this.#items.has(id) && !fresh.has(id)) fresh.set(id, this.#items.get(id)); // the open one stays, however old it is
      }
      this.#items = fresh;
      this.#cursor = cursor;
      this.#loaded = true;
    });
  }

  get(id) {
    return this.#items.get(id) ?? null;
  }

  /** A conversation as the server has it now. */
  put(conversation) {
    this.#items.set(conversation.id, conversation);
    this.#changed.add(conversation.id);
    this.render();
  }

  /** There was a message in it. False if it is not in the list. */
  touch(id, time, title = null) {
    const item = this.#items.get(id);
    if (!item) return false;
    this.#items.set(id, { ...item, title: item.title ?? title, updated_at: time > item.updated_at ? time : item.updated_at });
    this.#changed.add(id);
    this.render();
    return true;
  }

  remove(id) {
    this.#items.delete(id);
    this.#changed.add(id);
    this.render();
  }

  setRunning(id, running) {
    if (running) this.#running.add(id);
    else this.#running.delete(id);
    this.#rows.get(id)?.classList.toggle("running", running);
  }

  isRunning(id) {
    return this.#running.has(id);
  }

  /** Marks the open one: an id, or the start key of one that is not sent yet. */
  setCurrent(key) {
    this.#current = key;
    this.render();
    this.#rows.get(key)?.scrollIntoView({ block: "nearest" });
  }

  focusSearch() {
    $("search").focus();
    $("search").select();
  }

  render() {
    const groups = this.#groups();
    const sections = [];
    for (const [name, items] of groups) {
      const section = this.#section(name);
      arrange(section.lastElementChild, items.map((item) => this.#row(item)));
      sections.push(section);
    }
    if (sections.length === 0 && (this.#loaded || this.#query)) sections.push(this.#empty());
    if (this.#failed) sections.push(this.#retry());
    arrange(this.#nav, sections);
  }

  // Rows

  #groups() {
    const words = this.#query.toLocaleLowerCase();
    const fits = (title) => !words || (title ?? UNTITLED).toLocaleLowerCase().includes(words);
    const groups = new Map();
    const unstarted = this.#hooks.unstarted().filter((item) => fits(item.title));
    if (unstarted.length) groups.set("Not sent yet", unstarted);
    const items = [...this.#items.values()].filter((item) => fits(item.title) && !this.#isLeaving(item.id));
    items.sort((one, other) => (one.updated_at === other.updated_at ? other.id - one.id : one.updated_at < other.updated_at ? 1 : -1));
    for (const item of items) {
      const name = groupName(new Date(item.updated_at));
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(item);
    }
    return groups;
  }

  #sections = new Map();

  #section(name) {
    if (!this.#sections.has(name)) this.#sections.set(name, h("section", {}, h("h2", {}, name), h("ul")));
    return this.#sections.get(name);
  }

  #row(item) {
    const key = item.id ?? item.startKey;
    const title = item.title ?? UNTITLED;
    if (!this.#rows.has(key)) this.#rows.set(key, this.#makeRow(item));
    const row = this.#rows.get(key);
    const link = row.querySelector("a");
    if (link) {
      if (link.firstElementChild.textContent !== title) link.firstElementChild.textContent = link.title = title;
      if (key === this.#current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
      row.querySelector(".row-more")?.setAttribute("aria-label", `Options for ${title}`);
    }
    row.classList.toggle("running", this.#running.has(key));
    return row;
  }

  #makeRow(item) {
    const href = item.id ? `/c/${item.id}` : `/#${item.startKey}`;
    const more = item.id
      ? h("button", { type: "button", class: "row-more", "aria-haspopup": "true" }, icon("more"))
      : null;
    return h("li", { data: { key: item.id ?? item.startKey } }, h("a", { href }, h("span", { dir: "auto" })), more);
  }

  #empty() {
    return h("p", { class: "none" }, this.#query ? "Nothing is called that." : "Your chats will be listed here.");
  }

  #retry() {
    const again = h("button", { type: "button", class: "quiet", onclick: () => this.#tryAgain() }, "Try again");
    return h("p", { class: "none" }, "The list cannot be loaded right now. ", again);
  }

  #idOf(element) {
    const key = element.closest("li")?.dataset.key;
    return this.#items.has(Number(key)) ? Number(key) : null;
  }

  // Loading

  #page(cursor) {
    const query = cursor ? `&cursor=${encodeURIComponent(cursor)}` : "";
    return call("GET", `/api/conversations/?limit=${PAGE}${query}`);
  }

  async #load(work) {
    this.#loading = true;
    this.#changed.clear();
    try {
      await work();
      this.#failed = false;
    } catch (error) {
      if (error.status === undefined) throw error;
      this.#failed = error.status !== 401;
    } finally {
      this.#loading = false;
    }
    if (this.#off.signal.aborted) return;
    this.render();
    clearTimeout(this.#again);
    if (this.#failed) this.#again = setTimeout(() => this.#tryAgain(), AGAIN_MS);
    else if (this.#stale) this.refresh();
    else if (this.#query) this.#loadMore(true); // all of them, page by page: only the titles are needed
  }

  #tryAgain() {
    return this.#loaded ? this.#loadMore(true) : this.refresh();
  }

  async #loadMore(anyway = false) {
    const near = this.#nav.scrollHeight - this.#nav.scrollTop - this.#nav.clientHeight < NEAR_END;
    if (this.#loading || !this.#cursor || !(near || anyway)) return;
    await this.#load(async () => {
      const page = await this.#page(this.#cursor);
      for (const item of page.items) if (!this.#items.has(item.id) && !this.#changed.has(item.id)) this.#items.set(item.id, item);
      this.#cursor = page.next_cursor;
    });
    if (!this.#failed) await this.#loadMore();
  }

  #search(query) {
    this.#query = query.trim();
    this.render();
    if (this.#query) this.#loadMore(true);
  }

  // Keys and clicks

  #clicked(event) {
    const more = event.target.closest(".row-more");
    if (more) return this.#openMenu(more);
    const link = event.target.closest("a");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button !== 0) return undefined;
    event.preventDefault();
    const key = link.closest("li").dataset.key;
    return this.#hooks.open(this.#items.has(Number(key)) ? { id: Number(key) } : { startKey: key });
  }

  #pressed(event) {
    if (event.target.tagName === "INPUT") return;
    const id = this.#idOf(event.target);
    const moves = { ArrowDown: 1, ArrowUp: -1 };
    if (event.key in moves) {
      event.preventDefault();
      const links = [...this.#nav.querySelectorAll("a")];
      const at = links.indexOf(event.target.closest("li")?.querySelector("a")) + moves[event.key];
      if (at < 0) $("search").focus();
      else links[at]?.focus();
    } else if (id && event.key === "F2") {
      event.preventDefault();
      this.#rename(id);
    } else if (id && event.key === "Delete") {
      event.preventDefault();
      this.#delete(id);
    }
  }

  #pressedInSearch(event) {
    const first = this.#nav.querySelector("a");
    if (event.key === "Enter" && !event.isComposing && first) first.click();
    else if (event.key === "ArrowDown" && first) first.focus();
    else if (event.key === "Escape" && event.target.value) {
      event.stopPropagation();
      event.target.value = "";
      this.#search("");
    } else return;
    event.preventDefault();
  }

  #openMenu(button) {
    const menu = $("row-menu");
    const { bottom, right, top } = button.getBoundingClientRect();
    menu.dataset.id = this.#idOf(button);
    button.focus(); // where the focus goes back to; Safari does not focus what is clicked
    menu.showPopover();
    const { height, width } = menu.getBoundingClientRect();
    menu.style.top = `${bottom + height > innerHeight ? top - height : bottom}px`;
    menu.style.left = `${Math.max(8, right - width)}px`;
    $("rename").focus();
  }

  #menu(act) {
    const id = Number($("row-menu").dataset.id);
    $("row-menu").hidePopover();
    act(id);
  }

  // Rename

  #rename(id) {
    const row = this.#rows.get(id);
    const link = row.querySelector("a");
    const before = this.#items.get(id).title ?? "";
    const box = h("input", { class: "rename", "aria-label": "Title", maxlength: TITLE_CHARS_MAX, dir: "auto" });
    box.value = before;
    link.replaceWith(box);
    row.classList.add("renaming");
    box.focus();
    box.select();
    let settled = false;
    const settle = (save) => {
      if (settled) return;
      settled = true;
      const focused = document.activeElement === box;
      box.replaceWith(link);
      row.classList.remove("renaming");
      if (focused) link.focus();
      const title = box.value.trim();
      if (save && title && title !== before) this.#saveTitle(id, title);
    };
    box.addEventListener("blur", () => settle(true));
    box.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
      settle(event.key === "Enter");
    });
  }

  async #saveTitle(id, title) {
    const before = this.#items.get(id);
    this.put({ ...before, title });
    this.#hooks.renamed(id, title);
    try {
      this.put(await call("PATCH", `/api/conversations/${id}`, { json: { title } }));
      announce("Renamed.");
    } catch (error) {
      if (error.status === undefined) throw error;
      this.put(before);
      this.#hooks.renamed(id, before.title);
      note(`It could not be renamed. ${error.words}`);
    }
  }

  // Delete: at once on the page, on the server when nobody can take it back any more

  /** Nobody can take anything back any more; resolves when the server knows. */
  async settle() {
    settleUndo();
    await this.#deletions;
  }

  #isLeaving(id) {
    return recall(this.#leaving(id)) !== null;
  }

  #leaving(id) {
    return `${this.#user}:deleting:${id}`;
  }

  #delete(id) {
    const title = this.#items.get(id).title ?? UNTITLED;
    const links = [...this.#nav.querySelectorAll("a")];
    const at = links.indexOf(this.#rows.get(id).querySelector("a"));
    settleUndo();
    remember(this.#leaving(id), id);
    this.render();
    (links[at + 1] ?? links[at - 1] ?? $("new-chat")).focus({ preventScroll: true });
    const wasOpen = this.#current === id;
    if (wasOpen) this.#hooks.deleted(id);
    let settled;
    const offered = new Promise((resolve) => (settled = resolve));
    exclusive(this.#leaving(id), () => offered); // other tabs leave it alone meanwhile
    offerUndo(`Deleted “${short(title)}”`, {
      undo: () => {
        settled();
        forget(this.#leaving(id));
        this.render();
        if (wasOpen) this.#hooks.open({ id });
        else this.#rows.get(id)?.querySelector("a").focus();
      },
      done: () => {
        settled();
        this.#deletions = Promise.all([this.#deletions, this.#reallyDelete(id)]);
      },
    });
  }

  /** For what another page began to delete: it may be closed, or still be offering to take it back. */
  #finishDeleting(id) {
    return exclusive(this.#leaving(id), () => (this.#isLeaving(id) && !this.#off.signal.aborted ? this.#reallyDelete(id) : null));
  }

  async #reallyDelete(id) {
    try {
      await call("DELETE", `/api/conversations/${id}`, { keepalive: true });
    } catch (error) {
      if (error.status === undefined) throw error;
      if (error.passing || error.status === 401) return; // the next load of the page tries again
    }
    this.remove(id);
    forget(this.#leaving(id));
  }
}

const short = (title) => (title.length > 40 ? `${title.slice(0, 39)}…` : title);
