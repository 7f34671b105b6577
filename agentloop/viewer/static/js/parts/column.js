// The tokens of one trajectory, fetched in windows; `token(i)` is everything that is known of one.
import { api } from "../core/api.js";

const FIRST = 4096;
const WINDOW = 16_384;

export class TokenColumns {
  constructor(run, key) {
    Object.assign(this, { run, key, length: 0, loaded: 0, prompt: 0, hasText: true });
    this.ids = [];
    this.pieces = [];
    this.mask = [];
    this.columns = { logprobs: [], trainer_logprobs: [], advantages: [], versions: [] };
    this.known = {};
    this.special = new Set();
    this.scale = { advantage: 1, versions: [] };
    this.largest = 0;
    this.left = false;
  }

  /** Ask for the first window early, beside the episode; it is kept until it is wanted. */
  static first(run, key) {
    api.tokens(run, key, 0, FIRST).catch(() => {}); // the view that wants it shows the error
  }

  stop() {
    this.left = true;
  }

  /** Load all windows, calling `arrived(start, end)` after each; the first one is small. */
  async load(arrived) {
    let end = FIRST;
    do {
      const part = await api.tokens(this.run, this.key, this.loaded, end);
      if (this.left) return;
      this.take(part);
      arrived(part.start, this.loaded);
      end = Math.min(this.length, this.loaded + WINDOW);
      await new Promise((done) => setTimeout(done, 0));
    } while (this.loaded < this.length && !this.left);
  }

  take(part) {
    const count = part.ids.length;
    this.length = part.length ?? part.start + count;
    this.prompt = part.prompt_length ?? this.prompt;
    if (part.has_text === false || !part.pieces) this.hasText = false;
    for (const id of part.special ?? []) this.special.add(id);
    for (let i = 0; i < count; i++) {
      this.ids.push(part.ids[i]);
      this.pieces.push(part.pieces?.[i] ?? `${part.ids[i]} `);
      this.mask.push(part.mask[i]);
    }
    for (const [name, column] of Object.entries(this.columns)) {
      const given = part[name];
      if (given) this.known[name] = true;
      for (let i = 0; i < count; i++) column.push(given ? given[i] : null);
    }
    for (const value of part.advantages ?? []) if (value !== null) this.largest = Math.max(this.largest, Math.abs(value));
    this.scale.advantage = this.largest || 1;
    const seen = new Set(this.scale.versions);
    for (const version of part.versions ?? []) if (version !== null) seen.add(version);
    this.scale.versions = [...seen].sort((a, b) => a - b);
    this.loaded = part.start + count;
    if (!count) this.loaded = this.length; // never ask for the same window again
  }

  token(i) {
    const { logprobs, trainer_logprobs: trainers, advantages, versions } = this.columns;
    const logprob = logprobs[i];
    const trainer = trainers[i];
    const sampled = Boolean(this.mask[i]);
    const both = typeof logprob === "number" && typeof trainer === "number";
    const advantage = sampled ? advantages[i] : null;
    return {
      position: i, id: this.ids[i], text: this.pieces[i], sampled, logprob, trainer, advantage, version: versions[i],
      difference: both ? logprob - trainer : null, trained: sampled && typeof advantage === "number", special: this.special.has(this.ids[i]),
    };
  }
}
