"""The published table: what each seed gains by refinement on the held-out images of voc12_animals.

    CAMKIT_DATA=folder python benchmarks/gains.py

Background scores, refiners and their settings were chosen on `train`; figures come from `val`.
"""

import sys
from pathlib import Path

from camkit.cli import main
from camkit.cli.models import data_folder

RESULTS = Path(__file__).parent / "results"
CLASSES = "cat,dog,horse,cow,sheep,person"

if __name__ == "__main__":
    folder = data_folder()
    if folder is None:
        sys.exit("set CAMKIT_DATA to a folder with voc12_animals/ and weights/")
    dataset = str(folder / "voc12_animals")
    splits = ["--split", "val", "--tune-split", "train", "--classes", CLASSES]
    sys.exit(main(["bench", dataset, *splits, "--out", str(RESULTS / "gains.json")]))
