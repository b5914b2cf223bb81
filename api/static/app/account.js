// The form for signing in and signing up. The token itself never comes here: the answer sets an HttpOnly cookie.

import { Problem, call } from "./api.js";
import { $ } from "./dom.js";

/** `entered(user)` is called once somebody is signed in. */
export function listenToForm(entered) {
  $("account").addEventListener("submit", (event) => {
    event.preventDefault();
    submit(() => signIn(entered));
  });
  $("sign-up").addEventListener("click", () => submit(() => signUp(entered)));
}

/** Shows the form. `words` say why, if there is a reason; `email` is whoever was here last. */
export function showForm(words, email) {
  $("chat").hidden = true;
  $("welcome").hidden = false;
  $("account-error").textContent = words;
  $("email").value ||= email;
  document.title = "Chatkeep";
  ($("email").value ? $("password") : $("email")).focus();
}

export function hideForm() {
  $("account").reset();
  $("welcome").hidden = true;
  $("chat").hidden = false;
}

async function signIn(entered) {
  entered(await call("POST", "/api/auth/session", { form: new URLSearchParams(new FormData($("account"))) }));
}

/** An address that is taken is no error for somebody who knows its password. */
async function signUp(entered) {
  try {
    await call("POST", "/api/auth/register", { json: { email: $("email").value, password: $("password").value } });
  } catch (error) {
    if (error.status !== 409) throw error;
    await signIn(entered).catch((second) => {
      throw second.status === 401 ? error : second;
    });
    return;
  }
  await signIn(entered);
}

async function submit(work) {
  const told = $("account-error");
  told.textContent = "";
  const wrong = [$("email"), $("password")].find((field) => !field.checkValidity());
  if (wrong) {
    told.textContent = wrong.id === "email" ? "Please give your e-mail address, such as ann@example.org." : "The password needs 8 to 128 characters.";
    wrong.focus();
    return;
  }
  const buttons = [$("sign-in"), $("sign-up")];
  for (const button of buttons) button.disabled = true;
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    told.textContent = error.words;
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}
