#!/usr/bin/env python3
"""The README's pictures of the dashboard: real engines under load, in a real browser.

    python scripts/screenshots.py [--load-s 150] [--out docs/images]

Starts 1P1D with `twolane up` in a folder of its own, sends requests, looks at the page in light and dark, stops all.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PORTS = {
    **{"http-proxy-port": 25001, "proxy-port": 25002, "prefill-http-port": 25103, "decode-http-port": 25205},
    **{"prefill-kv-port": 25301, "decode-kv-port": 25401},
}
URL = f"http://127.0.0.1:{PORTS['http-proxy-port']}"
NUM_CLIENTS = 3
SIZE = {"width": 1240, "height": 1040}
NUM_COLOURS = 256
PHRASE = "In a distant valley two rivers met and the mill between them turned by day and by night while "


def twolane(word: str, folder: Path) -> None:
    options = [f"--{name}={port}" for name, port in PORTS.items()] if word == "up" else []
    if word == "up":
        options += [f"--cache-dir={ROOT / '.twolane/cache'}"]
    subprocess.run([sys.executable, "-m", "twolane.cli", word, *options], cwd=folder, check=True)


def ask(dice: random.Random, model: str) -> None:
    body = {
        "model": model,
        "prompt": f"{dice.random()} {PHRASE * dice.randint(2, 60)}",
        "max_tokens": dice.randint(20, 120),
        "stream": True,
        "ignore_eos": True,
    }
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{URL}/v1/completions", json.dumps(body).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310 - our own proxy
        answer.read()


def load(seed: int, model: str, until: threading.Event) -> None:
    dice = random.Random(seed)  # noqa: S311
    while not until.wait(dice.uniform(0, 3)):
        ask(dice, model)


def take(browser: Browser, scheme: str, path: Path) -> None:
    context = browser.new_context(viewport=SIZE, color_scheme="dark" if scheme == "dark" else "light")  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(URL)
    page.locator("tr.request").first.wait_for()
    page.locator("#dots .dot").first.wait_for(state="attached")
    page.wait_for_timeout(3000)
    page.locator("tr.request button").first.click()
    page.locator("tr.more td td").first.wait_for()
    page.locator("h1").click()  # nothing is pointed at
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot()))
    context.close()
    picture.convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load-s", type=float, default=150, help="how long requests run before the pictures are taken")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="twolane-screenshots-"))
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is stopped, too
    try:
        twolane("up", folder)
        with urllib.request.urlopen(f"{URL}/v1/models") as answer:  # noqa: S310
            model = json.load(answer)["data"][0]["id"]
        clients = [threading.Thread(target=load, args=(seed, model, over)) for seed in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(options.load_s)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for scheme in ("light", "dark"):
                take(browser, scheme, options.out / f"dashboard-{scheme}.png")
            browser.close()
        over.set()
        for client in clients:
            client.join()
    finally:
        over.set()
        twolane("down", folder)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
