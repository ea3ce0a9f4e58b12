// SPDX-License-Identifier: Apache-2.0
// A line over the last hour, with its latest value beside its name.

import { h } from "./dom.js";
import { t } from "./i18n.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [240, 40];
const SECONDS = 3600;

/**
 * A chart of `points`, [seconds since 1970, value] with a null value where there is none.
 * `most` is the value at the top; null: the highest there is.
 */
export function chart(name, points, { most = null, format }) {
  const known = points.filter(([, value]) => value !== null && value !== undefined);
  const top = most ?? Math.max(1, ...known.map(([, value]) => value));
  const latest = known.length ? format(known.at(-1)[1]) : "–";
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none",
    role: "img", "aria-label": t("chart", { name, latest }) });
  picture.append(svg("polyline", { points: line(known, top) }));
  return h("div", { class: "chart" }, h("span", {}, name), picture, h("span", {}, latest));
}

function line(points, top) {
  const now = Date.now() / 1000;
  return points
    .map(([time, value]) => {
      const x = WIDTH * (1 - (now - time) / SECONDS);
      const y = HEIGHT - 1 - (HEIGHT - 2) * Math.min(1, value / top);
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    })
    .join(" ");
}

function svg(tag, properties) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  return element;
}

export const percent = (share) => `${Math.round(100 * share)} %`;
