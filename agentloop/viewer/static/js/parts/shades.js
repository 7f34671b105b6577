// How tokens are shaded: each mode gives a class for a token, and the words that explain its colours.
import { fixed, number, signed } from "../core/format.js";

const finite = (value) => typeof value === "number" && Number.isFinite(value);

const PROBABILITY = [0.9, 0.6, 0.3, 0.1, 0.02];
const probability = (logprob) => {
  const p = Math.exp(logprob);
  return PROBABILITY.filter((bound) => p < bound).length; // 0: at least 90 %
};

const DIFFERENCE = [0.001, 0.01, 0.05, 0.2, 0.7];
const level = (size, bounds) => bounds.filter((bound) => size >= bound).length;

export const MODES = [
  {
    name: "trained", label: "Trained", key: "1",
    shade: (t, scale) => (t.trained || (t.sampled && !scale.saysTrained) ? "m-trained" : t.sampled ? "m-masked" : ""),
    legend: (scale) => (scale.saysTrained ? [["m-trained", "sampled and trained"], ["m-masked", "sampled, not trained"], ["", "shown to the model"]] : [["m-trained", "sampled (the trace does not say which were trained)"], ["", "shown to the model"]]),
  },
  {
    name: "logprob", label: "Probability", key: "2",
    shade: (t) => (t.sampled && finite(t.logprob) ? `p${probability(t.logprob)}` : ""),
    legend: () => [["p0", "≥ 90%"], ["p1", "≥ 60%"], ["p2", "≥ 30%"], ["p3", "≥ 10%"], ["p4", "≥ 2%"], ["p5", "less"]],
  },
  {
    name: "difference", label: "Engine − trainer", key: "3",
    shade: (t) => (t.sampled && finite(t.difference) ? `${t.difference < 0 ? "n" : "p"}${level(Math.abs(t.difference), DIFFERENCE)}` : ""),
    legend: () => [["n5", "trainer likelier: ≥ 0.7"], ["n3", "≥ 0.05"], ["p0", "< 0.001"], ["p3", "≥ 0.05"], ["p5", "engine likelier: ≥ 0.7"]],
    needs: "trainer_logprobs", lacks: "The trainer's log probabilities of this episode are not stored.",
  },
  {
    name: "advantage", label: "Advantage", key: "4",
    shade: (t, scale) => (finite(t.advantage) && t.advantage !== 0 ? `${t.advantage > 0 ? "g" : "r"}${Math.max(1, Math.ceil((5 * Math.abs(t.advantage)) / scale.advantage))}` : ""),
    legend: (scale) => [["r5", `−${fixed(scale.advantage, 2)}`], ["r2", ""], ["", "0 or none"], ["g2", ""], ["g5", `+${fixed(scale.advantage, 2)}`]],
    needs: "advantages", lacks: "No advantages are stored with this episode.",
  },
  {
    name: "version", label: "Policy version", key: "5",
    shade: (t, scale) => (t.version === null || t.version === undefined ? "" : `ver${(scale.versions.indexOf(t.version) % 6) + 1}`),
    legend: (scale) => scale.versions.slice(0, 8).map((version, i) => [`ver${(i % 6) + 1}`, `version ${version}`]),
  },
];

/** The facts of one token for the tip, as `[label, value]`. */
export function tokenFacts(t) {
  return [
    ["token id", String(t.id)],
    ["position", String(t.position)],
    finite(t.logprob) ? ["probability", `${(Math.exp(t.logprob) * 100).toPrecision(3)}%`] : null,
    finite(t.logprob) ? ["logprob", fixed(t.logprob, 4)] : null,
    finite(t.trainer) ? ["trainer's logprob", fixed(t.trainer, 4)] : null,
    finite(t.difference) ? ["engine − trainer", Math.abs(t.difference) < 1e-3 ? number(t.difference) : signed(t.difference, 4)] : null,
    finite(t.advantage) ? ["advantage", signed(t.advantage, 3)] : null,
    t.version === null || t.version === undefined ? null : ["policy version", String(t.version)],
  ].filter(Boolean);
}
