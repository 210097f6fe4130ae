"""Makes docs/images/playground.png: python -m tests.playground.screenshot RUN PROMPT"""

import argparse
import shutil

from playwright.sync_api import expect, sync_playwright

from tests.page.browser import BROWSERS
from tests.playground.opened import opened


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("prompt")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--steps", default="10")
    parser.add_argument("--layer", default="0", help="which of those with experts, from 0")
    parser.add_argument("--step", default="4", help="whose map is shown, from 0")
    parser.add_argument("--scheme", default="light")
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--out", default="docs/images/playground.png")
    args = parser.parse_args()
    path = next(filter(None, map(shutil.which, BROWSERS)))
    with opened(args.run) as (host, port), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=args.scheme, viewport={"width": args.width, "height": 400})
        page.goto(f"http://{host}:{port}/")
        for name in ("prompt", "seed", "steps"):
            page.fill(f"#{name}", getattr(args, name))
        page.click("#draw")
        expect(page.locator("#draw")).to_have_text("Draw", timeout=600000)
        for name, value in (("layer", args.layer), ("step", args.step)):
            page.fill(f"#{name}-slider", value)
        page.wait_for_load_state("networkidle")
        page.screenshot(path=args.out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
