// A range input that shows one of several stops.
"use strict";
for (const figure of document.querySelectorAll("figure.slider")) {
  const input = figure.querySelector("input[type=range]");
  const output = figure.querySelector("output");
  const stops = [...figure.querySelectorAll(".stop")];
  const name = input.getAttribute("aria-valuetext").split(" = ")[0];
  const show = () => {
    const chosen = stops[Number(input.value)];
    for (const stop of stops) stop.hidden = stop !== chosen;
    output.value = chosen.dataset.label;
    input.setAttribute("aria-valuetext", `${name} = ${chosen.dataset.label}`);
  };
  input.addEventListener("input", show);
  show();
}
