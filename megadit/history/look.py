"""The look of a run's report: colours and dashes that tell curves apart, and the marks of events."""

from __future__ import annotations

from dataclasses import dataclass

from megadit.history.story import Event
from megadit.runtime.status import FINISHED, STOPPED

# Series differ in lightness and dash too, so that they are told apart without seeing hue, and in print.
SERIES = {
    "s0": ("#256abf", "#5598e7"),
    "s1": ("#c2410c", "#f0935f"),
    "s2": ("#0c7d55", "#3ecf9b"),
    "s3": ("#7a3fb0", "#b79af0"),
    "s4": ("#8a6a00", "#e0b83a"),
    "s5": ("#b02a6b", "#f08cbc"),
}
# Of the mean load, how much an expert took: least to most, the fair share in the middle.
HEAT = {
    "heat0": ("#123f7a", "#2f6fc4"),
    "heat1": ("#4f8fdc", "#27518c"),
    "heat2": ("#b7d3f6", "#22354f"),
    "heat3": ("#efeee8", "#2a2a28"),
    "heat4": ("#f7cfa8", "#523420"),
    "heat5": ("#eb8a34", "#9c5215"),
    "heat6": ("#9c3405", "#f08a3c"),
}
COLOURS = {**SERIES, **HEAT}
LEVELS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # between the colours of HEAT
DASHES = ("", "7 3", "2 2.5", "10 3 2 3", "4 2")

RULES = (
    "".join(f".{name}{{stroke:var(--{name})}}" for name in SERIES)
    + "".join(f".d{place}{{stroke-dasharray:{dash}}}" for place, dash in enumerate(DASHES) if dash)
    + """
.line{fill:none;stroke-width:1.5;stroke-linejoin:round}
.few{stroke-width:2.4}
.band{fill-opacity:.2}
.dot{stroke:var(--surface);stroke-width:1}
svg .mark{font-weight:600}
.axis{stroke:var(--line);stroke-width:1}
.when{stroke-width:1;stroke-opacity:.45}
.shape{stroke-width:1.6;stroke-linecap:round;stroke-linejoin:round}
.hollow{fill-opacity:0}
.ev-bad{stroke:var(--bad);fill:var(--bad)}
.ev-good{stroke:var(--good);fill:var(--good)}
.ev-plain{stroke:var(--second);fill:var(--second)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:0 26px}
.pair>div{min-width:0}
.pair .plot svg{min-width:0}
.key{display:inline-block;width:30px;height:12px;margin-right:6px;vertical-align:-2px}
.icon{display:inline-block;width:14px;height:14px;margin-right:5px;vertical-align:-2.5px}
h3 small{color:var(--second);font-weight:400;font-size:13px;margin-left:8px}
tr.bad td{color:var(--bad)}
td.bad{color:var(--bad)}
.verdict{margin:0 0 8px}
.verdicts{margin:0 0 12px}
details{margin:12px 0 0}
summary{cursor:pointer;color:var(--second);font-size:13.5px}
td{overflow-wrap:break-word;max-width:46ch}
section[id^=events] td:nth-child(-n+4){white-space:nowrap}
#figures th,#figures td{padding-right:11px;font-size:13px}
#read{position:fixed;z-index:2;pointer-events:none;background:var(--surface);border:1px solid var(--line)}
#read{border-radius:6px;padding:5px 9px;font-size:12.5px;line-height:1.45;white-space:pre}
#read{font-variant-numeric:tabular-nums}
.cursor{stroke:var(--second);stroke-width:1;stroke-dasharray:2 2}
"""
)

