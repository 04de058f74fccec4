"use strict";
// All samples that the page holds: filter, sort, page through, link to one. Their text only ever becomes text nodes.
const FIELDS = ["id", "group", "verdict", "reward", "length", "step", "prompt", "response", "answer", "extracted", "reason", "where", "tokens", "score", "components", "turns", "weighed"];
const A_PAGE = 20;
const box = document.getElementById("held-samples");

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

async function unpacked() {
  const bytes = Uint8Array.from(atob(document.getElementById("samples-data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const { texts, samples } = JSON.parse(await new Response(stream).text());
  return samples.map((row) => {
    const sample = Object.fromEntries(FIELDS.map((name, index) => [name, row[index]]));
    for (const name of ["group", "prompt", "answer", "where"]) sample[name] = texts[sample[name]];
    return sample;
  });
}

// Names of the components of rewards; a filter's field is named by the component's place, since names are hostile text.
const componentsOf = (samples) => [...new Set(samples.flatMap((sample) => Object.keys(sample.components)))].slice(0, 12);
const distinct = (samples, name) => [...new Set(samples.map((sample) => sample[name]))];
const known = (samples, name) => samples.some((sample) => sample[name] !== null);

function choice(label, name, options) {
  const select = make("select", { name });
  for (const [value, text] of options) {
    const option = make("option", { value });
    option.textContent = text;
    select.append(option);
  }
  return make("label", {}, label, select);
}

function range(label, name) {
  const ends = ["from", "to"].map((end) => make("input", { type: "number", step: "any", name: `${name}-${end}`, placeholder: end, "aria-label": `${label} ${end}` }));
  return make("label", { class: "range" }, label, make("span", {}, ...ends));
}

function filters(samples, components) {
  const form = make("form", { class: "filters", "aria-label": "Filter the samples" });
  const groups = distinct(samples, "group");
  if (groups.length > 1) form.append(choice("Stage or task", "group", [["", "all"], ...groups.map((name) => [name, name])]));
  form.append(choice("Verdict", "verdict", [["", "all"], ...distinct(samples, "verdict").map((name) => [name, name])]));
  for (const [label, name] of [["Reward", "reward"], ["Length", "length"], ["Step", "step"]]) if (known(samples, name)) form.append(range(label, name));
  for (const [index, name] of components.entries()) form.append(range(`Reward: ${name}`, `component${index}`));
  form.append(make("label", {}, "Text", make("input", { type: "search", name: "text" })));
  const orders = [["", "as they came"]];
  for (const [name, low, high] of [["reward", "lowest", "highest"], ["length", "shortest", "longest"], ["step", "earliest", "latest"]]) {
    if (known(samples, name)) orders.push([`${name}-up`, `${low} ${name} first`], [`${name}-down`, `${high} ${name} first`]);
  }
  for (const [index, name] of components.entries()) orders.push([`component${index}-up`, `lowest ${name} first`], [`component${index}-down`, `highest ${name} first`]);
  form.append(choice("Order", "order", orders));
  if (known(samples, "weighed")) form.append(choice("Tokens", "weighed", [["", "all samples"], ["kept", "with figures of their tokens"]]));
  form.append(make("button", { type: "reset" }, "Reset"));
  return form;
}

function chosen(samples, form, components) {
  const value = (name) => form.elements[name]?.value ?? "";
  const text = value("text").toLowerCase();
  const amount = (sample, name) => (name.startsWith("component") ? sample.components[components[Number(name.slice(9))]] ?? null : sample[name]);
  const within = (sample, name) => {
    const [from, to] = [value(`${name}-from`), value(`${name}-to`)];
    if (from === "" && to === "") return true;
    const number = amount(sample, name);
    return number !== null && (from === "" || number >= Number(from)) && (to === "" || number <= Number(to));
  };
  const found = samples.filter(
    (sample) =>
      (!value("group") || sample.group === value("group")) &&
      (!value("verdict") || sample.verdict === value("verdict")) &&
      (!value("weighed") || sample.weighed) &&
      ["reward", "length", "step", ...components.map((_, index) => `component${index}`)].every((name) => within(sample, name)) &&
      (!text || `${sample.prompt}\n${sample.response}\n${sample.answer}\n${sample.extracted}`.toLowerCase().includes(text)),
  );
  const [name, direction] = value("order").split("-");
  if (name) {
    const sign = direction === "down" ? -1 : 1;
    const at = (sample) => amount(sample, name);
    found.sort((a, b) => (at(a) === null) - (at(b) === null) || sign * (at(a) - at(b)));
  }
  return found;
}

// Each token of a sample, coloured by what training made of it.
function told(sample) {
  const { text, ...quantities } = sample.weighed;
  const names = Object.keys(quantities);
  const body = make("div", { class: "told" });
  const said = make("small");
  const paint = (name) => {
    const values = quantities[name];
    const most = Math.max(...values.map(Math.abs)) || 1;
    body.replaceChildren(
      ...text.map((piece, index) => {
        const token = make("span", { title: `${JSON.stringify(piece)}: ${name} ${values[index]}` });
        token.textContent = piece;
        token.style.setProperty("--tone", values[index] < 0 ? "var(--bad)" : "var(--link)");
        token.style.setProperty("--share", `${Math.round((70 * Math.abs(values[index])) / most)}%`);
        return token;
      }),
    );
    const low = Math.min(...values);
    said.textContent = `${name} from ${low} to ${Math.max(...values)}; blue is above 0, red below, darker is further from 0. Point at a token to read it.`;
    for (const button of bar.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.textContent === name));
  };
  const bar = make("div", { class: "told-by", role: "group", "aria-label": "Colour the tokens by" }, "Tokens by");
  for (const name of names) bar.append(make("button", { type: "button", "aria-pressed": "false", on: { click: () => paint(name) } }, name));
  paint(names[0]);
  return [bar, body, said];
}

function part(label, text) {
  const pre = make("pre");
  pre.textContent = text;
  return [make("small", {}, label), pre];
}

// Turn by turn: what the environment said is set apart, since the policy read it and no step trained it.
function turnByTurn(turns) {
  return turns.flatMap(([who, text]) => {
    const [label, pre] = part(who === "environment" ? "Environment (read, never trained)" : "Policy", text);
    if (who === "environment") pre.className = "observed";
    return [label, pre];
  });
}

function shown(sample) {
  const verdict = make("b", { class: sample.verdict });
  verdict.textContent = `${sample.verdict} ${sample.score}`.trim();
  const tokens = make("small");
  tokens.textContent = ` ${sample.tokens}`;
  const item = make("details", { class: "sample", id: sample.id }, make("summary", {}, verdict, ` ${sample.group.startsWith(sample.where) ? sample.group : `${sample.group.split(",")[0]}, ${sample.where}`} `, tokens));
  item.addEventListener("toggle", () => {
    if (!item.open || item.children.length > 1) return;
    const facts = [["Expected", sample.answer], ["Extracted", sample.extracted || "–"]];
    if (sample.reward !== null) facts.push(["Reward", String(sample.reward)]);
    for (const [name, value] of Object.entries(sample.components)) facts.push([`Reward: ${name}`, String(value)]);
    if (sample.reason) facts.push(["Reason", sample.reason]);
    const rows = facts.map(([name, value]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)));
    item.append(
      make("a", { class: "link", href: `#${sample.id}` }, "link to this sample"),
      ...part("Prompt", sample.prompt),
      ...(sample.turns.length ? turnByTurn(sample.turns) : part("Response", sample.response)),
      ...(sample.weighed ? told(sample) : []),
      make("table", { class: "facts pairs" }, make("tbody", {}, ...rows)),
    );
  });
  return item;
}

function browser(samples) {
  const components = componentsOf(samples);
  const form = filters(samples, components);
  const list = make("div", { id: "sample-list" });
  const count = make("span", { role: "status" });
  let found = samples;
  let page = 0;
  let sought = false; // whether a link empties the filters, and not the reader
  const turn = (to) => {
    page = to;
    draw();
  };
  const before = make("button", { type: "button", on: { click: () => turn(page - 1) } }, "← Before");
  const after = make("button", { type: "button", on: { click: () => turn(page + 1) } }, "Next →");
  const number = make("input", { type: "number", min: "1", "aria-label": "Page", style: "width: 4.5rem", on: { change: () => turn(Number(number.value) - 1) } });
  const last = () => Math.max(0, Math.ceil(found.length / A_PAGE) - 1);
  function draw() {
    page = Math.min(Math.max(0, Math.trunc(page) || 0), last());
    const start = page * A_PAGE;
    const part = found.slice(start, start + A_PAGE);
    list.replaceChildren(...part.map(shown));
    count.textContent = found.length ? `${(start + 1).toLocaleString("en")}–${(start + part.length).toLocaleString("en")} of ${found.length.toLocaleString("en")}` : "No sample fits.";
    before.disabled = page === 0;
    after.disabled = page >= last();
    number.value = String(page + 1);
    number.max = String(last() + 1);
  }
  function choose() {
    found = chosen(samples, form, components);
    turn(0);
  }
  function seek() {
    const id = decodeURIComponent(location.hash.slice(1));
    if (!id.startsWith("sample-")) return;
    let place = found.findIndex((sample) => sample.id === id);
    if (place < 0 && samples.some((sample) => sample.id === id)) {
      sought = true;
      form.reset();
      found = chosen(samples, form, components);
      place = found.findIndex((sample) => sample.id === id);
    }
    if (place < 0) return;
    turn(Math.floor(place / A_PAGE));
    const item = document.getElementById(id);
    item.open = true;
    item.classList.add("sought");
    item.scrollIntoView({ block: "start" });
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", choose);
  form.addEventListener("reset", () => {
    if (!sought) setTimeout(choose); // the fields are empty only after the event
    sought = false;
  });
  addEventListener("hashchange", seek);
  box.replaceChildren(form, make("div", { class: "pages" }, before, after, make("span", {}, "page ", number), count), list);
  draw();
  seek();
}

try {
  const samples = await unpacked();
  if (samples.length) browser(samples);
  document.documentElement.dataset.samples = "shown";
} catch (error) {
  document.getElementById("held-samples-note").append(` The other samples cannot be shown in this browser: ${error.message}.`);
  console.error(error);
}
