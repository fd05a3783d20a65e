"""What ten million images ask of the journal and of a list, measured on fewer.

    python benchmarks/bulk_scale.py journal files list [--rows 1000000] [--lines 200000]

Journal: rows are written as a run writes them; then manifest and errors are written while another
process records an image every 20 ms, and its longest wait is taken. List: the time from the call of
`run` to the first image that is read, and the memory of the process that plans. With `--ray` the
list is also given to a Ray cluster on this machine. Figures for ten million are arithmetic: ten
times those of a million.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bulk_setting import RESULTS, cpu, resident
from kills import recipe

from camkit.bulk import Failure, Item, PhotoList, RayEngine, run
from camkit.bulk.items import FilePlace
from camkit.bulk.journal import JOURNAL, MANIFEST, Journal
from camkit.bulk.ledger import plan
from camkit.bulk.stages import ImageResult, OutFolder, stamp_of
from camkit.data import write_shapes

_SETTINGS = {"source": "folder /photos"}


def row(number: int) -> dict[str, Any]:
    """Return a row of the manifest of a usual length."""
    key = f"shard-{number // 10_000:05}/{number:09}"
    return {
        "key": key,
        "source": f"/data/shards/shard-{number // 10_000:05}.tar:{number:09}.jpg",
        "size": [375, 500],
        "model_size": [288, 384],
        "classes": [{"index": 281, "name": "tabby"}, {"index": 207, "name": "golden retriever"}],
        "legend": {"282": "tabby", "208": "golden retriever"},
        "most_probable_output": 281,
        "mask": f"masks/{key}.png",
    }


def fill(journal: Journal, rows: int) -> float:
    """Record rows in transactions of 1,000; one in a hundred is a failure."""
    start = time.process_time()
    for first in range(0, rows, 1000):
        outcomes: list[ImageResult | Failure] = []
        for number in range(first, first + 1000):
            line = row(number)
            if number % 100 == 99:
                outcomes.append(Failure(line["key"], "read", "cannot be read as an image"))
            else:
                outcomes.append(ImageResult(line["key"], line, None, ("20480-0123456789abcdef",)))
        journal.record(outcomes)
    return time.process_time() - start


def record_beside(out: Path, ended: Any, waits: Any) -> None:
    """Record an image every 20 ms as another rank would, and send the longest wait."""
    longest, count = 0.0, 0
    with Journal(OutFolder(out, rank=1)) as journal:
        while not ended.is_set():
            start = time.monotonic()
            journal.record([ImageResult(f"z/{count}", row(count))])
            longest, count = max(longest, time.monotonic() - start), count + 1
            time.sleep(0.02)
    waits.put((longest, count))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return seconds of the clock and of the processor."""
    clock, processor = time.monotonic(), time.process_time()
    work()
    return time.monotonic() - clock, time.process_time() - processor


def journal(work: Path, rows: int) -> dict[str, Any]:
    """Measure the journal of so many rows."""
    out = work / "out"
    with Journal(OutFolder(out)) as file:
        file.claim(_SETTINGS)
        filled = fill(file, rows)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        alone = timed(file.export)
        context = multiprocessing.get_context("spawn")
        ended, waits = context.Event(), context.Queue()
        other = context.Process(target=record_beside, args=(out, ended, waits))
        other.start()
        while file.counts()[0] + file.counts()[1] == rows:  # until it works
            time.sleep(0.05)
        beside = timed(file.export)
        ended.set()
        longest, recorded = waits.get()
        other.join()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        counted = timed(file.counts)
        items = [Item(row(n)["key"], FilePlace(Path("x")), origin="") for n in range(32 * 300)]
        chunks = [items[at : at + 32] for at in range(0, len(items), 32)]
        planned = timed(lambda: [plan(chunk, file) for chunk in chunks])
    return {
        "rows": rows,
        "megabytes_of_the_journal": (out / JOURNAL).stat().st_size / 1e6,
        "megabytes_of_the_manifest": (out / MANIFEST).stat().st_size / 1e6,
        "cpu_seconds_to_record": filled,
        "seconds_to_write_the_tables": alone[0],
        "cpu_seconds_to_write_the_tables": alone[1],
        "seconds_to_write_the_tables_beside_another_writer": beside[0],
        "images_recorded_meanwhile": recorded,
        "longest_wait_of_the_other_writer": longest,
        "mib_more_at_the_peak": after - before,
        "seconds_to_count": counted[0],
        "cpu_microseconds_to_plan_a_settled_image": planned[1] / len(items) * 1e6,
    }


