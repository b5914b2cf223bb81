// The page: who is signed in, and what holds for all of it: keys, theme, whether there is a connection.

import { hideForm, listenToForm, showForm } from "./account.js";
import { Problem, call, listen, newKey } from "./api.js";
import { Chat } from "./chat.js";
import { $ } from "./dom.js";
import { closeDrawer, isDrawerOpen, listenToDrawer, openDrawer } from "./drawer.js";
import { note, tell } from "./status.js";
import { forget, forgetUser, recall, remember, watch } from "./store.js";

let chat = null;
let away = false;

function enter(user) {
  chat?.close();
  remember("user", { id: user.id, email: user.email });
  hideForm();
  $("who").textContent = $("who").title = user.email;
  chat = new Chat(user, closeDrawer);
  chat.start();
}

function leave(words = "") {
  chat?.close();
  chat = null;
  closeDrawer();
  $("who").textContent = $("who").title = "";
  tell("refusing", false);
  showForm(words, recall("user")?.email ?? "");
}

/** What is not sent yet is lost with it, so that is asked first; nothing of this person stays in this browser. */
async function signOut() {
  const { unsent } = chat.outbox;
  const lost = unsent === 1 ? "One message has" : `${unsent} messages have`;
  if (unsent && !confirm(`${lost} not been sent and would be lost. Sign out all the same?`)) return;
  const { user } = chat;
  try {
    await chat.sidebar.settle();
    await call("DELETE", "/api/auth/session");
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    note(`You are still signed in. ${error.words}`);
    return;
  }
  chat.close();
  forgetUser(user.id);
  forget("user");
  history.replaceState(null, "", "/");
  leave();
}

function pressed(event) {
  if (!chat || event.isComposing) return;
  const command = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (command && !event.shiftKey && !event.altKey && key === "k") {
    event.preventDefault();
    openDrawer();
    chat.sidebar.focusSearch();
  } else if (command && event.shiftKey && key === "o") {
    event.preventDefault();
    chat.go({ startKey: newKey() });
  } else if (event.key === "Escape" && !event.defaultPrevented) {
    if (isDrawerOpen()) closeDrawer();
    else if (!$("row-menu").matches(":popover-open")) chat.stop();
  }
}

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (systemIsDark.matches ? "dark" : "light")) === "dark";

function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  remember("theme", theme);
  setTheme(theme);
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  $("theme").setAttribute("aria-pressed", isDark());
}

function reached(is) {
  tell("unreachable", !is && navigator.onLine);
  if (is && away) chat?.outbox.resume();
  away = !is;
}

function changedElsewhere(name, value) {
  if (name === "theme") setTheme(value);
  else if (name === "user" && value === null && chat) leave();
  else if (name === "user" && value && chat && value.id !== chat.user.id) location.reload();
}

function connect() {
  listen({ signedOut: () => chat && leave("Your session has ended. Sign in again; nothing is lost."), reached });
  listenToForm(enter);
  listenToDrawer();
  watch(changedElsewhere);
  addEventListener("popstate", () => chat?.route());
  addEventListener("keydown", pressed);
  addEventListener("online", () => (tell("offline", false), chat?.hurry()));
  addEventListener("offline", () => tell("offline", true));
  tell("offline", !navigator.onLine);
  systemIsDark.addEventListener("change", () => setTheme(recall("theme")));
  setTheme(recall("theme"));
  $("theme").addEventListener("click", toggleTheme);
  $("sign-out").addEventListener("click", signOut);
  for (const button of [$("new-chat"), $("new-chat-top")]) button.addEventListener("click", () => chat.go({ startKey: newKey() }));
  document.querySelector(".search kbd").textContent = /Mac|iP(hone|ad)/.test(navigator.platform) ? "⌘K" : "Ctrl K";
}

/** Who is signed in? Without an answer (the database is away), whoever was the last: the cookie decides about every call anyway. */
async function begin() {
  connect();
  try {
    enter(await call("GET", "/api/auth/me"));
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    const last = recall("user");
    if (error.status !== 401 && last) enter(last);
    else leave(error.status === 401 ? "" : error.words);
  }
}

begin();
