// One line above the message box that says what is wrong while it is wrong, and nothing otherwise.

import { $, announce } from "./dom.js";

const WORDS = {
  offline: "You are offline. What you send is kept here and goes out once you are back.",
  unreachable: "Chatkeep cannot be reached. What you send is kept here and goes out once it is back.",
  refusing: "Chatkeep cannot save anything right now. What you send is kept here and goes out once it can.",
  full: "This browser's store is full: a message that is not sent yet would not survive a reload.",
};
const ORDER = ["offline", "unreachable", "refusing", "full", "note"];

const current = new Map();

/** Says that this is so, or, with `false`, that it is no longer so. `words` is for "note". */
export function tell(kind, is, words = WORDS[kind]) {
  if (is) current.set(kind, words);
  else current.delete(kind);
  const text = ORDER.map((name) => current.get(name)).find(Boolean) ?? "";
  const strip = $("strip");
  if (strip.textContent === text && strip.hidden === !text) return;
  if (text) announce(text);
  else if (!strip.hidden) announce("All is well again.");
  strip.hidden = !text;
  if (text) strip.textContent = text;
}

let noteTimer;

/** Says something that has just gone wrong, for a while. */
export function note(words) {
  clearTimeout(noteTimer);
  tell("note", true, words);
  noteTimer = setTimeout(tell, 8000, "note", false);
}
