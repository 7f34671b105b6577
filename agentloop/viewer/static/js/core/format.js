// Numbers as the reader wants them. Missing ones are an en dash, never 0.
export const NONE = "–";

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Three significant digits, scientific outside 1e-3 .. 1e5. */
export function number(value) {
  if (!known(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(1);
  if (size >= 1e5) return compact(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (Number.isInteger(value)) return String(value);
  return size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : value.toFixed(3);
}

export function fixed(value, digits = 3) {
  return known(value) ? value.toFixed(digits) : NONE;
}

/** A number with its sign: +0.250. */
export function signed(value, digits = 3) {
  return known(value) ? `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(digits)}` : NONE;
}

export function integer(value) {
  return known(value) ? Math.round(value).toLocaleString("en") : NONE;
}

export function compact(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return `${(value / unit).toPrecision(3).replace(/\.0+$|(\.\d*?)0+$/, "$1")}${letter}`;
  }
  return String(value);
}

export function seconds(value) {
  if (!known(value)) return NONE;
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
}

export function bytes(value) {
  if (!known(value)) return NONE;
  if (value < 1000) return `${value} B`;
  for (const [unit, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) if (value >= unit) return `${(value / unit).toPrecision(3)} ${name}`;
  return NONE;
}

export function percent(value, digits = 1) {
  return known(value) ? `${(value * 100).toFixed(digits)}%` : NONE;
}

/** Milliseconds since 1970 of seconds, milliseconds or an ISO text; null when it is none of them. */
export function moment(value) {
  if (known(value)) return value < 1e11 ? value * 1000 : value;
  const parsed = typeof value === "string" ? Date.parse(value) : Number.NaN;
  return Number.isNaN(parsed) ? null : parsed;
}

export function ago(value, now = Date.now()) {
  const at = moment(value);
  if (at === null) return NONE;
  const past = Math.max(0, (now - at) / 1000);
  if (past < 5) return "now";
  if (past < 60) return `${Math.floor(past)} s ago`;
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 172_800) return `${Math.floor(past / 3600)} h ago`;
  return `${Math.floor(past / 86_400)} days ago`;
}

export function clock(value) {
  const at = moment(value);
  if (at === null) return NONE;
  const date = new Date(at);
  const two = (part) => String(part).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

/** The last two names of a path, or the whole of what is not one. */
export function baseName(path) {
  const parts = String(path).split("/").filter(Boolean);
  return parts.length > 2 ? parts.slice(-2).join("/") : String(path);
}

export function plural(count, one, many = `${one}s`) {
  return `${integer(count)} ${count === 1 ? one : many}`;
}
