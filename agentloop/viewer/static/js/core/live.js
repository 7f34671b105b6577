// What the server says while runs go on: server-sent events, or polling where they do not come through.
import { get } from "./api.js";

const POLL_MS = 5000;
const listeners = new Set();
const states = new Set();
let source = null;
let failures = 0;
let timer = 0;
let last = new Map();
export let state = "connecting"; // "connecting" | "events" | "polling" | "lost"

function become(next) {
  if (state === next) return;
  state = next;
  for (const call of states) call(state);
}

function emit(event) {
  for (const call of [...listeners]) call(event);
}

function listen() {
  source = new EventSource("/api/events");
  source.onopen = () => {
    failures = 0;
    clearTimeout(timer);
    timer = 0;
    become("events");
  };
  const read = (message) => {
    try {
      emit(JSON.parse(message.data));
    } catch {
      // a comment or a keep-alive
    }
  };
  source.onmessage = read;
  for (const kind of ["step", "finished", "run", "reload", "call"]) source.addEventListener(kind, read);
  source.onerror = () => {
    failures += 1;
    if (source.readyState === EventSource.CLOSED || failures >= 3) {
      source.close();
      poll();
    } else become("connecting");
  };
}

async function poll() {
  try {
    const { runs } = await get("/api/runs");
    const seen = new Map(runs.map((run) => [run.id, `${run.steps}/${run.live}`]));
    for (const run of runs) {
      const before = last.get(run.id);
      if (last.size && before !== seen.get(run.id)) emit({ run: run.id, kind: before === undefined ? "run" : run.live ? "step" : "finished", step: run.steps });
    }
    if (state === "lost") emit({ kind: "reload", run: null });
    last = seen;
    become("polling");
  } catch {
    become("lost");
  }
  timer = setTimeout(poll, POLL_MS);
}

export function start() {
  if (typeof EventSource === "undefined") poll();
  else listen();
  document.addEventListener("visibilitychange", visible);
}

/** A browser holds six connections to a server: pages that nobody sees give theirs back. */
function visible() {
  if (typeof EventSource === "undefined") return;
  if (document.hidden) {
    source?.close();
    clearTimeout(timer);
  } else {
    failures = 0;
    listen();
    emit({ kind: "reload", run: null });
  }
}

/**
 * Call `heard({run, kind, step})` for each event, or only for those that concern `run`; "reload": some were missed.
 * Returns the function that stops it.
 */
export function subscribe(heard, run) {
  const call = run === undefined ? heard : (event) => (event.run === run || event.kind === "reload") && heard(event);
  listeners.add(call);
  return () => listeners.delete(call);
}

export function watchState(changed) {
  states.add(changed);
  changed(state);
}
