// Speed and depth over the last samples as plain SVG: one above the other, side by side on narrow screens.

const SVG = "http://www.w3.org/2000/svg";
const TITLE = 18; // pixels above each of the two
const GAP = 8; // below it
const SIDE = 20; // between them where they stand side by side
const FEWEST = 24; // samples for which there is room at least
const beside = matchMedia("(max-width: 820px)"); // as in the style

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** 1 to 10 in steps that people read, times a power of ten; at least the value. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value) * power;
}

/** Runs of neighbours that have a value: places and values. */
function runs(values) {
  const found = [[]];
  values.forEach((value, i) => {
    if (value !== null) found.at(-1).push([i, value]);
    else if (found.at(-1).length) found.push([]);
  });
  return found.filter((run) => run.length);
}

function pane(svg, values, { left, y, width, height, kind, title }) {
  const known = values.filter((value) => value !== null);
  const top = ceiling(Math.max(...known, 1));
  const right = left + width;
  const floor = y + height;
  const x = (i) => left + 4 + (i / (Math.max(FEWEST, values.length) - 1)) * (width - 8);
  const place = (value) => floor - (value / top) * height;
  svg.append(
    shape("text", { x: left, y: y - 6 }, title),
    shape("line", { x1: left, x2: right, y1: y, y2: y, class: "grid" }),
    shape("line", { x1: left, x2: right, y1: floor, y2: floor, class: "axis" }),
  );
  if (!known.length) return;
  svg.append(shape("text", { x: right, y: y - 6, class: "top" }, top.toLocaleString("en")));
  for (const run of runs(values)) {
    const points = run.map(([i, value]) => `${x(i).toFixed(1)},${place(value).toFixed(1)}`);
    const [from, to] = [x(run[0][0]), x(run.at(-1)[0])];
    const area = `M${from},${floor}L${points.join("L")}L${to},${floor}Z`;
    svg.append(shape("path", { d: area, class: `area ${kind}` }));
    svg.append(shape("polyline", { points: points.join(" "), class: `line ${kind}` }));
  }
  const last = values.findLastIndex((value) => value !== null);
  svg.append(shape("circle", { cx: x(last), cy: place(values[last]), r: 3.5, class: kind }));
}

/** Draws samples {speed, depth}; speed is null where nothing was decoded. */
export function draw(svg, samples) {
  const all = svg.clientWidth || 280;
  const width = beside.matches ? (all - SIDE) / 2 : all;
  const height = beside.matches ? 36 : 56;
  const step = TITLE + height + GAP;
  const total = beside.matches ? step : 2 * step;
  svg.setAttribute("viewBox", `0 0 ${all} ${total}`);
  svg.setAttribute("height", total);
  svg.replaceChildren();
  const speeds = samples.map((sample) => sample.speed);
  const depths = samples.map((sample) => sample.depth);
  const first = { left: 0, y: TITLE, width, height, kind: "speed", title: "tokens/s" };
  const second = { left: width + SIDE, kind: "depth", title: "depth" };
  const place = beside.matches ? {} : { left: 0, y: TITLE + step };
  pane(svg, speeds, first);
  pane(svg, depths, { ...first, ...second, ...place });
  const speed = speeds.findLast((value) => value !== null);
  svg.setAttribute(
    "aria-label",
    speed === undefined
      ? "Nothing was decoded yet."
      : `Chart: lately ${Math.round(speed).toLocaleString("en")} tokens per second ` +
          `at a depth of ${depths.at(-1).toLocaleString("en")} tokens.`,
  );
}
