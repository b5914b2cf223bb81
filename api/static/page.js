// The chat page. The token is in an HttpOnly cookie; whatever people or models wrote is only ever set as text.

const $ = (id) => document.getElementById(id);
let conversation = null; // id of the open one, null for a new chat
let oldest = null; // id of the oldest message shown
let nextCursor = null;
let unsent = null; // {text, conversation, startKey, key}: repeated with the same keys until it is acknowledged

class Problem extends Error {
  constructor(status, detail, errors = []) {
    super([detail, ...errors.map((error) => `${error.loc.at(-1)} ${error.message}`)].join(" "));
    this.status = status;
  }
}

async function call(method, path, { json, form, key } = {}) {
  const headers = key ? { "Idempotency-Key": key } : {};
  if (json) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: json ? JSON.stringify(json) : form });
  } catch {
    throw new Problem(0, "Chatkeep cannot be reached. Try again in a moment.");
  }
  const body = response.status === 204 ? null : await response.json().catch(() => null);
  if (response.ok) return body;
  if (response.status === 401 && !path.startsWith("/api/auth/")) show(null);
  throw new Problem(response.status, body?.detail ?? `Something went wrong (${response.status}).`, body?.errors);
}

function show(user) {
  $("welcome").hidden = user !== null;
  $("chat").hidden = user === null;
  $("who").textContent = user?.email ?? "";
  if (user === null) {
    $("messages").replaceChildren();
    $("conversations").replaceChildren();
    unsent = null;
  }
}

async function attempt(place, work) {
  $(place).textContent = "";
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    $(place).textContent = error.message;
  }
}

async function enter(user) {
  show(user);
  await attempt("chat-error", async () => {
    await listConversations();
    const wanted = Number(location.hash.slice(1));
    if (Number.isSafeInteger(wanted) && wanted > 0) await open(wanted);
    else newChat();
  });
}

async function listConversations(cursor = null) {
  const page = await call("GET", `/api/conversations/?limit=50${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`);
  const items = page.items.map((item) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: item.title ?? "New chat" });
    button.dataset.id = item.id;
    button.addEventListener("click", () => attempt("chat-error", () => open(item.id)));
    const line = document.createElement("li");
    line.append(button);
    return line;
  });
  if (cursor) $("conversations").append(...items);
  else $("conversations").replaceChildren(...items);
  nextCursor = page.next_cursor;
  $("more").hidden = nextCursor === null;
  markOpen();
}

function markOpen() {
  for (const button of $("conversations").querySelectorAll("button")) {
    if (Number(button.dataset.id) === conversation) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

function article(message) {
  const element = document.createElement("article");
  element.dataset.role = message.role;
  element.dataset.id = message.id ?? "";
  const heading = Object.assign(document.createElement("h2"), { textContent: message.role === "user" ? "You" : "Chatkeep" });
  element.append(heading, Object.assign(document.createElement("p"), { textContent: message.content }));
  return element;
}

function newChat() {
  conversation = oldest = null;
  $("messages").replaceChildren();
  $("older").hidden = true;
  history.replaceState(null, "", "/");
  markOpen();
  $("message").focus();
}

async function open(id) {
  const page = await call("GET", `/api/conversations/${id}/messages`);
  conversation = id;
  $("messages").replaceChildren(...page.items.map(article));
  oldest = page.items[0]?.id ?? null;
  $("older").hidden = !page.has_older;
  $("messages").scrollTop = $("messages").scrollHeight;
  history.replaceState(null, "", `#${id}`);
  markOpen();
}

async function showOlder() {
  const page = await call("GET", `/api/conversations/${conversation}/messages?before=${oldest}`);
  const box = $("messages");
  const fromBottom = box.scrollHeight - box.scrollTop;
  box.prepend(...page.items.map(article));
  box.scrollTop = box.scrollHeight - fromBottom;
  oldest = page.items[0]?.id ?? oldest;
  $("older").hidden = !page.has_older;
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID is missing on plain HTTP
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function send() {
  const text = $("message").value;
  if (!text.trim() || $("send").disabled) return;
  if (unsent?.text !== text || unsent.conversation !== conversation) unsent = { text, conversation, startKey: newKey(), key: newKey() };
  const sending = unsent;
  const draft = article({ role: "user", content: text });
  $("messages").append(draft);
  $("messages").scrollTop = $("messages").scrollHeight;
  $("send").disabled = true;
  try {
    if (sending.conversation === null) {
      const session = await call("POST", "/api/chat/start", { json: {}, key: sending.startKey });
      sending.conversation = session.conversation_id;
      if (conversation === null) {
        conversation = session.conversation_id;
        history.replaceState(null, "", `#${conversation}`);
      }
    }
    const turn = await call("POST", `/api/chat/${sending.conversation}/message`, { json: { message: text }, key: sending.key });
    unsent = null;
    $("message").value = "";
    if (conversation === turn.conversation_id) {
      draft.replaceWith(article(turn.user_message), article(turn.assistant_message));
      oldest ??= turn.user_message.id;
      $("messages").scrollTop = $("messages").scrollHeight;
    }
    await listConversations();
  } catch (error) {
    draft.remove(); // the text is still in the box; sending it again repeats the same keys
    throw error;
  } finally {
    $("send").disabled = false;
    $("message").focus();
  }
}

async function signIn() {
  const user = await call("POST", "/api/auth/session", { form: new URLSearchParams(new FormData($("account"))) });
  $("account").reset();
  await enter(user);
}

$("account").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt("account-error", signIn);
});
$("sign-up").addEventListener("click", () => {
  if (!$("account").reportValidity()) return;
  attempt("account-error", async () => {
    await call("POST", "/api/auth/register", { json: { email: $("email").value, password: $("password").value } });
    await signIn();
  });
});
$("sign-out").addEventListener("click", () => attempt("chat-error", async () => {
  await call("DELETE", "/api/auth/session");
  history.replaceState(null, "", "/");
  show(null);
}));
$("new-chat").addEventListener("click", newChat);
$("older").addEventListener("click", () => attempt("chat-error", showOlder));
$("more").addEventListener("click", () => attempt("chat-error", () => listConversations(nextCursor)));
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt("chat-error", send);
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});

call("GET", "/api/auth/me").then(enter, () => show(null));
