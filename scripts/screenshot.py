"""TensorBoard's pages of gates and heat maps as one picture, for the README.

    python scripts/screenshot.py LOGS OUT.png

LOGS is the folder of runs that a command leaves (`tensorboard/`). Needs chromium on the path.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image

PAGES = {"custom_scalars": (0, 845), "images": (64, 850)}  # what is kept of each page, top to bottom, in pixels
COLOURS, WIDTH, HEIGHT = 255, 1500, 870
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
)


def main(logs: Path, out: Path) -> None:
    """Serve, look, stack, compress."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("chromium is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", ".", "--port", address.rpartition(":")[2]]
    server = subprocess.Popen([*command, "--load_fast", "false"], cwd=logs, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"{address}/data/runs", sorted(run.name for run in logs.iterdir() if run.is_dir()))
        with tempfile.TemporaryDirectory() as scratch:
            pieces = [
                _piece(browser, f"{address}/#{page}", Path(scratch) / page, *ends) for page, ends in PAGES.items()
            ]
    finally:
        server.terminate()
        server.wait()
    whole = Image.new("RGB", (WIDTH, sum(piece.height for piece in pieces)))
    top = 0
    for piece in pieces:
        whole.paste(piece, (0, top))
        top += piece.height
    whole.quantize(COLOURS).save(out, optimize=True)
    print(f"{out}: {out.stat().st_size:,} bytes")


def _wait_for(address: str, runs: list[str]) -> None:
    for _ in range(240):
        try:
            with urlopen(address) as answer:
                text = answer.read().decode()
            if all(f'"{run}"' in text for run in runs):
                return
        except (URLError, ConnectionError):
            pass
        time.sleep(0.5)
    sys.exit("tensorboard did not read the runs in two minutes")


def _piece(browser: str, address: str, scratch: Path, top: int, bottom: int) -> Image.Image:
    """A page, once its scripts have had a minute of their own time."""
    file = scratch.with_suffix(".png")
    options = [f"--user-data-dir={scratch}", f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=60000"]
    subprocess.run([browser, *QUIET, *options, f"--screenshot={file}", address], check=True, stderr=subprocess.DEVNULL)
    with Image.open(file) as page:
        return page.convert("RGB").crop((0, top, WIDTH, bottom))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
