// What makes the playground's page move: it asks the server to draw, and shows what came of it.
"use strict";

const POLL = 200; // milliseconds between looks at how far a drawing is
const COLUMNS = ["mean", "most", "cv", "gini", "unpicked", "entropy", "differs"]; // as page.py has them

const $ = id => document.getElementById(id);
const hasMaps = $("maps") !== null;
let drawing = null; // what the server told of the last one
let fetched = new Map(); // maps that were asked for, by address

// --- a wish ----------------------------------------------------------------------------------------------------------

// What the form says; a field that is left empty is left to the server.
function wish() {
  const said = {prompt: $("prompt").value, negative: $("negative").value, sampler: $("sampler").value};
  for (const name of ["seed", "steps", "guidance"]) {
    const input = $(name);
    if (input.validity.badInput) throw new Error(`${name} is no number`);
    if (input.value !== "") said[name] = Number(input.value);
  }
  return said;
}

function show(message) {
  $("message").textContent = message;
  $("message").hidden = message === "";
}

async function told(response) {
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

async function watch(signal) {
  while (!signal.aborted) {
    try {
      const {done, steps} = await told(await fetch("progress", {signal}));
      if (steps) {
        $("progress").max = steps;
        $("progress").value = done;
        $("draw").textContent = `step ${done} of ${steps}`;
      }
    } catch (error) {
      // Drawing itself says what is wrong.
    }
    await new Promise(wake => setTimeout(wake, POLL));
  }
}

async function draw(event) {
  event.preventDefault();
  if ($("draw").disabled) return;
  const watching = new AbortController();
  $("draw").disabled = true;
  $("draw").textContent = "drawing";
  show("");
  try {
    const body = JSON.stringify(wish());
    $("progress").hidden = false;
    $("progress").value = 0;
    watch(watching.signal);
    const asked = fetch("draw", {method: "POST", headers: {"Content-Type": "application/json"}, body});
    const response = await asked.catch(() => {
      throw new Error("the playground does not answer; is it still running?");
    });
    await put(await told(response));
  } catch (error) {
    show(error.message);
  } finally {
    watching.abort();
    $("draw").disabled = false;
    $("draw").textContent = "Draw";
    $("progress").hidden = true;
  }
}

// --- what came of it -------------------------------------------------------------------------------------------------

async function put(found) {
  drawing = found;
  fetched = new Map();
  const picture = $("picture");
  picture.src = found.pictures[0];
  picture.alt = found.prompt;
  await picture.decode();
  $("caption").textContent =
    `“${found.prompt}”${found.negative && ` without “${found.negative}”`}: seed ${found.seed}, ${found.steps} ${found.steps === 1 ? "step" : "steps"} ` +
    `of ${found.sampler}, guidance ${found.guidance}; ${found.size.join(" × ")} pixels in ${found.seconds.toFixed(1)} s`;
  $("warnings").replaceChildren(...found.warnings.map(warning => element("li", warning)));
  $("warnings").hidden = found.warnings.length === 0;
  if (hasMaps) {
    prepare();
    await showMap();
  }
  $("result").hidden = false;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

// Sliders and table for a new drawing; what was chosen stays chosen where it can.
function prepare() {
  const {layers, times, branches, evenness} = drawing;
  $("layer-slider").max = layers.length - 1;
  $("step-slider").max = times.length - 1;
  for (const option of $("branch").options) option.disabled = !(option.value in branches);
  if ($("branch").selectedOptions.length === 0 || $("branch").selectedOptions[0].disabled) $("branch").value = "conditional";
  $("rows").replaceChildren(...evenness.map(row => {
    const made = document.createElement("tr");
    made.tabIndex = 0;
    made.append(element("td", row.layer), ...COLUMNS.map(column => numberCell(column, row[column])));
    const choose = () => { $("layer-slider").value = layers.indexOf(row.layer); showMap(); };
    made.addEventListener("click", choose);
    made.addEventListener("keydown", event => { if (event.key === "Enter") choose(); });
    return made;
  }));
}

function numberCell(column, value) {
  const said = value === null ? "–" : column === "unpicked" ? `${(100 * value).toFixed(1)} %` :
    value.toFixed(column === "most" ? 0 : column === "mean" ? 2 : 3);
  const cell = element("td", said);
  cell.className = "number";
  return cell;
}

function chosen() {
  const step = Number($("step-slider").value);
  return {layer: Number($("layer-slider").value), step: $("mean").checked ? "mean" : step, branch: $("branch").value};
}

// The map's picture, once it is loaded.
function load({layer, step, branch}) {
  const query = new URLSearchParams({drawing: drawing.drawing, layer: drawing.layers[layer], step, branch});
  const address = `overlay?${query}`;
  if (!fetched.has(address)) {
    const image = new Image();
    image.src = address;
    const loaded = image.decode().then(() => image);
    loaded.catch(() => fetched.delete(address)); // it may be asked for again
    fetched.set(address, loaded);
  }
  return fetched.get(address);
}

async function showMap() {
  const want = chosen(), {layers, times, branches} = drawing, scale = branches[want.branch];
  const layer = layers[want.layer], isMean = want.step === "mean", place = Number($("step-slider").value);
  $("step-slider").disabled = isMean;
  $("layer-said").textContent = `${layer}`;
  $("step-said").textContent = isMean ? `all ${times.length}` : `${place + 1} of ${times.length}, t = ${times[place].toFixed(2)}`;
  $("low").textContent = String(scale.low).replace("-", "−");
  $("high").textContent = scale.high;
  $("ramp").style.background = `linear-gradient(to right, ${scale.colours.join(", ")})`;
  const lacks = !isMean && !scale.steps[place] ? "; this step was drawn without guidance, and has no such map" : "";
  $("meaning").textContent = scale.label + lacks;
  [...$("rows").children].forEach((row, i) => row.setAttribute("aria-selected", drawing.evenness[i].layer === layer));
  try {
    const image = await load(want);
    if (JSON.stringify(want) !== JSON.stringify(chosen())) return; // the slider has moved on
    $("overlay").src = image.src;
    $("overlay").alt = `experts that pick each patch in layer ${layer}, ${isMean ? "mean of all steps" : `step ${place + 1}`}`;
    ahead(want);
  } catch (error) {
    show("the heat map cannot be loaded: draw the picture again");
  }
}

// Maps beside the one that is seen, so that the next move of a slider finds them here.
function ahead(want) {
  if (want.step !== "mean") {
    for (const step of [want.step + 1, want.step - 1]) {
      if (step >= 0 && step < drawing.times.length) load({...want, step}).catch(() => {});
    }
  }
  for (const layer of [want.layer + 1, want.layer - 1]) {
    if (layer >= 0 && layer < drawing.layers.length) load({...want, layer}).catch(() => {});
  }
}

$("wish").addEventListener("submit", draw);
$("another").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e6); });
if (hasMaps) {
  for (const id of ["layer-slider", "step-slider", "mean", "branch"]) $(id).addEventListener("input", showMap);
}
