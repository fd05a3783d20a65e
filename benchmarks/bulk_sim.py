"""A simulation of bulk runs: does it explain the measured runs, and what would a GPU need?

    python benchmarks/bulk_sim.py

Uses the stage times that benchmarks/bulk.py measured alone (results/bulk.json, part rates). To
compare with measured runs, it uses the time that each side worked in that run, so that a drifting
machine does not count as an error; the simulation decides who waits for whom. Writes
results/bulk_sim.json and .md, the tables of docs/scale.md. Assumed values are marked as such.
"""

import heapq
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
AHEAD = 3  # chunks under way at once, as in camkit/bulk/running.py
SETTINGS = {"crf": "dense CRF, maps written", "plain": "no CRF, masks alone"}
STAGES = {
    "read": "read, decode, shrink",
    "model": "forward, seed, propagation",
    "refine": "normalize, dense CRF",
    "write": "enlarge, draw, encode, bring to the disk",
}
FORWARDS = (50, 200, 1000)  # images a second that a GPU may manage: assumed
LINK, DISK = 10e9, 0.5e9  # bytes a second to the device and from or to a disk: assumed


@dataclass(frozen=True)
class Seconds:
    """Seconds of each stage per image."""

    read: float
    model: float
    finish: float


@dataclass
class Line:
    """Workers that read and finish, with two images each in advance; one model; a few chunks."""

    seconds: Seconds
    chunks: Sequence[Sequence[int]]
    workers: int
    ahead: int = AHEAD
    now: float = 0.0
    finished: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order, self._events = count(), list[tuple[float, int, str, int, int]]()
        self._waiting, self._sent = deque[tuple[str, int]](), deque[tuple[str, int]]()
        self._batches = deque[tuple[int, int]]()
        self._free, self._model_free, self._begun = self.workers, True, 0
        self._unread = [sum(chunk) for chunk in self.chunks]
        self._unmade = list(self._unread)

    def run(self) -> list[float]:
        """Return when each image was done, in seconds from the start."""
        self._hand_out()
        while self._events:
            self.now, _, kind, chunk, images = heapq.heappop(self._events)
            if kind == "model":
                self._model_free = True
                self._waiting.extendleft([("finish", chunk)] * images)  # before what is to be read
            else:
                self._free += 1
                self._worked(kind, chunk)
            self._hand_out()
        return self.finished

    def _worked(self, kind: str, chunk: int) -> None:
        if kind == "finish":
            self.finished.append(self.now)
            self._unmade[chunk] -= 1
            return
        self._unread[chunk] -= 1
        if not self._unread[chunk]:
            self._batches.extend((chunk, images) for images in self.chunks[chunk])

    def _hand_out(self) -> None:
        while self._begun < len(self.chunks) and self._under_way() < self.ahead:
            self._waiting.extend([("read", self._begun)] * sum(self.chunks[self._begun]))
            self._begun += 1
        while self._waiting and len(self._sent) + self.workers - self._free < 2 * self.workers:
            self._sent.append(self._waiting.popleft())
        while self._free and self._sent:
            kind, chunk = self._sent.popleft()
            self._free -= 1
            self._after(self.seconds.read if kind == "read" else self.seconds.finish, kind, chunk)
        if self._model_free and self._batches:
            chunk, images = self._batches.popleft()
            self._model_free = False
            self._after(self.seconds.model * images, "model", chunk, images)

    def _under_way(self) -> int:
        return sum(left > 0 for left in self._unmade[: self._begun])

    def _after(self, seconds: float, kind: str, chunk: int, images: int = 1) -> None:
        event = (self.now + seconds, next(self._order), kind, chunk, images)
        heapq.heappush(self._events, event)


def seconds_an_image(finished: Sequence[float]) -> float:
    """Return the rate in the middle of the run, as benchmarks/bulk.py measures it."""
    first, last = int(0.15 * len(finished)), int(0.85 * len(finished))
    return (finished[last] - finished[first]) / (last - first)


def of_stages(alone: dict[str, float]) -> Seconds:
    return Seconds(alone["read"], alone["model"], alone["refine"] + alone["write"])


def at_work(alone: Seconds, ran: dict[str, Any]) -> Seconds:
    """Return seconds per image that each side worked in a run; a worker's stages as alone."""
    model, worker = (ran["busiest_thread"][side]["ran"] for side in ("model", "worker"))
    read = worker * alone.read / (alone.read + alone.finish)
    return Seconds(read, model, worker - read)


