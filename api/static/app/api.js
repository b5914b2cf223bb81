// Talking to the API. The tokens are in HttpOnly cookies, so nothing here knows them; the short-lived one is renewed when a call is refused.

const CALL_MS = 15_000;
const SESSION = "/api/auth/session";
const PLAINLY = {
  "urn:chatkeep:reply-failed": "The model gave no reply.",
  "urn:chatkeep:reply-stopped": "The reply was stopped before its first word.",
  "urn:chatkeep:redis-unavailable": "Chatkeep cannot save anything right now.",
  "urn:chatkeep:not-durable": "Chatkeep cannot save anything right now.",
};
const SILENCE_MS = 35_000; // the server says something every 10 s; twice that and a bit, and the connection is dead

/** An answer that is not the one asked for. `status` 0: no answer at all. */
export class Problem extends Error {
  constructor(status, detail, { errors = [], kind = "", retryAfter = 0 } = {}) {
    super([detail, ...errors.map((error) => `${error.loc?.at(-1) ?? "It"} ${error.message}.`)].join(" "));
    this.status = status;
    this.kind = kind;
    this.retryAfter = retryAfter;
  }

  /** What a person is told. The API's own words are for programs where they speak of calls and keys. */
  get words() {
    return PLAINLY[this.kind] ?? this.message;
  }

  /** The same call may succeed later. (429: too many streams are open just now.) */
  get passing() {
    return [0, 408, 425, 429, 500, 503, 504].includes(this.status) || (this.status === 502 && !this.kind);
  }
}

const listeners = { signedOut: () => {}, reached: () => {} };

/** `signedOut` is called for a 401, `reached(true or false)` after each call. */
export function listen(given) {
  Object.assign(listeners, given);
}

/** A call that is answered with JSON; raises `Problem`. */
export async function call(method, path, { json, form, key, signal, keepalive } = {}) {
  const headers = key ? { "Idempotency-Key": key } : {};
  if (json) headers["Content-Type"] = "application/json";
  const timeout = AbortSignal.timeout(CALL_MS);
  const options = { method, headers, body: json ? JSON.stringify(json) : form, keepalive, signal: signal ? any(signal, timeout) : timeout };
  const response = await reach(path, options);
  if (!response.ok) throw await problemOf(response, path);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch {
    throw new Problem(0, "The answer broke off.");
  }
}

/** The events of a stream, `{event, data, id}` with parsed data, until it ends; raises `Problem`. With 204 there are none. */
export async function* events(method, path, { json, key, lastEventId, signal, opened = () => {} } = {}) {
  const headers = { Accept: "text/event-stream" };
  if (key) headers["Idempotency-Key"] = key;
  if (json) headers["Content-Type"] = "application/json";
  if (lastEventId) headers["Last-Event-ID"] = lastEventId;
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENCE_MS);
  try {
    const response = await reach(path, { method, headers, body: json && JSON.stringify(json), signal: signal ? any(signal, silence.signal) : silence.signal });
    if (!response.ok) throw await problemOf(response, path);
    opened(response.status);
    if (response.status === 204) return;
    for await (const event of parsed(response.body)) {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
      if (event) yield event;
    }
  } catch (error) {
    if (error instanceof Problem) throw error;
    if (signal?.aborted) throw error;
    throw new Problem(0, "The connection broke off.");
  } finally {
    clearTimeout(timer);
    silence.abort(); // whoever stops reading hangs up
  }
}

/** A key that no other request has. (`crypto.randomUUID` is missing on plain HTTP.) */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function reach(path, options) {
  const response = await ask(path, options);
  return response.status === 401 && !path.startsWith(SESSION) && (await renewed()) ? ask(path, options) : response;
}

let renewing = null;

/** Whether there is a new access token; raises `Problem` where that cannot be said now. All calls that were refused wait for one renewal. */
function renewed() {
  renewing ??= renew().finally(() => (renewing = null));
  return renewing;
}

async function renew() {
  const path = `${SESSION}/refresh`;
  const response = await ask(path, { method: "POST", signal: AbortSignal.timeout(CALL_MS) });
  if (!response.ok && ![401, 403].includes(response.status)) throw await problemOf(response, path);
  return response.ok;
}

async function ask(path, options) {
  try {
    const response = await fetch(path, options);
    listeners.reached(true);
    return response;
  } catch (error) {
    if (options.signal.aborted && options.signal.reason?.name === "AbortError") throw error;
    listeners.reached(false);
    throw new Problem(0, "Chatkeep cannot be reached.");
  }
}

async function problemOf(response, path) {
  const body = await response.json().catch(() => null); // a proxy's answer need not be JSON
  if (response.status === 401 && !path.startsWith(SESSION)) listeners.signedOut();
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  const detail = body?.detail ?? `Something went wrong (${response.status}).`;
  return new Problem(response.status, detail, { errors: body?.errors, kind: body?.type, retryAfter });
}

function any(...signals) {
  if (AbortSignal.any) return AbortSignal.any(signals);
  const controller = new AbortController();
  for (const signal of signals) {
    if (signal.aborted) controller.abort(signal.reason);
    else signal.addEventListener("abort", () => controller.abort(signal.reason), { once: true });
  }
  return controller.signal;
}

/** Server-sent events out of bytes; null for a comment, so that the reader knows somebody is there. */
async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = {};
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) yield null;
      if (line !== "") {
        const [, name, text] = /^([^:]*):? ?(.*)$/s.exec(line);
        event[name] = name === "data" && "data" in event ? `${event.data}\n${text}` : text;
        continue;
      }
      if ("data" in event) yield { event: event.event ?? "message", data: JSON.parse(event.data), id: event.id };
      event = {};
    }
  }
}
