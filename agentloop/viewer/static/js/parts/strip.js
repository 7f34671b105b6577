// The whole trajectory as a strip: where it was sampled, and how strong the shading is. A click goes there.
import { h } from "../core/dom.js";
import { integer } from "../core/format.js";

const COLOURS = {
  "m-trained": "--c1", "m-masked": "--faint", p1: "--s1", p2: "--s2", p3: "--s3", p4: "--s4", p5: "--s5", n1: "--n1", n2: "--n2", n3: "--n3", n4: "--n4", n5: "--n5",
  g1: "--g1", g2: "--g2", g3: "--g3", g4: "--g4", g5: "--g5", r1: "--r1", r2: "--r2", r3: "--r3", r4: "--r4", r5: "--r5",
  ver1: "--c1", ver2: "--c2", ver3: "--c3", ver4: "--c4", ver5: "--c5", ver6: "--muted",
};
const strength = (name) => Number(/[1-5]$/.exec(name)?.[0] ?? 0);

export class Strip {
  constructor(columns, goTo) {
    this.columns = columns;
    this.canvas = h("canvas", { class: "strip", role: "img", "aria-label": "The whole trajectory at a glance; a click goes to that token" });
    this.mark = h("span", { class: "strip-mark", hidden: true });
    this.element = h("div", { class: "strip-box" }, this.canvas, this.mark);
    this.canvas.addEventListener("click", (event) => {
      const frame = this.canvas.getBoundingClientRect();
      goTo(Math.min(columns.length - 1, Math.floor(((event.clientX - frame.left) / frame.width) * columns.length)));
    });
  }

  draw(mode) {
    const { columns, canvas } = this;
    const width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    const height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
    canvas.width = width;
    canvas.height = height;
    canvas.setAttribute("aria-label", `The whole trajectory at a glance: ${integer(columns.length)} tokens; a click goes to that token`);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const paint = canvas.getContext("2d");
    paint.fillStyle = colour("--neutral-bg");
    paint.fillRect(0, 0, width, height);
    const bar = Math.max(1, Math.floor(height * 0.22));
    for (let x = 0; x < width; x++) {
      const from = Math.floor((x / width) * columns.length);
      const to = Math.max(from + 1, Math.floor(((x + 1) / width) * columns.length));
      let found = "";
      let sampled = false;
      const stride = Math.max(1, Math.floor((to - from) / 24));
      for (let i = from; i < to && i < columns.loaded; i += stride) {
        const token = columns.token(i);
        sampled ||= token.sampled;
        const name = mode.shade(token, columns.scale);
        if (name && (!found || strength(name) > strength(found))) found = name;
      }
      if (sampled) {
        paint.fillStyle = colour("--c1");
        paint.fillRect(x, height - bar, 1, bar);
      }
      const variable = COLOURS[found];
      if (variable) {
        paint.fillStyle = colour(variable);
        paint.fillRect(x, 0, 1, height - bar - 1);
      }
    }
  }

  at(position) {
    this.mark.hidden = position < 0;
    this.mark.style.left = `${(position / Math.max(1, this.columns.length)) * 100}%`;
  }
}
