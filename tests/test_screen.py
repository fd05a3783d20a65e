"""Progress bars: text in a terminal or a notebook, nothing in a file."""

import os
import pty
import sys
import termios

import pytest

from camkit.screen import in_notebook, progress


def test_a_file_gets_no_bar(tmp_path, monkeypatch):
    with (tmp_path / "log.txt").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        assert list(progress([1, 2], desc="photos", delay=0)) == [1, 2]
    assert (tmp_path / "log.txt").read_text() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    shown, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert list(progress([1, 2], desc="photos", delay=0)) == [1, 2]
        printed = os.read(shown, 10_000)
    os.close(shown)
    assert b"photos: 100%" in printed


NOTEBOOK = (
    "import sys, tqdm, warnings\n"
    "sys.modules['ipywidgets'] = None\n"
    "warnings.simplefilter('error', tqdm.TqdmWarning)",
    "from camkit.screen import in_notebook, progress\n"
    "for _ in progress([1, 2], desc='photos', delay=0): pass",
    "print(in_notebook())",
)


@pytest.mark.slow
def test_a_notebook_without_ipywidgets_gets_a_bar_of_text_and_no_warning():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, NOTEBOOK)))
    nbclient.NotebookClient(notebook, timeout=120).execute()
    bar, answer = ("".join(part.text for part in cell.outputs) for cell in notebook.cells[1:])
    assert "photos: 100%" in bar
    assert answer == "True\n"


def test_a_script_is_not_a_notebook():
    assert not in_notebook()
