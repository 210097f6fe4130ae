"""How a page looks, light and dark; those who draw add the colours of what they draw."""

from __future__ import annotations

from collections.abc import Mapping

Colours = Mapping[str, tuple[str, str]]  # what is drawn -> its colour on a light page and on a dark one

DARK_INK, LIGHT_INK = "#0b0b0b", "#ffffff"


def luminance(colour: str) -> float:
    """Relative luminance of a colour "#rrggbb" (WCAG 2.2).

    >>> luminance("#ffffff")
    1.0
    """
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2), from 1 to 21; text should have 4.5."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink_on(colour: str) -> str:
    """What is read best on a colour: dark or light text."""
    return max((DARK_INK, LIGHT_INK), key=lambda ink: contrast(ink, colour))


def style_sheet(colours: Colours, rules: str = "") -> str:
    """The whole style of a page. `colours` become classes fill-NAME and on-NAME (text on it) and variables --NAME.

    `rules`: CSS of what only this kind of page has.
    """
    marks = "".join(
        f".fill-{name}{{fill:var(--{name});background:var(--{name})}}.on-{name}{{fill:var(--on-{name})}}"
        for name in colours
    )
    light = f":root{{color-scheme:light dark;{LIGHT}{_variables(colours, 0)}}}"
    dark = f"@media (prefers-color-scheme:dark){{:root{{{DARK}{_variables(colours, 1)}}}}}"
    return light + dark + marks + RULES + rules


def _variables(colours: Colours, scheme: int) -> str:
    """The colours of a scheme (0: light, 1: dark) as variables of CSS."""
    return "".join(f"--{name}:{pair[scheme]};--on-{name}:{ink_on(pair[scheme])};" for name, pair in colours.items())


LIGHT = (
    "--page:#f6f6f3;--surface:#ffffff;--ink:#0b0b0b;--second:#52514e;--grid:#e4e3dc;--line:#d3d2ca;"
    "--good:#006300;--good-back:#e3f4e3;--bad:#a32121;--bad-back:#fbe6e6;--accent:#2a78d6;"
)
DARK = (
    "--page:#0d0d0d;--surface:#1a1a19;--ink:#f5f5f3;--second:#c3c2b7;--grid:#2c2c2a;--line:#3d3d3a;"
    "--good:#6fd46f;--good-back:#12290f;--bad:#ff9c9c;--bad-back:#3a1616;--accent:#3987e5;"
)
RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 4px;letter-spacing:-.005em}
h3{font-size:14px;margin:20px 0 6px}
p{margin:0 0 10px}
a{color:inherit}
.sub{color:var(--second);margin:0 0 14px}
.verdict{display:inline-block;border-radius:6px;padding:5px 12px;margin:0 0 18px;font-weight:600}
.good{color:var(--good);background:var(--good-back)}
.bad{color:var(--bad);background:var(--bad-back)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(205px,1fr));gap:10px;margin:0 0 16px}
.tile,section{background:var(--surface);border:1px solid var(--grid);border-radius:10px}
.tile{padding:11px 14px 12px}
.tile b{display:block;white-space:nowrap;font-size:23px;line-height:1.25;font-weight:600;letter-spacing:-.01em}
.tile span,.tile small{color:var(--second);font-size:13px;display:block;line-height:1.35}
section{padding:18px 20px 20px;margin:0 0 16px}
.note{color:var(--second);font-size:13.5px;max-width:100ch}
.plot,.scroll{overflow-x:auto}
.plot svg{display:block;width:100%;min-width:600px;height:auto;margin:8px 0}
svg text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink);font-variant-numeric:tabular-nums}
svg .small{font-size:11px}
svg .tick,svg .label{fill:var(--second)}
svg .limit-label{font-weight:600}
.grid{stroke:var(--grid);stroke-width:1}
.limit{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:5 3}
svg .value{fill:var(--ink)}
.legend{display:flex;flex-wrap:wrap;gap:3px 18px;font-size:13px;color:var(--second);margin:8px 0 0}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums;margin:8px 0 0}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top}
th{color:var(--second);font-weight:500;white-space:nowrap}
th.number,td.number{text-align:right;white-space:nowrap}
tr>:last-child{padding-right:0}
tr.sum td{font-weight:600}
ul{margin:6px 0 0;padding-left:19px}
li{margin:0 0 5px}
pre{font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
pre{columns:4 190px;column-gap:24px;margin:8px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
footer{color:var(--second);font-size:13px}
@media (max-width:600px){main{padding:18px 10px 40px}section{padding:14px 12px}}
@media print{body{background:#fff}.tile,tr,.plot{break-inside:avoid}*{print-color-adjust:exact}}
"""
