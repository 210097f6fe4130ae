"""The page itself: what is on it before anything is drawn; page.js does the rest."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from megadit.encoders.condition import Labels
from megadit.page.markup import Markup, join, tag
from megadit.page.parts import page, section
from megadit.page.style import style_sheet
from megadit.pipeline.pipeline import ECDiTPipeline
from megadit.playground.drawing import no_maps
from megadit.playground.wish import MOST_GUIDANCE, MOST_LETTERS, MOST_SEED, MOST_STEPS, SAMPLERS


@dataclass(frozen=True)
class Page:
    """policy: what a browser is to hold the page to: it loads from this server alone."""

    html: str
    policy: str


def make_page(pipe: ECDiTPipeline, name: str) -> Page:
    """The page of a model; `name`: of its folder."""
    style = style_sheet({}, RULES)
    body = join(
        tag(
            "main",
            tag("h1", f"Playground: {name}"),
            tag("p", about(pipe), class_="sub"),
            wish_form(pipe),
            tag("p", "", id="message", role="alert", hidden=""),
            tag("ul", id="warnings", role="status", hidden=""),
            result(no_maps(pipe)),
        ),
        tag("script", src="page.js"),
    )
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'self'; style-src 'sha256-{digest}'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(page(f"Playground: {name}", style, body), policy)


def about(pipe: ECDiTPipeline) -> str:
    """What draws here, in a line."""
    parts, model = pipe.parts, pipe.parts.config.model
    cell = 1 if parts.autoencoder is None else parts.autoencoder.downscale
    count = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    weights = "averaged weights" if parts.kind == "ema" else "weights"
    experts = f"{model.experts} experts, {model.routing.replace('_', ' ')}" if model.has_experts else "no experts"
    side = model.image_size * cell
    told = [
        f"{weights} of step {parts.step:,}",
        f"{count / 1e6:,.1f} million parameters",
        f"{model.layers} layers",
        experts,
        f"{side} × {side} pixels",
        f"{str(pipe.dtype).removeprefix('torch.')} on {pipe.device}",
    ]
    return " · ".join(told)


def wish_form(pipe: ECDiTPipeline) -> Markup:
    """What is asked for. Limits are the server's to tell: with its own words, on the page."""
    default, condition = pipe.scheduler, pipe.parts.condition
    asked = f"class, 0 to {condition.classes - 1}" if isinstance(condition, Labels) else "prompt"
    steered = "class to steer away from" if isinstance(condition, Labels) else "negative prompt"
    options = [tag("option", one, **({"selected": ""} if one == default.sampler else {})) for one in SAMPLERS]
    another = tag("button", "another", type="button", id="another", title="another seed: another picture")
    return tag(
        "form",
        field("prompt", asked, maxlength=MOST_LETTERS, autocomplete="off", autofocus=""),
        field("negative", steered, maxlength=MOST_LETTERS, autocomplete="off", placeholder="nothing"),
        tag(
            "div",
            labelled("seed", "seed", join(number_input("seed", 0, 0, MOST_SEED, 1), another)),
            labelled("steps", "steps", number_input("steps", default.steps, 1, MOST_STEPS, 1)),
            labelled("guidance", "guidance", number_input("guidance", f"{default.guidance:g}", 0, MOST_GUIDANCE, 0.5)),
            labelled("sampler", "sampler", tag("select", *options, id="sampler", name="sampler")),
            tag("button", "Draw", type="submit", id="draw"),
            class_="row",
        ),
        tag("progress", id="progress", value=0, max=1, aria_label="steps that are done", hidden=""),
        id="wish",
        novalidate="",
    )


def labelled(name: str, said: str, control: Markup) -> Markup:
    return tag("div", tag("label", said, for_=name), tag("div", control, class_="control"), class_=f"field {name}")


def field(name: str, said: str, **attributes: object) -> Markup:
    return labelled(name, said, tag("input", type="text", id=name, name=name, **attributes))


def number_input(name: str, value: object, low: float, high: float, step: float) -> Markup:
    return tag("input", type="number", id=name, name=name, value=value, min=low, max=high, step=step)


def result(why_no_maps: str) -> Markup:
    """The picture and its heat map, hidden until there are any."""
    picture = section(
        "drawn",
        "Picture",
        tag("img", id="picture", alt="", width=384, height=384),
        tag("p", id="caption", class_="note"),
    )
    if why_no_maps:
        maps = section("no-maps", "Heat map", tag("p", f"There is none: {why_no_maps}.", class_="note"))
        return tag("div", picture, maps, id="result", hidden="")
    branches = [tag("option", said, value=branch) for branch, said in BRANCHES_SAID.items()]
    maps = section(
        "maps",
        "Heat map",
        tag("img", id="overlay", alt="", width=384, height=384),
        tag("div", tag("span", id="low"), tag("span", id="ramp"), tag("span", id="high"), class_="scale"),
        tag("p", id="meaning", class_="note"),
        slider("layer"),
        slider("step"),
        tag(
            "div",
            tag("label", tag("input", type="checkbox", id="mean"), "mean of all steps", class_="check"),
            tag("select", *branches, id="branch", aria_label="which images are looked at"),
            class_="chosen",
        ),
    )
    heads = (tag("th", said, title=meaning, class_="number") for said, meaning in EVENNESS.values())
    head = tag("tr", tag("th", "layer"), *heads)
    even = section(
        "evenness",
        "How evenly the experts pick",
        tag("p", "With the prompt, means over the steps. Choose a layer to see its map.", class_="note"),
        tag("div", tag("table", tag("thead", head), tag("tbody", id="rows")), class_="scroll"),
    )
    return tag("div", picture, maps, even, id="result", hidden="")


