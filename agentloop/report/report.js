"use strict";
// Tooltips of the plots and of the tokens. All text goes through textContent: nothing here makes HTML from data.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const boxes = [...document.querySelectorAll("[data-plot]")];

  const node = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  const place = (x, y) => {
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const right = x + 14 + width < window.innerWidth - 4;
    tip.style.left = `${Math.max(4, right ? x + 14 : x - width - 14)}px`;
    tip.style.top = `${Math.max(4, Math.min(y - height / 2, window.innerHeight - height - 4))}px`;
  };

  const hide = () => {
    tip.hidden = true;
    for (const box of boxes) box.querySelector(".cursor").hidden = true;
  };

  // -- plots: one cursor in all of them, the values of the one under the pointer ------------------------------------
  const nearest = (at, x) => {
    let best = 0;
    for (let i = 1; i < at.length; i++) if (Math.abs(at[i] - x) < Math.abs(at[best] - x)) best = i;
    return best;
  };

  const showStep = (box, index, x, y) => {
    const plot = data.plots[box.dataset.plot];
    tip.replaceChildren(node("p", "head", `step ${plot.steps[index]}`));
    for (const series of plot.series) {
      if (!series.text[index]) continue;
      const line = node("p", "line");
      line.append(node("span", `key ${series.kind} c${series.colour}`), node("span", "", series.label), node("b", "", series.text[index]));
      tip.append(line);
    }
    for (const other of boxes) {
      const cursor = other.querySelector(".cursor");
      cursor.hidden = false;
      cursor.style.left = `${data.plots[other.dataset.plot].at[index] * 100}%`;
    }
    box.dataset.index = index;
    place(x, y);
  };

  for (const box of boxes) {
    const at = data.plots[box.dataset.plot].at;
    const move = (event) => {
      const frame = box.getBoundingClientRect();
      const index = nearest(at, (event.clientX - frame.left) / frame.width);
      showStep(box, index, frame.left + at[index] * frame.width, event.clientY);
    };
    box.addEventListener("pointermove", move);
    box.addEventListener("pointerdown", move);
    box.addEventListener("pointerleave", hide);
    box.addEventListener("blur", hide);
    box.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const index = Math.min(at.length - 1, Math.max(0, Number(box.dataset.index ?? -1) + by));
      const frame = box.getBoundingClientRect();
      showStep(box, index, frame.left + at[index] * frame.width, frame.top + frame.height / 2);
    });
  }

  // -- tokens ---------------------------------------------------------------------------------------------------------
  const indices = new WeakMap();
  const indexOf = (box, token) => {
    if (!indices.has(box)) indices.set(box, new Map([...box.querySelectorAll(".text > i")].map((one, i) => [one, i])));
    return indices.get(box).get(token);
  };

  let lit = null;
  const showToken = (event) => {
    const token = event.target.closest?.(".tokens .text > i");
    if (lit && lit !== token) lit.classList.remove("lit");
    if (!token) {
      if (lit) hide();
      lit = null;
      return;
    }
    lit = token;
    token.classList.add("lit");
    const box = token.closest(".tokens");
    const index = indexOf(box, token);
    const { skip, ids, lp, v } = data.trajectories[box.dataset.traj];
    const position = index < skip[0] ? index : index + skip[1];
    const sampled = lp[index] !== null || v[index] !== null;
    const facts = [["token id", ids[index]], ["position", position]];
    if (lp[index] !== null) {
      const probability = Math.exp(lp[index]) * 100;
      facts.push(["logprob", lp[index].toFixed(4)], ["probability", `${probability.toPrecision(3)}%`]);
    }
    if (v[index] !== null) facts.push(["policy version", v[index]]);
    tip.replaceChildren(node("p", "head", sampled ? "sampled by the model" : "shown to the model"));
    for (const [name, value] of facts) {
      const line = node("p", "line");
      line.append(node("span", "", name), node("b", "", String(value)));
      tip.append(line);
    }
    place(event.clientX, event.clientY + 44);
  };
  document.addEventListener("pointerover", showToken);
  document.addEventListener("pointerdown", showToken);
  document.addEventListener("scroll", hide, { passive: true });
})();
