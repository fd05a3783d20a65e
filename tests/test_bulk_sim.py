"""The simulated pipeline: lines worked by hand, laws of queues, and the tables made of it."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def bulk_sim():
    spec = importlib.util.spec_from_file_location("bulk_sim", ROOT / "benchmarks/bulk_sim.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "bulk_sim", module)  # dataclasses look there
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("chunks", "workers", "made"),
    [
        ([[2]], 1, [10, 12]),  # read to 2, both through the model to 8, finished one by one
        ([[1, 1]], 1, [7, 10]),  # the first leaves the model at 5, the second at 8
        ([[2]], 2, [9, 9]),  # read side by side
        ([[1], [1]], 2, [6, 9]),
    ],
)
def test_lines_worked_by_hand(bulk_sim, chunks, workers, made):
    seconds = bulk_sim.Seconds(read=1, model=3, finish=2)
    assert bulk_sim.Line(seconds, chunks, workers).run() == made


@pytest.mark.parametrize("read", [0.1, 1.0])
@pytest.mark.parametrize("model", [0.2, 1.5])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_long_run_has_the_rate_of_its_slower_side(bulk_sim, read, model, workers):
    seconds = bulk_sim.Seconds(read, model, finish=0.5)
    made = bulk_sim.Line(seconds, [[8, 8]] * 40, workers).run()
    slower = max(model, (read + 0.5) / workers)
    assert len(made) == 640
    assert made == sorted(made)
    assert made[-1] >= 640 * slower
    assert bulk_sim.seconds_an_image(made) == pytest.approx(slower, rel=0.06)


def test_small_chunks_starve_many_workers(bulk_sim):
    seconds = bulk_sim.Seconds(read=0.1, model=0.01, finish=0.9)
    small, large = (
        bulk_sim.seconds_an_image(bulk_sim.Line(seconds, [[8] * (size // 8)] * count, 100).run())
        for size, count in ((8, 250), (256, 40))
    )
    assert small > 3 * 0.01
    assert large == pytest.approx(0.01, rel=0.06)


def test_the_tables_of_the_docs_are_those_of_the_measurements(bulk_sim):
    rates = json.loads((RESULTS / "bulk.json").read_text("utf-8"))["rates"]
    reported = bulk_sim.report(rates, bulk_sim.simulated(rates))
    assert (RESULTS / "bulk_sim.md").read_text("utf-8") == reported