def slider(name: str) -> Markup:
    given = {"min": 0, "max": 0, "value": 0, "step": 1}
    return tag(
        "div",
        tag("label", name, for_=f"{name}-slider"),
        tag("input", type="range", id=f"{name}-slider", **given),
        tag("output", id=f"{name}-said", for_=f"{name}-slider"),
        class_="slider",
    )


BRANCHES_SAID = {
    "conditional": "with the prompt",
    "unconditional": "without it",
    "difference": "difference",
}
# Columns of the table, by their names in evenness.Row; page.js has the same order.
EVENNESS = {
    "mean": ("mean", "experts of a patch"),
    "most": ("most", "the most experts that any patch has in any step"),
    "cv": ("cv", "standard deviation over patches, of the mean; 0 is even"),
    "gini": ("gini", "0 where all patches have as many experts, near 1 where one has all"),
    "unpicked": ("unpicked", "patches that no expert picks"),
    "entropy": ("entropy", "of the picks over patches; 1 is even"),
    "differs": ("differs", "by how many experts a patch differs with and without the prompt"),
}

RULES = """
[hidden]{display:none!important}
form{background:var(--surface);border:1px solid var(--grid);border-radius:10px;padding:16px 20px 18px;margin:0 0 16px}
label{color:var(--second);font-size:13px}
.field{margin:0 0 10px}
.field label{display:block;margin:0 0 3px}
.control{display:flex;gap:6px}
input[type=text],input[type=number],select,button{font:inherit;color:var(--ink);background:var(--page);
border:1px solid var(--line);border-radius:6px;padding:0 10px;min-width:0;height:38px}
input[type=text]{width:100%}
.prompt input{font-size:17px;padding:0 12px;height:44px}
input::placeholder{color:var(--second);opacity:.75}
:is(input,select,button,tbody tr):focus-visible{outline:2px solid var(--accent);outline-offset:1px}
.row{display:flex;flex-wrap:wrap;gap:10px 14px;align-items:end}
.row .field{margin:0}
.seed input{width:150px}.steps input,.guidance input{width:92px}
button{cursor:pointer}
button:disabled{cursor:default;opacity:.55}
#draw{margin-left:auto;background:#1f63b5;border-color:#1f63b5;color:#fff;font-weight:600;min-width:150px}
#draw:hover:enabled{background:#184f92}
progress{display:block;width:100%;height:8px;margin:14px 0 0;accent-color:var(--accent)}
#message{color:var(--bad);background:var(--bad-back);border-radius:8px;padding:9px 14px;margin:0 0 16px;
overflow-wrap:anywhere}
#warnings{list-style:none;color:var(--second);background:var(--surface);border:1px solid var(--line);
border-left:4px solid #c98500;border-radius:8px;padding:9px 14px;margin:0 0 16px;overflow-wrap:anywhere}
#warnings li{margin:0}
#result{display:grid;grid-template-columns:1fr 1fr;gap:16px}
#result section{margin:0;min-width:0}
#evenness{grid-column:1/-1}
#result img{display:block;width:100%;max-width:460px;height:auto;margin:8px auto 10px;border-radius:4px;
image-rendering:pixelated;background:var(--grid)}
#caption{margin:0;overflow-wrap:anywhere}
.scale{display:flex;align-items:center;gap:8px;font-size:13px;font-variant-numeric:tabular-nums;max-width:460px;
margin:0 auto}
#ramp{flex:1;height:12px;border-radius:3px}
#meaning{margin:4px auto 12px;max-width:460px}
.slider,.chosen{display:grid;grid-template-columns:40px 1fr 118px;gap:10px;align-items:center;margin:0 auto 5px;
max-width:460px}
.slider output{font-size:13px;font-variant-numeric:tabular-nums;text-align:right}
input[type=range]{width:100%;accent-color:var(--accent)}
input[type=range]:disabled{opacity:.45}
.chosen{grid-template-columns:1fr auto;margin-top:10px}
.check{display:flex;gap:7px;align-items:center}
.chosen select{height:32px;font-size:14px}
tbody tr{cursor:pointer}
tbody tr:hover,tbody tr[aria-selected=true]{background:var(--page)}
tbody tr[aria-selected=true] td:first-child{font-weight:600}
@media (max-width:760px){#result{grid-template-columns:1fr}#draw{width:100%}}
"""
