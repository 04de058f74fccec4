// Asks every two seconds whether a page has changed, and loads it again if so: its place on the screen stays.
const place = document.body.dataset.place;
const state = document.getElementById("state");
const update = document.getElementById("update");
const frame = document.getElementById("page");
if (location.hash) frame.src += location.hash;
let shown = null;

async function look() {
  try {
    const answer = await fetch(`/state/${place}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const now = await answer.json();
    state.textContent = now.said;
    if (shown === null) shown = now.stamp;
    if (update.checked && !document.hidden && now.stamp !== shown) {
      shown = now.stamp;
      frame.contentWindow.location.reload();
    }
  } catch {
    state.textContent = "thence serve has ended; what is shown stays as it was";
  }
  setTimeout(look, 2000);
}
look();
