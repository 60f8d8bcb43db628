#!/usr/bin/env python3
"""Take the README's pictures of the embedded ladder's reports: `make demo`, then `python docs/pictures/take.py`.

Needs Chromium (or Chrome, named by --browser) and Pillow, which matplotlib brings.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent
WIDTH = 1000
# Picture, page below outputs/, and the rows of pixels of the page that are shown.
PICTURES = (("matrix", "demo_report.html", (640, 1110)), ("report", "demo_stage3/report.html", (0, 770)))


def take(browser: str, page: Path, target: Path, rows: tuple[int, int]) -> None:
    """A part of a page as a PNG of 128 colours."""
    size = f"--window-size={WIDTH},{rows[1]}"
    options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1", size]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        command = [browser, *options, f"--screenshot={raw}", page.resolve().as_uri()]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        with Image.open(raw) as picture:
            picture.convert("RGB").crop((0, rows[0], WIDTH, rows[1])).quantize(128).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "outputs", type=Path, nargs="?", default=Path("outputs"), help="folder of the reports (outputs)"
    )
    parser.add_argument("--browser", default="chromium", help="the program (chromium)")
    options = parser.parse_args()
    for name, page, rows in PICTURES:
        take(options.browser, options.outputs / page, FOLDER / f"{name}.png", rows)


if __name__ == "__main__":
    main()
