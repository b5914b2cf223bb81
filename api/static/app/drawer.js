// On narrow screens the sidebar is a drawer over the page, and the rest is out of reach while it is open.

import { $ } from "./dom.js";

const narrow = matchMedia("(max-width: 760px)");

export function listenToDrawer() {
  $("open-drawer").addEventListener("click", openDrawer);
  $("close-drawer").addEventListener("click", closeDrawer);
  $("shade").addEventListener("click", closeDrawer);
  narrow.addEventListener("change", closeDrawer);
}

export const isDrawerOpen = () => $("chat").classList.contains("drawer");

/** Does nothing where the sidebar is always there. */
export function openDrawer() {
  if (!narrow.matches) return;
  $("chat").classList.add("drawer");
  $("open-drawer").setAttribute("aria-expanded", "true");
  $("main").inert = true;
  $("close-drawer").focus();
}

export function closeDrawer() {
  if (!isDrawerOpen()) return;
  const inside = $("sidebar").contains(document.activeElement);
  $("chat").classList.remove("drawer");
  $("open-drawer").setAttribute("aria-expanded", "false");
  $("main").inert = false;
  if (inside) $("open-drawer").focus();
}
