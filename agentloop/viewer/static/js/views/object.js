// One version of an object that a weave client published, such as a dataset or the code of an op.
import { api } from "../core/api.js";
import { h, replace } from "../core/dom.js";
import { clock } from "../core/format.js";
import { go, link } from "../core/route.js";
import { block, say } from "../core/text.js";
import { facts } from "../parts/badges.js";
import { tree } from "../parts/values.js";

export class ObjectView {
  title = "Object";

  constructor({ parts }) {
    [this.entity, this.project, this.name, this.digest] = parts;
    this.calls = link(["calls"], { project: `${this.entity}/${this.project}` });
    this.element = h("div", { class: "page" });
  }

  bindings() {
    return [{ keys: ["u", "Escape"], what: "the calls of the project", run: () => go(this.calls) }];
  }

  /** The code of an op, which is a file of its own; null for other objects. */
  async code(value) {
    const digest = value?.files?.["obj.py"];
    return typeof digest === "string" ? api.file(digest).catch(() => null) : null;
  }

  async load() {
    const { obj } = await api.object({ entity: this.entity, project: this.project, name: this.name, digest: this.digest });
    this.title = this.name;
    const code = await this.code(obj.val);
    replace(this.element,
      h("header", { class: "page-head" }, h("h1", null, say(this.name, 200)), h("p", { class: "sub" }, h("a", { href: this.calls }, say(`${this.entity}/${this.project}`, 120)),
        h("span", null, obj.kind === "op" ? "code of an op" : "published object"), h("span", null, `version ${obj.version_index}${obj.is_latest ? ", the latest" : ""}`), h("span", null, clock(obj.created_at)))),
      code === null ? null : h("section", { class: "card part-card" }, h("h2", null, "Code"), block(code, "v-block")),
      h("section", { class: "card part-card" }, h("h2", null, "Value"), tree(obj.val)),
      h("section", { class: "card part-card" }, h("h2", null, "Identity"), facts([["class", obj.base_object_class], ["digest", h("code", null, say(obj.digest))]])));
  }
}
