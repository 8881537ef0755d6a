// Draws the charts: each has its specification in the element behind it.
"use strict";
const options = {
  mode: "vega-lite",
  renderer: "svg",
  actions: false,
  defaultStyle: false,
  ast: true, // expressions are interpreted: the page's policy forbids to make code of text
  tooltip: { disableDefaultStyle: true },
};
for (const element of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(element.nextElementSibling.textContent);
  window.vegaEmbed(element, spec, options).then(
    () => element.classList.add("drawn"),
    (error) => console.error(error),
  );
}