def files(work: Path, count: int = 200) -> dict[str, Any]:
    """Measure what the size and hash of a file take, of a mask and of class maps."""
    seconds = {}
    for name, size in (("a mask of 20 kB", 20_000), ("maps of 1 MB", 1_000_000)):
        path = work / "file"
        path.write_bytes(os.urandom(size))
        start = time.process_time()
        for _ in range(count):
            stamp_of(path)
        seconds[f"milliseconds for {name}"] = (time.process_time() - start) / count * 1e3
    return seconds


def starts(source: PhotoList, out: Path, engine: RayEngine | None) -> dict[str, float]:
    """Return the seconds until an image is done, and the memory of this process then."""
    begun, found = time.monotonic(), {}

    def watch() -> None:
        while not any(out.glob("masks/**/*.png")):
            time.sleep(0.05)
        found["seconds"] = time.monotonic() - begun
        found["mib"] = resident(os.getpid())
        os.kill(os.getpid(), 2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    settings = {"workers": 0, "threads": 1} if engine is None else {"ray": engine}
    try:
        run(recipe("folder"), source, out, **settings)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        watcher.join()
    return found


def started(lines: int, photos: Path, work: Path, *, ray: bool) -> dict[str, float]:
    """Measure the start of a list of so many lines, which names a few photos over and over."""
    path = work / f"list-{lines}-{ray}.txt"
    names = sorted(photo.name for photo in photos.iterdir())
    with path.open("w") as file:
        for number in range(lines):
            folder = photos / f"{number // len(names):06}"
            if number % len(names) == 0:
                folder.symlink_to(photos)
            file.write(f"{folder.name}/{names[number % len(names)]}\n")
    try:
        engine = RayEngine() if ray else None
        return starts(PhotoList(path, photos), work / f"out-{lines}-{ray}", engine)
    finally:
        for link in photos.glob("0*"):
            if link.is_symlink():
                link.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=("journal", "files", "list"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "bulk_scale.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = {"torch": torch.__version__, "python": platform.python_version()}
    results["machine"] |= {"cpu": cpu(), "cores": os.cpu_count()}

    def keep(name: str, measured: dict[str, Any]) -> None:
        results[name] = measured
        path.write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "bulk_scale.md").write_text(report(results))

    with tempfile.TemporaryDirectory() as home:
        work = Path(home)
        if "journal" in options.parts:
            keep("journal", journal(work, options.rows))
        if "files" in options.parts:
            keep("files", files(work))
        if "list" in options.parts:
            photos = write_shapes(work / "drawn", 100, size=(48, 64)).root / "JPEGImages"
            for ray in (False, True) if options.ray else (False,):
                for lines in (1000, options.lines):
                    name = f"list of {lines} lines, {'ray' if ray else 'local'}"
                    keep(name, started(lines, photos, work, ray=ray))
    print(report(results))


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    machine = results["machine"]
    lines = [
        f"`python benchmarks/bulk_scale.py journal files list --ray`, {machine['cores']} cores of "
        f"{machine['cpu']}, which others used too.",
        "",
    ]
    if "journal" in results:
        table = results["journal"]
        lines += ["| journal | measured | by arithmetic, 10 million |", "|---|---|---|"]
        fixed = ("longest_wait", "mib_more", "cpu_microseconds", "images_recorded")
        for name, value in table.items():
            ten = "" if name.startswith(fixed) else f"{value * 1e7 / table['rows']:,.0f}"
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            lines.append(f"| {name.replace('_', ' ')} | {text} | {ten or 'the same'} |")
        lines.append("")
    if "files" in results:
        lines += ["| CPU time of size and hash | |", "|---|---|"]
        lines += [f"| {name} | {value:.3f} |" for name, value in results["files"].items()]
        lines.append("")
    rows = [(name, value) for name, value in results.items() if name.startswith("list")]
    if rows:
        head = "| until the first mask | seconds | MiB of the process that plans |"
        lines += [head, "|---|---|---|"]
        lines += [f"| {n} | {v['seconds']:.1f} | {v['mib']} |" for n, v in rows]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
