"""The page in a browser: a prompt is typed, the button is pressed, and the picture and its heat map appear."""

import base64
import os
import shutil
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.page.browser import BROWSERS
from tests.playground.opened import opened, overlay, pipeline_of, pixels

pytestmark = pytest.mark.slow

PROMPT = "a handwritten seven"
PIXELS = """image => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png").split(",")[1];
}"""

LOADED = """asked => performance.getEntriesByType("resource").some(
  one => one.name.endsWith(asked) && one.responseEnd > 0
)"""


@pytest.fixture(scope="module")
def browser():
    """Where there is none, the test is skipped."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"], env=os.environ | {"http_proxy": "", "https_proxy": ""}
        )
        yield browser
        browser.close()


class Seen:
    """A page that is open: what its console said, and every address that it asked for."""

    def __init__(self, browser, place, scheme, size=(1120, 1000)):
        self.url = f"http://127.0.0.1:{place[1]}/"
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": size[0], "height": size[1]})
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.set_default_timeout(60000)
        self.page.goto(self.url)

    def draw(self, prompt, steps=4):
        self.page.fill("#prompt", "")
        self.page.type("#prompt", prompt)
        self.page.fill("#steps", str(steps))
        self.page.click("#draw")
        expect(self.page.locator("#draw")).to_have_text("Draw", timeout=60000)

    def pixels(self, selector):
        """Of an image that is loaded."""
        self.page.wait_for_function("s => document.querySelector(s).naturalWidth > 0", arg=selector)
        return pixels(base64.b64decode(self.page.eval_on_selector(selector, PIXELS)))[..., :3]

    def moved(self, action):
        """The map after an action that changes it, and what it is of."""
        before = self.page.get_attribute("#overlay", "src")
        action()
        self.page.wait_for_function("before => document.getElementById('overlay').src !== before", arg=before)
        self.page.wait_for_function("() => document.getElementById('overlay').complete")
        query = parse_qs(urlsplit(self.page.get_attribute("#overlay", "src")).query)
        return self.pixels("#overlay"), {key: values[0] for key, values in query.items()}

    def close(self):
        """Nothing was complained of, and nothing was asked of another host."""
        self.page.close()
        assert self.said == []
        foreign = [url for url in self.asked if not url.startswith((self.url, "data:image/png;base64,"))]
        assert foreign == [] and self.asked[0] == self.url


@pytest.mark.parametrize(("scheme", "background"), [("light", (246, 246, 243)), ("dark", (13, 13, 13))])
def test_a_prompt_becomes_a_picture_and_a_heat_map(browser, place, captions, scheme, background):
    seen = Seen(browser, place, scheme)
    page = seen.page
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == f"rgb{background}"
    assert not page.is_visible("#result")
    seen.draw(PROMPT)
    (expected,) = pipeline_of(captions)(PROMPT, generator=0, num_inference_steps=4).images
    found = seen.pixels("#picture")
    assert found.shape == (8, 8, 3)
    assert np.array_equal(found, np.asarray(expected.convert("RGB")))
    assert page.is_visible("#picture") and page.is_visible("#overlay") and not page.is_visible("#message")
    assert PROMPT in page.inner_text("#caption") and "seed 0, 4 steps of heun" in page.inner_text("#caption")

    first = seen.pixels("#overlay")
    assert (page.inner_text("#layer-said"), page.inner_text("#step-said")) == ("1", "1 of 4, t = 1.00")
    moves = [
        (lambda: page.press("#layer-slider", "ArrowRight"), {"layer": "3", "step": "0"}, ("3", "1 of 4, t = 1.00")),
        (lambda: page.press("#step-slider", "End"), {"layer": "3", "step": "3"}, ("3", "4 of 4, t = 0.25")),
        (lambda: page.check("#mean"), {"layer": "3", "step": "mean"}, ("3", "all 4")),
        (lambda: page.select_option("#branch", "difference"), {"branch": "difference"}, ("3", "all 4")),
        (lambda: page.click("#rows tr:first-child"), {"layer": "1", "branch": "difference"}, ("1", "all 4")),
    ]
    maps = [first]
    for action, wanted, said in moves:
        map_, query = seen.moved(action)
        assert wanted.items() <= query.items()
        assert (page.inner_text("#layer-said"), page.inner_text("#step-said")) == said
        assert np.array_equal(map_, overlay(place, **query))
        assert not np.array_equal(map_, maps[-1])
        maps.append(map_)
    assert page.inner_text("#low") == f"−{page.inner_text('#high')}"
    assert [row.split()[0] for row in page.inner_text("#rows").splitlines()] == ["1", "3"]
    seen.close()


def test_a_slider_finds_its_next_maps_loaded(browser, place):
    seen = Seen(browser, place, "light")
    seen.draw(PROMPT, steps=6)
    for step in (1, 2, 3):
        asked = f"layer=1&step={step}&branch=conditional"
        seen.page.wait_for_function(LOADED, arg=asked)
        before = len([url for url in seen.asked if asked in url])
        _, query = seen.moved(lambda: seen.page.press("#step-slider", "ArrowRight"))
        assert query["step"] == str(step)
        assert len([url for url in seen.asked if asked in url]) == before
    seen.close()


def test_what_is_wrong_is_said_on_the_page_which_goes_on(browser, place):
    seen = Seen(browser, place, "light")
    page = seen.page
    page.click("#draw")
    page.wait_for_selector("#message:not([hidden])")
    assert page.inner_text("#message") == "the prompt is empty; say what to draw"
    seen.draw(PROMPT, steps=2000)
    assert page.inner_text("#message") == "steps is 2000; write a whole number from 1 to 1000"
    page.fill("#guidance", "-1")
    seen.draw(PROMPT)
    assert page.inner_text("#message") == "guidance is -1; write a number from 0 to 100"
    page.fill("#guidance", "")  # the model's own
    prompt = "<img src=x onerror=alert(1)> & a seven " * 3
    seen.draw(prompt, steps=1)
    assert not page.is_visible("#message") and page.is_visible("#picture")
    assert page.inner_text("#warnings") == f"the prompt {prompt.strip()!r} is cut to the 28 tokens that the model reads"
    assert page.inner_text("#caption").startswith(f"“{prompt.strip()}”: seed 0, 1 step of heun, guidance 3;")
    page.click("#another")
    page.press("#prompt", "Enter")
    expect(page.locator("#caption")).not_to_contain_text("seed 0,", timeout=60000)
    complaints = [said for said in seen.said if "status of 400" in said]  # the browser's own, of refused wishes
    assert len(complaints) == 3
    seen.said = [said for said in seen.said if said not in complaints]
    seen.close()


def test_progress_is_shown_and_another_page_is_told_that_it_is_busy(browser, place):
    one, other = (Seen(browser, place, "light") for _ in range(2))
    one.page.fill("#prompt", PROMPT)
    one.page.fill("#steps", "600")
    one.page.click("#draw")
    one.page.wait_for_function("() => document.getElementById('progress').value > 0")
    assert one.page.is_visible("#progress") and one.page.is_disabled("#draw")
    assert one.page.inner_text("#draw").endswith(" of 600")
    other.draw(PROMPT)
    assert other.page.inner_text("#message").startswith("another picture is being drawn, step ")
    expect(one.page.locator("#draw")).to_have_text("Draw", timeout=120000)
    assert one.page.is_visible("#picture") and not one.page.is_visible("#progress")
    assert all("status of 409" in said for said in other.said)
    other.said = []
    one.close()
    other.close()


def test_a_dense_model_on_a_telephone(browser, dense):
    with opened(dense) as place:
        seen = Seen(browser, place, "dark", (390, 800))
        seen.draw("7", steps=2)
        assert seen.pixels("#picture").shape == (8, 8, 3)
        assert "There is none: no layer of this model has experts" in seen.page.inner_text("#no-maps")
        assert seen.page.locator("#overlay").count() == 0
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
        seen.close()
