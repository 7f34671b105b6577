// The server's JSON. What never changes once written (episodes, tokens) is kept in a small cache.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** `{a: 1, b: [2, 3], c: ""}` -> `a=1&b=2&b=3`. */
export function query(params) {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(params ?? {})) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined && one !== "") pairs.append(name, one);
    }
  }
  return pairs.toString();
}

export async function get(path, params, { signal, text = false } = {}) {
  const asked = query(params);
  let response;
  try {
    response = await fetch(asked ? `${path}?${asked}` : path, { signal, credentials: "same-origin", headers: { accept: "application/json" } });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ApiError(0, "The server does not answer. Is `agentloop trace serve` still running?");
  }
  if (!response.ok) {
    let detail = `${response.status} ${response.statusText}`;
    try {
      const body = await response.json();
      if (typeof body.detail === "string") detail = body.detail;
      else if (Array.isArray(body.detail)) detail = body.detail.map((one) => `${(one.loc ?? []).join(".")}: ${one.msg}`).join("; ");
    } catch {
      // not JSON: the status line says it
    }
    if (response.status === 401) detail = "This server asks for its token: open the link that `agentloop trace serve` printed.";
    throw new ApiError(response.status, detail);
  }
  return text ? response.text() : response.json();
}

const runPath = (run, rest = "") => `/api/runs/${encodeURIComponent(run)}${rest}`;

const MOST_KEPT = 48;
const kept = new Map();

async function once(path, params) {
  const name = `${path}?${query(params)}`;
  if (kept.has(name)) {
    const value = kept.get(name);
    kept.delete(name);
    kept.set(name, value);
    return value;
  }
  const asked = get(path, params);
  kept.set(name, asked);
  if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
  try {
    return await asked;
  } catch (problem) {
    kept.delete(name);
    throw problem;
  }
}

export const api = {
  runs: (options) => get("/api/runs", null, options),
  trace: (id) => get(`/api/traces/${encodeURIComponent(id)}`),
  run: (run) => get(runPath(run)),
  metrics: (run, keys, points = 600) => get(runPath(run, "/metrics"), { keys: keys?.join(","), points }),
  episodes: (run, params, options) => get(runPath(run, "/episodes"), params, options),
  around: (run, key, params) => get(runPath(run, "/around"), { ...params, key }),
  episode: (run, key) => once(runPath(run, "/episode"), { key }),
  tokens: (run, key, start, end) => once(runPath(run, "/tokens"), { key, start, end }),
  group: (run, params) => get(runPath(run, "/group"), params),
  task: (run, task) => get(runPath(run, "/task"), { task_id: task }),
  failures: (run) => get(runPath(run, "/failures")),
  signals: (run) => get(runPath(run, "/signals")),
  image: (run, digest) => runPath(run, `/image/${encodeURIComponent(digest)}`),
  calls: (params, options) => get("/api/external/calls", params, options),
  object: (params) => get("/api/external/object", params),
  file: (digest) => get(`/api/external/file/${encodeURIComponent(digest)}`, null, { text: true }),
  call: (params) => get("/api/external/call", params),
};
