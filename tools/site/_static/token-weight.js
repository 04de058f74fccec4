// The figure of token-weight.md: cut a batch, and watch what the mean of micro-batch means does to the tokens' weights.
// It takes the place of the static picture, which readers without JavaScript see. #cuts=2,4,6 in the address sets it.
(() => {
  "use strict";
  const LENGTHS = [2, 2, 4, 4, 6, 8, 10, 12];
  const TOKENS = LENGTHS.reduce((sum, length) => sum + length, 0);
  const FIRST_CUTS = [2, 4, 6];

  /** The weight of each row's tokens, as a multiple of the right one; `cuts` are rows before which a micro-batch begins. */
  function weights(cuts, oneCount) {
    const borders = [0, ...cuts, LENGTHS.length];
    return LENGTHS.map((_, row) => {
      if (oneCount) return 1;
      const begin = Math.max(...borders.filter((border) => border <= row));
      const end = Math.min(...borders.filter((border) => border > row));
      const tokens = LENGTHS.slice(begin, end).reduce((sum, length) => sum + length, 0);
      return TOKENS / ((borders.length - 1) * tokens);
    });
  }

  /** Orange above one, blue below, grey at one. */
  function colour(weight) {
    const strength = Math.min(Math.abs(Math.log2(weight)) / 1.6, 1);
    const [red, green, blue] = weight > 1 ? [217, 95, 2] : [31, 119, 180];
    const mix = (channel) => Math.round(170 + (channel - 170) * strength);
    return `rgb(${mix(red)}, ${mix(green)}, ${mix(blue)})`;
  }

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function cutsOfAddress() {
    const found = /^#cuts=([\d,]*)$/.exec(location.hash);
    if (!found) return null;
    const cuts = found[1].split(",").filter(Boolean).map(Number);
    return [...new Set(cuts)].filter((cut) => cut > 0 && cut < LENGTHS.length).sort((a, b) => a - b);
  }

  function start(picture) {
    let cuts = cutsOfAddress() ?? FIRST_CUTS;
    let oneCount = false;
    const figure = element("div", { class: "token-weight", role: "group", "aria-label": "Weights of a batch's tokens" });
    picture.replaceWith(figure);

    function toggle(cut) {
      cuts = cuts.includes(cut) ? cuts.filter((other) => other !== cut) : [...cuts, cut].sort((a, b) => a - b);
      history.replaceState(null, "", `#cuts=${cuts.join(",")}`);
      draw(`cut-${cut}`);
    }

    function choice(text, value, id) {
      const button = element("button", { type: "button", id, "aria-pressed": String(oneCount === value) }, text);
      button.addEventListener("click", () => {
        oneCount = value;
        draw(id);
      });
      return button;
    }

    function border(cut) {
      const there = cuts.includes(cut);
      const words = there ? `join rows ${cut} and ${cut + 1}` : `cut between rows ${cut} and ${cut + 1}`;
      const button = element("button", {
        type: "button",
        id: `cut-${cut}`,
        class: there ? "border cut" : "border",
        title: words,
        "aria-label": words,
      });
      button.addEventListener("click", () => toggle(cut));
      return button;
    }

    function draw(focused) {
      const all = weights(cuts, oneCount);
      const rows = LENGTHS.flatMap((length, row) => {
        const tokens = element("span", { class: "tokens" });
        for (let token = 0; token < length; token++) {
          tokens.append(element("i", { style: `background: ${colour(all[row])}` }));
        }
        const line = element("div", { class: "row" }, tokens, element("b", {}, all[row].toFixed(2)));
        return row ? [border(row), line] : [line];
      });
      const largest = Math.max(...all) / Math.min(...all);
      const told = `${cuts.length + 1} micro-batch${cuts.length ? "es" : ""}. ` + (largest < 1.005
        ? "Every token counts the same."
        : `A token of one row counts ${largest.toFixed(1)} times as much as a token of another.`);
      figure.replaceChildren(
        element("div", { class: "choices" },
          choice("mean of micro-batch means", false, "means"),
          choice("one sum, one count", true, "count")),
        element("p", {}, "Click between two rows to cut the batch there, or to join it."),
        ...rows,
        element("p", { class: "told", "aria-live": "polite" }, told));
      if (focused) document.getElementById(focused)?.focus();
    }

    window.addEventListener("hashchange", () => {
      cuts = cutsOfAddress() ?? cuts;
      draw();
    });
    draw();
  }

  document.addEventListener("DOMContentLoaded", () => {
    const picture = document.querySelector('img[src$="token-weight-cut.svg"]');
    if (picture) start(picture);
  });
})();
