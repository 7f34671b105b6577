// Word-level difference of two texts, with a bounded cost: common ends are cut first, then Myers' greedy search up to
// MOST_EDITS edits on words, then on lines, and at last "all of it changed".

const MOST_EDITS = 1200;
const WORDS = /\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu;

/** Shortest edit script of two lists, or null when it takes more than `most` edits. */
function myers(a, b, most) {
  const limit = Math.min(most, a.length + b.length);
  const offset = limit + 1;
  let furthest = new Int32Array(2 * limit + 3);
  const trail = [];
  for (let d = 0; d <= limit; d++) {
    trail.push(furthest.slice(offset - d - 1, offset + d + 2));
    for (let k = -d; k <= d; k += 2) {
      let x = k === -d || (k !== d && furthest[offset + k - 1] < furthest[offset + k + 1]) ? furthest[offset + k + 1] : furthest[offset + k - 1] + 1;
      let y = x - k;
      while (x < a.length && y < b.length && a[x] === b[y]) {
        x += 1;
        y += 1;
      }
      furthest[offset + k] = x;
      if (x >= a.length && y >= b.length) return back(a, b, trail, d);
    }
  }
  return null;
}

function back(a, b, trail, edits) {
  const script = [];
  let x = a.length;
  let y = b.length;
  for (let d = edits; d > 0; d--) {
    const row = trail[d];
    const at = (k) => row[k + d + 1];
    const k = x - y;
    const down = k === -d || (k !== d && at(k - 1) < at(k + 1));
    const before = down ? k + 1 : k - 1;
    const fromX = at(before);
    const fromY = fromX - before;
    while (x > fromX && y > fromY && x > 0 && y > 0 && a[x - 1] === b[y - 1]) {
      x -= 1;
      y -= 1;
      script.push(["same", a[x]]);
    }
    if (down) script.push(["new", b[(y -= 1)]]);
    else script.push(["old", a[(x -= 1)]]);
  }
  while (x > 0) script.push(["same", a[(x -= 1)]]);
  return script.reverse();
}

function compare(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const middle = myers(a.slice(start, a.length - end), b.slice(start, b.length - end), MOST_EDITS);
  if (middle === null) return null;
  const same = (part) => ["same", part];
  return [...a.slice(0, start).map(same), ...middle, ...a.slice(a.length - end).map(same)];
}

function joined(script) {
  const parts = [];
  for (const [kind, text] of script) {
    const last = parts[parts.length - 1];
    if (last && last.kind === kind) last.text += text;
    else parts.push({ kind, text });
  }
  return parts;
}

/** `[{kind: "same" | "old" | "new", text}]`: parts of `before` are same and old, those of `after` same and new. */
export function diff(before, after) {
  if (before === after) return before ? [{ kind: "same", text: before }] : [];
  const words = compare(before.match(WORDS) ?? [], after.match(WORDS) ?? []);
  if (words) return joined(words);
  const lines = (text) => text.match(/[^\n]*\n|[^\n]+/g) ?? [];
  const script = compare(lines(before), lines(after));
  if (script) return joined(script);
  return [{ kind: "old", text: before }, { kind: "new", text: after }].filter((part) => part.text);
}
