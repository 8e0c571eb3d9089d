"use strict";
// The values nearest to the pointer, read from the numbers beside each chart.
const tip = document.getElementById("tip");
const space = document.querySelector("svg").namespaceURI;

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

function add(parent, name, attributes) {
  const made = document.createElementNS(space, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  parent.append(made);
  return made;
}

function part(parent, name, text, kind) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}

for (const holder of document.querySelectorAll(".chart")) {
  const chart = JSON.parse(holder.querySelector("script").textContent);
  const svg = holder.querySelector("svg");
  const pointer = svg.querySelector(".pointer");
  const series = chart.series.filter((each) => each.x.length);
  const area = svg.querySelector(".catch");

  area.addEventListener("pointermove", (event) => {
    if (!series.length) return;
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const found = series.map((each) => nearest(each.x, x));
    const distance = (s) => Math.abs(series[s].x[found[s]] - x);
    const best = found.map((_, s) => s).reduce((a, b) => (distance(b) < distance(a) ? b : a));
    const at = series[best].x[found[best]];
    pointer.replaceChildren();
    add(pointer, "line", { x1: at, x2: at, y1: chart.box[1], y2: chart.box[3] });
    tip.replaceChildren();
    part(tip, "b", chart.label + " " + series[best].at[found[best]]);
    series.forEach((each, s) => {
      const i = found[s];
      if (Math.abs(each.x[i] - at) > 12) return;
      add(pointer, "circle", { cx: each.x[i], cy: each.y[i], r: 4, class: "s" + each.color });
      const row = part(tip, "div");
      part(row, "i", "", "swatch s" + each.color);
      part(row, "em", each.name);
      part(row, "b", each.value[i]);
      if (each.extra) part(row, "em", each.extra[i]);
    });
    tip.style.display = "block";
    const width = tip.offsetWidth, room = document.documentElement.clientWidth;
    const left = event.clientX + 16 + width > room ? event.clientX - 16 - width : event.clientX + 16;
    tip.style.left = Math.max(0, left) + window.scrollX + "px";
    tip.style.top = event.clientY + window.scrollY + 12 + "px";
  });
  area.addEventListener("pointerleave", () => {
    pointer.replaceChildren();
    tip.style.display = "none";
  });
}
