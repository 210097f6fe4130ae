"""A browser without a window, where one is installed."""

import itertools
import json
import re
import shutil
import subprocess
from html import unescape

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no network
)
# Reports what was laid out. Only the copy of the page that is tested has it.
PROBE = """<script>
const box = element => { const r = element.getBoundingClientRect(); return [r.x, r.y, r.width, r.height] };
document.body.dataset.probe = JSON.stringify({
  plots: [...document.querySelectorAll("svg")].map(svg => ({
    box: box(svg),
    marks: [...svg.querySelectorAll("rect, circle, path, text")].map(box),
    bars: [...svg.querySelectorAll("rect:has(title)")].map(bar => [getComputedStyle(bar).fill, ...box(bar)]),
  })),
  loaded: performance.getEntriesByType("resource").length,
  width: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
  window: window.innerWidth, background: getComputedStyle(document.body).backgroundColor,
})</script></body>"""


class Browser:
    """Runs a browser on a page, with more flags; gives what it printed and what it complained of."""

    def __init__(self, folder):
        """Skips the test where there is no browser."""
        self.path = next(filter(None, map(shutil.which, BROWSERS)), None)
        if self.path is None:
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
        self.folder, self.count = folder, itertools.count()

    def __call__(self, page, *flags):
        folder = self.folder / str(next(self.count))
        folder.mkdir()
        (folder / "page.html").write_text(page, encoding="utf-8")
        command = [self.path, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags]
        command.append((folder / "page.html").as_uri())
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(browser, page, *flags):
    dom, complaints = browser(page.replace("</body>", PROBE), "--dump-dom", *flags)
    assert complaints == []
    return json.loads(unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
