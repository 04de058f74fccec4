"use strict";
// Hands every specification of the page to Vega, and gives each chart its keys and its buttons.
const views = new Map();

function specOf(box) {
  return JSON.parse(box.parentElement.querySelector("script.spec").textContent);
}

function tell(box, signal, value) {
  const view = views.get(box);
  if (view) view.signal(signal, value).runAsync();
}

async function draw(box) {
  const options = { renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip: { disableDefaultStyle: true } };
  const { view } = await window.vegaEmbed(box, specOf(box), options);
  views.set(box, view);
}

// A domain that is smaller or larger than the one in view, around the same middle.
function scaled([low, high], factor, log) {
  const [a, b] = log ? [Math.log(low), Math.log(high)] : [low, high];
  const middle = (a + b) / 2;
  const half = ((b - a) / 2) * factor;
  const ends = [middle - half, middle + half];
  return log ? ends.map(Math.exp) : ends;
}

function zoomBy(box, factor) {
  const view = views.get(box);
  if (!view) return;
  const known = view.getState({ signals: (name) => /^zoom_[xy]$/.test(name), data: () => false }).signals;
  for (const name of Object.keys(known)) {
    const scale = view.scale(name.slice(-1));
    view.signal(name, factor === null ? null : scaled(scale.domain(), factor, scale.type === "log"));
  }
  view.runAsync();
}

function button(text, label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.title = label;
  made.addEventListener("click", act);
  return made;
}

function addButtons(box) {
  if (!/"name":"zoom"/.test(box.parentElement.querySelector("script.spec").textContent)) return;
  const bar = document.createElement("span");
  bar.className = "zoom";
  bar.append(
    button("+", "Zoom in", () => zoomBy(box, 0.5)),
    button("−", "Zoom out", () => zoomBy(box, 2)),
    button("⟲", "Show all", () => zoomBy(box, null)),
  );
  box.parentElement.append(bar);
}

function addKeys(figure) {
  const keys = [...figure.querySelectorAll(".keys button")];
  const boxes = [...figure.querySelectorAll(".chart")];
  const apply = () => {
    const off = keys.filter((key) => key.getAttribute("aria-pressed") === "false").map((key) => key.dataset.name);
    for (const box of boxes) tell(box, "off", off);
  };
  const only = (key) => {
    const alone = keys.every((other) => (other.getAttribute("aria-pressed") === "true") === (other === key));
    for (const other of keys) other.setAttribute("aria-pressed", String(alone || other === key));
    apply();
  };
  for (const key of keys) {
    key.disabled = false;
    key.addEventListener("click", (event) => {
      if (event.shiftKey) return only(key);
      key.setAttribute("aria-pressed", String(key.getAttribute("aria-pressed") === "false"));
      return apply();
    });
  }
}

for (const figure of document.querySelectorAll("figure.charts")) addKeys(figure);
for (const box of document.querySelectorAll(".chart")) {
  try {
    await draw(box);
    addButtons(box);
  } catch (error) {
    box.textContent = `This chart cannot be drawn: ${error.message}`;
    console.error(error);
  }
}
document.documentElement.dataset.charts = "drawn";
