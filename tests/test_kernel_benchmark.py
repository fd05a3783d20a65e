"""The benchmark of the attention operators survives what may happen on its first GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "kernel.py"


def run(into, *options, **environment):
    command = [sys.executable, str(SCRIPT), *options]
    chosen = os.environ | {"OUT": str(into), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=chosen | environment, check=False, timeout=500
    )
    return done, {path.name for path in into.iterdir()}


@pytest.mark.long
@pytest.mark.slow
def test_a_dry_run_walks_every_branch_and_writes_where_it_is_told(tmp_path):
    done, files = run(tmp_path, "--dry-run", "--rounds", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert files == {"kernel_dry.json", "kernel_dry.md"}
    result = json.loads((tmp_path / "kernel_dry.json").read_text())
    assert result["stopped"] == {}
    assert result["checks"][0]["failed"] == []
    for part in ("baselines", "layers", "models", "cpu"):
        rows = result[part]
        assert len(rows) > 0
        assert "failed" not in json.dumps(rows)
    text = (tmp_path / "kernel_dry.md").read_text()
    assert "no figure here is a measurement" in text
    assert "not run on a GPU" in text


def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path):
    done, _ = run(tmp_path, "--time", "--dry-run", "--seconds", "0.5")
    result = json.loads((tmp_path / "kernel_dry.json").read_text())
    assert done.returncode == 1
    assert result["stopped"]["baselines"] == "not finished within 0 s"
    assert set(result["stopped"]) > {"layers", "cpu"}


def test_aims_are_ratios_of_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from kernel import EAGER, OURS, aims_table

    row = {"model": "ViT-S", "side": 448, "SDPA": {"us": 30.0, "MiB": 4.0}}
    row |= {"ours, rows and columns": {"us": 33.0, "MiB": 4.0}, EAGER: {"us": 300.0, "MiB": 90.0}}
    row |= {OURS: {"us": 100.0, "MiB": 9.0}}
    small = row | {"side": 224, OURS: {"failed": "out of memory"}}
    model = "vit_small_patch16_224"
    steps = [
        {"model": model, f"{way}, training step": {"images_per_s": rate}}
        for way, rate in (("plain", 120.0), ("DOEI, last 3", 100.0))
    ]
    table = [
        line.split(" | ")
        for line in aims_table([row, small], steps)
        if "ViT" in line or model in line
    ]
    assert [(cells[2], cells[4]) for cells in table] == [
        ("1.100", "met |"),
        ("0.333", "missed |"),
        ("0.100", "met |"),
        ("1.200", "missed |"),
    ]
    assert "not run on a GPU" in "".join(aims_table([], []))
