// Every view has an address: `#/run/NAME/episodes?status=failed&sort=-reward`. All filters are in its query.
import { query } from "./api.js";

/** `{parts: ["run", "NAME", "episodes"], params: URLSearchParams}` of the current address. */
export function current() {
  const call = /^\/([^/]+)\/([^/]+)\/r\/call\/([^/]+)$/.exec(location.pathname);
  if (call && location.hash.length < 2) return { parts: ["call", decode(call[3])], params: new URLSearchParams() };
  const object = /^\/([^/]+)\/([^/]+)\/weave\/(?:objects|ops)\/([^/]+)\/versions\/([^/]+)\/?$/.exec(location.pathname);
  if (object && location.hash.length < 2) return { parts: ["object", ...object.slice(1).map(decode)], params: new URLSearchParams() };
  const project = /^\/([^/]+)\/([^/]+?)(\/weave(\/.*)?)?\/?$/.exec(location.pathname);
  if (project && project[1] !== "static" && location.hash.length < 2) {
    const page = project[4]?.slice(1).split("/")[0] ?? "";
    const other = ["", "calls", "traces"].includes(page) ? {} : { other: decode(page) };
    return { parts: ["calls"], params: new URLSearchParams({ project: `${decode(project[1])}/${decode(project[2])}`, ...other }) };
  }
  const [path, asked] = split(location.hash.slice(1));
  return { parts: path.split("/").filter(Boolean).map(decode), params: new URLSearchParams(asked) };
}

function split(hash) {
  const mark = hash.indexOf("?");
  return mark < 0 ? [hash, ""] : [hash.slice(0, mark), hash.slice(mark + 1)];
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** Address of a view: `link(["run", run, "episodes"], {status: ["failed"]})`. */
export function link(parts, params) {
  const asked = query(params);
  return `/#/${parts.map(encodeURIComponent).join("/")}${asked ? `?${asked}` : ""}`;
}

export function go(address) {
  location.assign(address);
}

/** Change the address without a new entry in the history and without leaving the view. */
export function rewrite(address) {
  history.replaceState(null, "", address);
}

/** All values of a query as a plain object: single ones as text, repeated ones as lists. */
export function values(params) {
  const found = {};
  for (const name of new Set(params.keys())) {
    const all = params.getAll(name);
    found[name] = all.length > 1 ? all : all[0];
  }
  return found;
}

export const episodeLink = (run, key, params) => link(["run", run, "episode"], { key, ...params });
/** `list`: the filters to go back to, which have parameters of these views' own names. */
export const groupLink = (run, row, list) => link(["run", run, "group"], { step: row.step, split: row.split, group_id: row.group_id, list: query(list) });
export const taskLink = (run, task, list) => link(["run", run, "task"], { task_id: task, list: query(list) });

/** The filters that `groupLink` and `taskLink` put into an address. */
export const listOf = (params) => values(new URLSearchParams(params.get("list") ?? ""));
