"""The second stage: a segmenter trained on pseudo masks, beside the pseudo masks themselves.

    python benchmarks/second_stage.py

Takes the commands of `examples/train_segmenter.py` as they stand: pseudo masks of the train and val
photos of `voc12_animals` with the default, exported, and a small head trained on the tokens of the
same ViT-Ti. Photos with boxes drawn into them are left out. The settings of the example were not
chosen on val. Writes `benchmarks/results/second_stage.md`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bulk_setting import cpu

from camkit.manifest import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLASSES = "cat,dog,horse,cow,sheep,person"
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
ROW = re.compile(r"^(.+): mIoU ([\d.]+) \((.+)\)$", re.MULTILINE)


def command(*words: object) -> str:
    """Run a command and return what it printed."""
    result = subprocess.run(
        [sys.executable, *map(str, words)], text=True, capture_output=True, cwd=ROOT, check=False
    )
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{words}: {result.stderr}")
    print(result.stdout[-2000:], result.stderr[-500:], flush=True)
    return result.stdout


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    data = Path(os.environ["CAMKIT_DATA"])
    photos = data / "voc12_animals"
    drawn = photos / "ImageSets" / "Segmentation" / "drawn_boxes.txt"
    omitted = set(drawn.read_text().split())
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for split in ("train", "val"):
            names = (photos / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()
            listing = folder / f"{split}.txt"
            listing.write_text("\n".join(name for name in names if name not in omitted))
            run, out = folder / f"run_{split}", folder / f"pseudo_{split}"
            words = ["--root", photos / "JPEGImages", "--labels", photos / "labels.json"]
            words += ["--model", MODEL, "--vocabulary", "voc", "--out", run]
            command("-m", "camkit", "run", listing, *words)
            command("-m", "camkit", "export", run, "--to", "voc", "--classes", "voc", "--out", out)
        weights = next((data / "weights").glob("*in1k.fp16.safetensors"))
        printed = command(
            "examples/train_segmenter.py",
            *("--masks", folder / "pseudo_train", "--truth", photos, "--split", "val"),
            *("--compare", folder / "pseudo_val", "--weights", weights, "--classes", CLASSES),
            *("--without", drawn),
        )
    rows = ["| | mIoU on val | by class |", "|---|---|---|"]
    rows += [f"| {name} | {mean} | {each} |" for name, mean, each in ROW.findall(printed)]
    counts = next(line for line in printed.splitlines() if "pseudo masks, " in line)
    seconds = time.process_time() - begun + sum(os.times()[2:4])
    notes = f"{counts}; {seconds:.0f} CPU seconds in all, {cpu()}, torch {environment()['torch']}."
    (RESULTS / "second_stage.md").write_text("\n".join([*rows, "", notes]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
