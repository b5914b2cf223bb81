// What this browser keeps beside the server: drafts, what is not sent yet, what is about to be deleted. Never the token.
//
//   chatkeep:user                         {id, email} of whoever is signed in here
//   chatkeep:theme                        "light" or "dark", if chosen
//   chatkeep:<user id>:draft:<place>      what stands in the message box of a conversation
//   chatkeep:<user id>:outbox:<key>       a message until its reply has come (outbox.js)
//   chatkeep:<user id>:deleting:<id>      a conversation that is deleted unless Undo is pressed
//
// One entry each, so that two tabs never overwrite what the other has added.

const PREFIX = "chatkeep:";

/** The value, or null. */
export function recall(name) {
  const text = localStorage.getItem(PREFIX + name);
  return text === null ? null : JSON.parse(text);
}

/** Keeps a value; false if the browser's store is full. */
export function remember(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    return false;
  }
}

export function forget(name) {
  localStorage.removeItem(PREFIX + name);
}

/** All names that begin like this. */
export function namesUnder(prefix) {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(PREFIX + prefix))
    .map((name) => name.slice(PREFIX.length));
}

/** Everything of one user. */
export function forgetUser(id) {
  for (const name of namesUnder(`${id}:`)) forget(name);
}

/** Calls `changed(name, value)` when another tab has changed something. */
export function watch(changed, options = {}) {
  const tell = (event) => {
    if (event.key?.startsWith(PREFIX)) changed(event.key.slice(PREFIX.length), event.newValue === null ? null : JSON.parse(event.newValue));
  };
  addEventListener("storage", tell, options);
}

/** Does `work` in one tab at a time; where browsers have no locks (plain HTTP), at once. */
export function exclusive(name, work) {
  return navigator.locks ? navigator.locks.request(`chatkeep-${name}`, work) : work();
}
