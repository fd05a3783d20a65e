"""How fast the page of `camkit app` answers, and whether its memory grows.

    python benchmarks/app.py --photos 500

Starts `camkit app` with the embedded model in a process of its own, and a headless Chromium. Times
run from the click or the change to the new picture in the page: the first map from the start of the
command, another photo, the background score, another refiner (guided filter, dense CRF), another
seed. Then it steps through photos of a folder, and reads the resident size of the server after
every fiftieth. Writes `benchmarks/results/app.md`.
"""

import argparse
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from bulk_setting import cpu

from camkit.data import demo_photos
from camkit.photo import read_picture

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "tests"))
from chromium import Chromium  # noqa: E402 - it lies beside the tests

NEXT = "document.querySelector('#next').click()"
MASK = "(document.querySelector('#mask_a img') || {}).src"
SET = (
    "(() => {{ const e = document.querySelector('#{} input[type=number]'); e.value = {};"
    " e.dispatchEvent(new Event('input', {{bubbles: true}}));"
    " e.dispatchEvent(new Event('change', {{bubbles: true}})); }})()"
)


def timed(browser: Chromium, action: Callable[[], object]) -> float:
    """Return the seconds from an action to the next mask."""
    before, start = browser.run(MASK), time.perf_counter()
    action()
    browser.wait(f"{MASK} && {MASK} != {before!r}")
    seconds = time.perf_counter() - start
    time.sleep(1.5)  # the stages follow the mask
    return seconds


def pick(browser: Chromium, field: str, text: str) -> None:
    """Type a value into a field that also takes words of one's own."""
    browser.run(f"document.querySelector('#{field} input').focus()")
    browser.run(f"document.querySelector('#{field} input').select()")
    browser.call("Input.insertText", text=text)
    browser.press("Enter")


def many_photos(folder: Path, count: int) -> None:
    """Write photos of 375 x 500 pixels, cut out of those of camkit."""
    pictures = [read_picture(sample.photo) for sample in demo_photos().split()]
    rng = np.random.default_rng(0)
    for number, picture in zip(range(count), itertools.cycle(pictures), strict=False):
        rows, columns, _ = picture.shape
        top, left = rng.integers(0, rows // 4), rng.integers(0, columns // 4)
        part = picture[top : top + 3 * rows // 4, left : left + 3 * columns // 4]
        resized = cv2.resize(np.ascontiguousarray(part), (500, 375))
        cv2.imwrite(str(folder / f"{number:04d}.jpg"), resized[:, :, ::-1])


def resident(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `camkit app` on a folder; its process, and the address of the page once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "camkit", "app", "--model", "demo", "--data", str(folder)]
    process = subprocess.Popen([*words, "--port", str(port)], stdout=subprocess.DEVNULL)
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield process, f"http://127.0.0.1:{port}/"
    process.send_signal(signal.SIGINT)
    process.wait(60)


def answers(browser: Chromium) -> dict[str, list[float]]:
    """Measure the seconds of every kind of change."""

    def scored(score: float) -> float:
        return timed(browser, lambda: browser.run(SET.format("score", score)))

    def picked(field: str, text: str) -> float:
        return timed(browser, lambda: pick(browser, field, text))

    return {
        "another photo": [timed(browser, lambda: browser.run(NEXT)) for _ in range(5)],
        "background score": [scored(score) for score in (0.3, 0.6, 0.35, 0.65, 0.4)],
        "seed without the preset's edit (one forward)": [picked("seed_a", "gradcam")],
        "another seed": [picked("seed_a", seed) for seed in ("attention", "legrad", "gradient")],
        "dense CRF added": [picked("refine_a", "crf")],
    }


def sizes_over(browser: Chromium, process: int, photos: int) -> list[float]:
    """Step through photos; the memory of the server before and after every fiftieth."""
    sizes = [resident(process)]
    for number in range(1, photos + 1):
        before = browser.run(MASK)
        browser.run(NEXT)
        browser.wait(f"{MASK} != {before!r}", 120)
        if number % 50 == 0:
            sizes.append(resident(process))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text, "photos")
        folder.mkdir()
        many_photos(folder, options.photos)
        browser = Chromium(Path(text, "profile"))
        start = time.perf_counter()
        with serving(folder) as (process, address):
            browser.open(address, width=1280)
            browser.wait(f"{MASK} != undefined", 180)
            rows = {"the command to the first map": [time.perf_counter() - start]}
            time.sleep(5)
            rows |= answers(browser)
            sizes = sizes_over(browser, process.pid, options.photos)
            browser.close()
    lines = ["| | seconds, median | slowest |", "|---|---|---|"]
    lines += [f"| {n} | {statistics.median(v):.2f} | {max(v):.2f} |" for n, v in rows.items()]
    listed = ", ".join(f"{size:.0f}" for size in sizes)
    lines += [
        "",
        f"Resident memory of the server in MiB, before and after every 50 of {options.photos} "
        f"photos: {listed}. {cpu()}, {os.cpu_count()} cores.",
    ]
    (RESULTS / "app.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
