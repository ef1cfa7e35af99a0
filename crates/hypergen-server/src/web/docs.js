// Draws the documentation page from openapi.json, and sends the form. It
// loads nothing from other servers and keeps nothing, the key included.
"use strict";

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; texts are never read as HTML. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A text with what stands in backticks as code. */
function rich(text) {
  return (text ?? "").split("`").map((part, i) => (i % 2 ? element("code", {}, part) : part));
}

/** JSON whose longest whole numbers are texts: numbers here have only 53 bits. */
function parse(text) {
  return JSON.parse(text.replace(/"([^"\\]+)":(\d{16,})(?=[,}\]])/g, '"$1":"$2"'));
}

/** A schema's type in a few words. */
function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  const options = schema.oneOf || schema.anyOf;
  if (options) return options.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.filter((word) => word !== null).join(", ");
  const types = [].concat(schema.type ?? "any").filter((type) => type !== "null");
  if (types[0] === "array") return "list of " + typeOf(schema.items);
  let text = types.join(" or ");
  if (schema.minimum !== undefined && schema.maximum !== undefined) text += ` ${schema.minimum} to ${schema.maximum}`;
  return text;
}

function table(schema) {
  const body = element("tbody");
  for (const [name, property] of Object.entries(schema.properties ?? {})) {
    const required = (schema.required ?? []).includes(name) ? "required" : "";
    const initial = property.default === undefined ? required : "default " + JSON.stringify(property.default);
    body.append(element("tr", {},
      element("td", {}, element("code", {}, name)),
      element("td", {}, typeOf(property)),
      element("td", {}, initial),
      element("td", {}, ...rich(property.description))));
  }
  return element("table", {}, body);
}

function route(method, path, operation) {
  const box = element("details", { class: "route" },
    element("summary", {}, element("span", { class: "method" }, method.toUpperCase()), element("code", {}, path),
      " ", ...rich(operation.summary ?? operation.description)));
  for (const content of Object.values(operation.requestBody?.content ?? {})) {
    box.append(element("p", {}, "Body: " + typeOf(content.schema)));
  }
  const answers = element("tbody");
  for (const [status, answer] of Object.entries(operation.responses ?? {})) {
    const kinds = Object.entries(answer.content ?? {}).map(([kind, content]) => `${typeOf(content.schema)} (${kind})`);
    answers.append(element("tr", {}, element("td", {}, status), element("td", {}, ...rich(answer.description)),
      element("td", {}, kinds.join(", "))));
  }
  box.append(element("table", {}, answers));
  return box;
}

async function describe() {
  const answer = await fetch("openapi.json");
  const api = parse(await answer.text());
  byId("about").replaceChildren(...rich(api.info.description), ` Version ${api.info.version}.`);
  for (const [path, item] of Object.entries(api.paths)) {
    for (const method of ["get", "post", "put", "patch", "delete"]) {
      if (item[method]) byId("routes").append(route(method, path, item[method]));
    }
  }
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    byId("schemas").append(element("details", { class: "schema" }, element("summary", {}, element("code", {}, name)),
      element("p", {}, ...rich(schema.description)), table(schema)));
  }
  const properties = api.components.schemas.ImageRequest.properties;
  const form = document.forms[0];
  for (const [name, property] of Object.entries(properties)) {
    const input = form.elements[name];
    if (!input) continue;
    input.title = property.description ?? "";
    if (input.type === "number") { input.min = property.minimum; input.max = property.maximum; }
    if (property.default !== undefined && !input.value) input.placeholder = property.default;
    if (input.tagName === "SELECT") {
      for (const word of property.enum ?? []) if (word !== null) input.append(element("option", {}, word));
    }
  }
  command();
}

/** The form as a JSON text; the seed is pasted in, as numbers here have only 53 bits. */
function body() {
  const fields = { response_format: "b64_json" };
  let seed = "";
  for (const input of document.forms[0].elements) {
    const value = input.value.trim();
    if (!input.name || input.name === "key" || value === "") continue;
    if (input.name === "seed") seed = value;
    else fields[input.name] = input.type === "number" ? Number(value) : value;
  }
  const text = JSON.stringify(fields);
  if (!seed) return text;
  return text.slice(0, -1) + ',"seed":' + (/^\d+$/.test(seed) ? seed : JSON.stringify(seed)) + "}";
}

function command() {
  const address = new URL("v1/images/generations", document.baseURI).href;
  const key = document.forms[0].elements.key.value ? ' -H "Authorization: Bearer $HYPERGEN_API_KEY"' : "";
  const data = body().replaceAll("'", "'\\''");
  byId("command").textContent = `curl ${address}${key} -H 'Content-Type: application/json' -d '${data}'`;
}

let running = null;

async function draw(event) {
  event.preventDefault();
  running?.abort();
  const mine = running = new AbortController();
  const status = byId("status");
  status.className = "";
  status.textContent = "Drawing…";
  byId("stop").hidden = false;
  const start = performance.now();
  try {
    const headers = { "content-type": "application/json" };
    const key = document.forms[0].elements.key.value;
    if (key) headers.authorization = "Bearer " + key;
    const answer = await fetch("v1/images/generations", { method: "POST", headers, body: body(), signal: mine.signal });
    const text = await answer.text();
    const data = parse(text);
    if (!answer.ok) throw new Error(data.detail);
    byId("pictures").replaceChildren(...data.data.map((picture) => element("figure", {},
      element("img", { src: "data:image/png;base64," + picture.b64_json, alt: picture.revised_prompt }),
      element("figcaption", {}, "seed " + picture.seed))));
    const warning = answer.headers.get("x-hypergen-warning");
    status.textContent = `${((performance.now() - start) / 1000).toFixed(2)} s` + (warning ? `. ${warning}` : "");
  } catch (error) {
    status.className = "error";
    status.textContent = error.name === "AbortError" ? "Stopped." : error.message;
  }
  if (running === mine) byId("stop").hidden = true;
}

document.forms[0].addEventListener("submit", draw);
document.forms[0].addEventListener("input", command);
byId("stop").addEventListener("click", () => running?.abort());
describe().catch((error) => { byId("about").textContent = "The description could not be loaded: " + error.message; });
