"""The README's picture of a group, token by token: the first step of a default run of GRPO, in a browser's window.

    python train_grpo.py && python -m experiments.view_picture runs/grpo

Needs chromium and the packages of the tests. Writes docs/view-light.png and docs/view-dark.png.
"""

import argparse
import base64
import tempfile
from pathlib import Path

from experiments.runs import ROOT
from nanorl import view
from tests.browser import CHROMIUM, Browser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of train_grpo.py")
    page = parser.parse_args().run / "view.html"
    page.write_text(view.page([page.parent]), encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(CHROMIUM, Path(profile))
        try:
            browser.open(page.resolve().as_uri() + "#0")
            for scheme in ("light", "dark"):
                browser.look(scheme, width=900, height=660)
                browser.run("""() => { document.getElementById('key').scrollIntoView();
                    document.querySelector('.answer .token').dispatchEvent(new Event('mouseover', {bubbles: true})); }""")
                png = browser.send("Page.captureScreenshot", format="png")["data"]
                (ROOT / f"docs/view-{scheme}.png").write_bytes(base64.b64decode(png))
        finally:
            browser.close()


if __name__ == "__main__":
    main()
