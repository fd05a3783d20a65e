"""The lines of docs/plug_in.md run as they stand, each block in a process of its own."""

import pytest
import torch
from fresh import ON_FIRST_USE, FreshProcesses
from pages import ROOT, blocks, script_of
from scripts import FACTS, MAKERS

from camkit.data import write_cam

BLOCKS = blocks(ROOT / "docs" / "plug_in.md")
OF_A_HEADING = {
    name: [block for block in BLOCKS if block.heading == name]
    for name in dict.fromkeys(block.heading for block in BLOCKS)
}
ONE_OF_SEVERAL = [
    block for several in OF_A_HEADING.values() for block in several if len(several) > 1
]
AT_THE_END = """
from types import SimpleNamespace

from scripts import FACTS

FACTS[{heading!r}](SimpleNamespace(**globals()))
"""


@pytest.fixture(scope="module")
def fresh():
    with FreshProcesses() as processes:
        yield processes


@pytest.fixture
def folder(tmp_path):
    for name in ("cams", "cam-npy"):
        (tmp_path / name).mkdir()
    write_cam(tmp_path / "cams" / "shapes_0006.npy", [1], torch.rand(1, 3, 4))
    return tmp_path


def test_every_heading_with_lines_has_a_script_to_add_them_to():
    assert list(OF_A_HEADING) == list(MAKERS) == list(FACTS)
    assert [block.why_not for block in BLOCKS] == [None] * len(BLOCKS)


@pytest.mark.parametrize("heading", MAKERS)
def test_lines_of_a_codebase_give_what_the_page_says(heading, fresh, folder):
    lines = "\n".join(block.code for block in OF_A_HEADING[heading])
    code = lines + AT_THE_END.format(heading=heading)
    fresh.run(code, folder, given=("scripts", "names_of", heading))


@pytest.mark.parametrize("block", ONE_OF_SEVERAL, ids=str)
def test_a_block_runs_in_a_process_of_its_own(block, fresh, folder):
    code, _ = script_of(block, BLOCKS)
    fresh.run(code, folder, given=("scripts", "names_of", block.heading))


def test_scripts_import_no_part_that_is_loaded_on_first_use(fresh, tmp_path):
    code = (
        f"import sys\nprint([name for name in {ON_FIRST_USE} if 'camkit.' + name in sys.modules])"
    )
    assert fresh.run(code, tmp_path, given=("scripts", "names_of", "ToCo")) == "[]\n"
