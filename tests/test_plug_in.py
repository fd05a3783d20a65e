"""The lines of docs/plug_in.md run as they stand, those of a heading in a process of their own."""

import os
import subprocess
import sys

import pytest
import torch
from scripts import FACTS, MAKERS
from test_docs import ROOT, blocks

from camkit.data import write_cam

BLOCKS = blocks(ROOT / "docs" / "plug_in.md")
SCRIPT = """
from types import SimpleNamespace

from scripts import FACTS, names_of

globals().update(names_of({heading!r}))
{lines}
FACTS[{heading!r}](SimpleNamespace(**globals()))
"""


def test_every_heading_with_lines_has_a_script_to_add_them_to():
    assert list(dict.fromkeys(block.heading for block in BLOCKS)) == list(MAKERS) == list(FACTS)
    assert [block.why_not for block in BLOCKS] == [None] * len(BLOCKS)


@pytest.mark.parametrize("heading", MAKERS)
def test_lines_run_in_a_fresh_process_and_give_what_the_page_says(heading, tmp_path):
    for folder in ("cams", "cam-npy"):
        (tmp_path / folder).mkdir()
    write_cam(tmp_path / "cams" / "shapes_0006.npy", [1], torch.rand(1, 3, 4))
    lines = "\n".join(block.code for block in BLOCKS if block.heading == heading)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(heading=heading, lines=lines), "utf-8")
    paths = (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", ""))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
