"use strict";
// Shows one base at a time, so that a question fits on a screen.
const choice = document.querySelector(".switch");
const parts = [...document.querySelectorAll(".of-base")];

function show(base) {
  for (const part of parts) part.hidden = base !== "" && part.dataset.base !== base;
  for (const button of choice.querySelectorAll("button")) button.setAttribute("aria-pressed", String(button.dataset.base === base));
  dispatchEvent(new Event("resize")); // charts that were hidden take their width
}

if (choice) {
  choice.hidden = false;
  choice.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) show(button.dataset.base);
  });
  show(choice.querySelector("button").dataset.base);
}