def workers_needed(seconds: Seconds, chunk: int) -> int:
    """Return the smallest number of workers with which the model reaches 95% of its rate."""
    fewest = ceil((seconds.read + seconds.finish) / seconds.model)
    images = max(20 * chunk, 60 * fewest)
    chunks = [[8] * (chunk // 8)] * ceil(images / chunk)
    for workers in range(max(1, ceil(0.95 * fewest)), 4 * fewest + 2):
        if seconds.model >= 0.95 * seconds_an_image(Line(seconds, chunks, workers).run()):
            return workers
    return 0


def simulated(rates: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in SETTINGS:
        measured = rates[name]
        seconds = of_stages(measured["alone_seconds"])
        predicted = [
            seconds_an_image(Line(at_work(seconds, run), measured["chunks"], 1).run())
            for run in measured["runs"]
        ]
        whole = [run["without_others"] for run in measured["runs"]]
        needed = {}
        for rate in FORWARDS:
            gpu = Seconds(seconds.read, 1 / rate, seconds.finish)
            fewest = ceil((gpu.read + gpu.finish) * rate)
            wide = 8 * ceil(max(32, 2 * fewest) / 8)
            needed[rate] = {"arithmetic": fewest, "chunk": wide, **_needed(gpu, wide)}
        results[name] = {
            "simulated": predicted,
            "measured": whole,
            "errors": [a / b - 1 for a, b in zip(predicted, whole, strict=True)],
            "workers": needed,
        }
    return results


def _needed(seconds: Seconds, wide: int) -> dict[str, int]:
    return {"simulated": workers_needed(seconds, wide)}


def report(rates: dict[str, Any], results: dict[str, Any]) -> str:
    """Return the tables of docs/scale.md."""
    return "\n\n".join([measured(rates), limits(rates), agreement(results), needs(results)]) + "\n"


def measured(rates: dict[str, Any]) -> str:
    rows = [
        [
            label,
            *(f"{1000 * rates[setting]['alone_seconds'][stage]:.1f} ms" for setting in SETTINGS),
        ]
        for stage, label in STAGES.items()
    ]
    sizes = {
        "file": "image file",
        "decoded": "decoded",
        "to_the_model": "sent to the model's process",
        "on_the_device": "pixels on the device, float32",
        "from_the_model": "sent to a worker: maps and picture",
        "mask": "mask",
        "cams": "class maps",
    }
    rows += [
        [label, *(f"{rates[setting]['alone_bytes'][size] / 1000:.1f} kB" for setting in SETTINGS)]
        for size, label in sizes.items()
    ]
    machine = rates["machine"]
    head = f"Measured: one core of {machine['cpu']}, long side {rates['size']}"
    return table([head, *SETTINGS.values()], rows)


def limits(rates: dict[str, Any]) -> str:
    """Return the limit of each part in images per second, and core hours per million."""
    rows = []
    parts = {
        "a worker core: 1 / (read + refine + write)": lambda s, _: 1 / (s.read + s.finish),
        "the model on a core: 1 / forward": lambda s, _: 1 / s.model,
        f"a link of {LINK / 1e9:g} GB/s (assumed): / pixels": lambda _, b: (
            LINK / b["on_the_device"]
        ),
        f"reading {DISK / 1e9:g} GB/s (assumed): / file": lambda _, b: DISK / b["file"],
        f"writing {DISK / 1e9:g} GB/s (assumed): / mask and maps": lambda _, b: (
            DISK / (b["mask"] + b["cams"])
        ),
    }
    for label, rate in parts.items():
        values = [
            rate(of_stages(rates[setting]["alone_seconds"]), rates[setting]["alone_bytes"])
            for setting in SETTINGS
        ]
        rows.append([label, *(f"{value:,.1f}/s" for value in values)])
    rest = [
        1 / rates[setting]["whole"]["busiest_thread"]["model"]["other_threads_ran"]
        for setting in SETTINGS
    ]
    rows.append(
        [
            "the main process: 1 / what it does beside the model",
            *(f"{rate:,.1f}/s" for rate in rest),
        ]
    )
    for label, stages in (("workers", ("read", "refine", "write")), ("model", ("model",))):
        hours = [
            sum(rates[setting]["alone_seconds"][stage] for stage in stages) * 1e6 / 3600
            for setting in SETTINGS
        ]
        rows.append(
            [f"core hours of a million images, {label}", *(f"{value:,.1f} h" for value in hours)]
        )
    return table(["By arithmetic", *SETTINGS.values()], rows)


def agreement(results: dict[str, Any]) -> str:
    def cells(name: str, scale: float, form: str) -> list[str]:
        return [
            ", ".join(f"{scale * value:{form}}" for value in results[setting][name])
            for setting in SETTINGS
        ]

    rows = [
        ["measured, ms", *cells("measured", 1000, ".1f")],
        ["simulated, ms", *cells("simulated", 1000, ".1f")],
        ["error, %", *cells("errors", 100, "+.1f")],
    ]
    return table(["An image of the whole run, one worker, by run", *SETTINGS.values()], rows)


def needs(results: dict[str, Any]) -> str:
    rows = []
    for rate in FORWARDS:
        cells = [results[setting]["workers"][rate] for setting in SETTINGS]
        rows.append(
            [
                f"{rate} images/s: {1e6 / rate / 3600:.1f} GPU hours a million",
                *(
                    f"{cell['simulated']} ({cell['arithmetic']}), `--chunk {cell['chunk']}`"
                    for cell in cells
                ),
            ]
        )
    return table(["Assumed rate of a GPU; workers it needs", *SETTINGS.values()], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    rates = json.loads((RESULTS / "bulk.json").read_text())["rates"]
    results = simulated(rates)
    (RESULTS / "bulk_sim.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "bulk_sim.md").write_text(report(rates, results))


if __name__ == "__main__":
    main()
