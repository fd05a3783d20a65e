"""One bulk run of a few drawn photos, by worker processes: `python tests/one_bulk_run.py FOLDER`.

CI runs it where the whole suite does not run; a run that is repeated keeps what is finished.
"""

import sys
from pathlib import Path

from camkit.cli import main
from camkit.data import write_shapes


def run(folder):
    write_shapes(folder / "VOC2012", 6, size=(48, 64))
    command = ["run", str(folder / "VOC2012" / "JPEGImages"), "--out", str(folder / "results")]
    command += ["--model", "demo", "--refine", "normalize:minmax+crf", "--workers", "2"]
    for _ in range(2):
        assert main(command) == 0
        assert len(list((folder / "results").rglob("*.png"))) == 6


if __name__ == "__main__":  # worker processes import this file where they cannot be forked
    run(Path(sys.argv[1]))
