"""Draws docs/figures/explore.png: the page of `abkd explore`, photographed by a headless Chromium.

    python docs/figures/explore.py

Which fonts it shows depends on the machine.
"""

import shutil
import subprocess
import threading
from pathlib import Path

from abkd.explore import make_server

SIZE = "1280,1190"


def main() -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("no Chromium is installed")
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000", f"--window-size={SIZE}"]
    with make_server() as server:
        threading.Thread(target=server.serve_forever).start()
        picture = f"--screenshot={Path(__file__).with_suffix('.png')}"
        subprocess.run([browser, *options, picture, f"{server.url}?row=0&alpha=0.2&beta=0.7"], check=True)
        server.shutdown()


if __name__ == "__main__":
    main()
