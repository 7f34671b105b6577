// One tooltip for the page: plots, tokens, bars.
import { replace } from "../core/dom.js";

const tip = () => document.getElementById("tip");

export function showTip(x, y, ...content) {
  const box = tip();
  replace(box, ...content);
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const right = x + 16 + width < window.innerWidth - 6;
  box.style.left = `${Math.max(6, right ? x + 16 : x - width - 16)}px`;
  box.style.top = `${Math.max(6, Math.min(y - height / 2, window.innerHeight - height - 6))}px`;
}

/** Below (or above) an element, so that it does not cover the line that is read. */
export function showTipAt(element, ...content) {
  const box = tip();
  replace(box, ...content);
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const below = at.bottom + 8 + height < window.innerHeight;
  box.style.left = `${Math.max(6, Math.min(at.left, window.innerWidth - width - 6))}px`;
  box.style.top = `${below ? at.bottom + 8 : Math.max(6, at.top - height - 8)}px`;
}

export function hideTip() {
  tip().hidden = true;
}

document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
window.addEventListener("hashchange", hideTip);
window.addEventListener("blur", hideTip);
