"""Progress bars: text in a terminal or a notebook, nothing in a file; and results in a notebook."""

import io
import sys

import pytest

from camkit.screen import in_notebook, progress


def test_a_file_gets_no_bar(tmp_path, monkeypatch):
    with (tmp_path / "log.txt").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        assert list(progress([1, 2], desc="photos", delay=0)) == [1, 2]
    assert (tmp_path / "log.txt").read_text() == ""


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress([1, 2], desc="photos", delay=0)) == [1, 2]
    assert "photos: 100%" in terminal.getvalue()


NOTEBOOK = (
    "import sys, warnings\nsys.modules['ipywidgets'] = None\nwarnings.simplefilter('always')\n"
    "import camkit, camkit.data, tqdm.auto\nfrom camkit.screen import in_notebook, progress",
    "for _ in progress([1, 2], desc='photos', delay=0): pass",
    "print(in_notebook())",
    "import numpy\nphoto = camkit.photo_from_array(numpy.zeros((32, 32, 3), 'uint8'), size=32)\n"
    "result = camkit.wrap(camkit.data.demo_model())(photo, classes=[281])\nresult.show()",
    "result",
)


@pytest.mark.slow
def test_a_notebook_shows_bars_and_results():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, NOTEBOOK)))
    nbclient.NotebookClient(notebook, timeout=120).execute()
    setup, bar, answer, shown, value = (cell.outputs for cell in notebook.cells)
    assert "IProgress" not in "".join(part.text for part in setup)  # bars are text, without a word
    assert "photos: 100%" in "".join(part.text for part in bar)
    assert answer[0].text == "True\n"
    for output in (shown[-1], value[-1]):
        assert output.data["text/html"].startswith("<div")
        assert output.data["text/plain"].startswith("Result(32x32: ")


def test_a_script_is_not_a_notebook():
    assert not in_notebook()