# Without it, the page says the same. It reads the numbers back from the curves as they are drawn.
SCRIPT = """
"use strict";
const read = document.createElement("div");
read.id = "read";
read.hidden = true;
document.body.append(read);
const say = v => Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4));
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [x, y] = [svg.dataset.x, svg.dataset.y].map(told => told.split(" ").map(Number));
  const back = ([low, high, first, last, log], at) => {
    const part = (at - first) / (last - first);
    return log ? low * (high / low) ** part : low + part * (high - low);
  };
  const curves = [...svg.querySelectorAll("[data-name]")].map(path => [path.dataset.name,
    [...path.getAttribute("d").matchAll(/(-?[\\d.]+) (-?[\\d.]+)/g)].map(pair => [+pair[1], +pair[2]])]);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", y[3]);
  cursor.setAttribute("y2", y[2]);
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    if (at < x[2] - 4 || at > x[3] + 4) return leave();
    const near = curves.map(([name, points]) =>
      [name, points.reduce((best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best)]);
    if (!near.length) return;
    const [here] = near.map(([, point]) => point[0]).sort((a, b) => Math.abs(a - at) - Math.abs(b - at));
    cursor.setAttribute("x1", here);
    cursor.setAttribute("x2", here);
    svg.append(cursor);
    read.textContent = ["step " + Math.round(back(x, here)).toLocaleString("en"),
      ...near.map(([name, point]) => name + "  " + say(back(y, point[1])))].join("\\n");
    read.hidden = false;
    const box = read.getBoundingClientRect();
    const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - 16 - box.width : event.clientX + 16;
    read.style.left = Math.max(0, left) + "px";
    read.style.top = Math.max(0, Math.min(event.clientY + 12, innerHeight - box.height - 4)) + "px";
  });
  const leave = () => { cursor.remove(); read.hidden = true; };
  svg.addEventListener("pointerleave", leave);
}
"""


@dataclass(frozen=True)
class Sign:
    """How an event is drawn around (0, 0), and what it says in general. tone: good, bad or plain."""

    path: str
    tone: str
    means: str
    is_hollow: bool = False


SIGNS = {
    "start": Sign("M-3.5 -4.5L4.5 0L-3.5 4.5z", "plain", "start"),
    "resume": Sign("M-4.5 -4.5V4.5M-1.5 -4.5L5 0L-1.5 4.5z", "plain", "resume: goes on from a checkpoint"),
    "layout": Sign("M0 -5L5 0L0 5L-5 0z", "plain", "layout: another one than configured"),
    "skip": Sign("M-3.5 -3.5L3.5 3.5M-3.5 3.5L3.5 -3.5", "bad", "skip: a step is left out"),
    "spike": Sign("M-4.5 4L0 -4.5L4.5 4z", "bad", "spike: far from the last steps"),
    "rewind": Sign("M0 -4L-5 0L0 4zM5 -4L0 0L5 4z", "bad", "rewind: back to an older checkpoint"),
    "flip": Sign("M-4 -2H4M-4 2H4M2.5 -5L-2.5 5", "bad", "flip: replicas differ"),
    "save": Sign("M-2 0a2 2 0 1 0 4 0a2 2 0 1 0 -4 0z", "good", "save"),
    "save failed": Sign("M-4.5 -4.5h9v9h-9zM-4.5 -4.5L4.5 4.5M-4.5 4.5L4.5 -4.5", "bad", "save failed", is_hollow=True),
    "signal": Sign("M-3 5V-5L4 -2L-3 1", "plain", "signal: asked to stop"),
    "lost": Sign("M0 -5V1M0 4.5V5", "bad", "lost: a rank died, hung or raised"),
    "stop": Sign("M-4 -4h8v8h-8z", "plain", "stop: ends before its last step"),
    "stop, bad": Sign("M-4 -4h8v8h-8z", "bad", "stop: ends, and somebody should look"),
    "finish": Sign("M-5 0L-1.5 4L5 -4", "good", "finish", is_hollow=True),
    "other": Sign("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "plain", "another event", is_hollow=True),
}


def sign_of(event: Event) -> str:
    """The name of an event's sign."""
    if event.failed:
        return "save failed"
    if event.kind == "stop" and event.more.get("status", STOPPED) not in (FINISHED, STOPPED):
        return "stop, bad"
    return event.kind if event.kind in SIGNS else "other"
