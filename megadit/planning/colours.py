"""The colours of a plan's report, and the marks that only it has."""

from __future__ import annotations

# Neighbours in a stack differ in lightness too, so that
# they are told apart without seeing hue, and in print.
COLOURS = {
    "weights": ("#184f95", "#256abf"),
    "masters": ("#256abf", "#5598e7"),
    "moments": ("#6da7ec", "#86b6ef"),
    "ema": ("#b7d3f6", "#cde2fb"),
    "buffers": ("#898781", "#898781"),
    "gradients": ("#eb6834", "#d95926"),
    "activations": ("#1baf7a", "#199e70"),
    "updating": ("#4a3aa7", "#9085e9"),
    "F": ("#256abf", "#3987e5"),
    "B": ("#eb6834", "#d95926"),
    "I": ("#eda100", "#c98500"),
    "W": ("#1baf7a", "#199e70"),
    "update": ("#4a3aa7", "#9085e9"),
    "term0": ("#256abf", "#3987e5"),
    "term1": ("#1baf7a", "#199e70"),
    "term2": ("#eda100", "#c98500"),
    "term3": ("#4a3aa7", "#9085e9"),
}
RULES = """
.idle{fill:var(--page)}
.fits{fill:var(--accent);fill-opacity:.75;stroke:var(--surface);stroke-width:.75}
.refused{fill:var(--surface);stroke:var(--second);stroke-opacity:.55;stroke-width:1}
.front{fill:none;stroke:var(--gradients);stroke-width:1.75}
.best{fill:none;stroke:var(--ink);stroke-width:1.75}
.swatch.idle{background:var(--page);border:1px solid var(--line)}
.swatch.fits{background:var(--accent);border-radius:50%}
.swatch.refused{border:1px solid var(--second);border-radius:50%}
.swatch.front{border:2px solid var(--gradients);border-radius:50%}
.swatch.best{border:2px solid var(--ink);border-radius:50%}
"""
