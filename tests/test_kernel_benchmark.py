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
