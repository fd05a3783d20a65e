"""Training with and without DOEI, and with its controls: same seeds, same steps, same data.

    python benchmarks/train_ab.py                                  # drawn shapes
    python benchmarks/train_ab.py --data VOC2012 --size 224 --weights vit_tiny.safetensors

Trains the host of examples/train_class_tokens.py once for each arm and rng seed; all its options
are taken. The background score is picked on `train`, figures come from `val`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import camkit
from camkit.manifest import environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import train_class_tokens as host  # noqa: E402 - found through the line above

ARMS = {
    "plain": None,
    "DOEI": camkit.DOEI(),
    "DOEI without alignment": camkit.DOEI(alignment=None),
    "control: output x2": camkit.edits.ScaleOutput(2.0),
    "control: one more hop": camkit.edits.OneMoreHop(),
}
Build = Callable[[argparse.Namespace, int], host.ClassTokenViT]


def with_edit(build: Build, edit: object) -> Build:
    def built(args: argparse.Namespace, classes: int) -> host.ClassTokenViT:
        model = build(args, classes)
        if edit is not None:
            camkit.attach(model, edit)
        return model

    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--rng-seeds", type=int, default=3)
    parser.add_argument("--arms", help="comma-separated; all without it")
    own, rest = parser.parse_known_args()
    arms = own.arms.split(",") if own.arms else list(ARMS)
    torch.set_num_threads(1)
    build, rows = host.build, []
    for arm in arms:
        for rng_seed in range(own.rng_seeds):
            args = host.read_arguments([*rest, "--rng-seed", str(rng_seed)])
            args.out = ROOT / "out" / "train_ab" / f"{arm} {rng_seed}".replace(" ", "_")
            host.build = with_edit(build, ARMS[arm])
            host.train(args)
            last = json.loads((args.out / "log.jsonl").read_text().splitlines()[-1])
            rows.append({"arm": arm, "rng_seed": rng_seed, **last})
    table = {
        arm: {
            name: [round(row[name] * 100, 1) for row in rows if row["arm"] == arm]
            for name in ("miou", "map")
        }
        for arm in arms
    }
    options = {name: str(value) for name, value in vars(args).items() if name != "out"}
    result = {"environment": environment(), "options": options, "table": table}
    path = ROOT / "benchmarks" / "results" / "train_ab.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for arm, found in table.items():
        mean = statistics.mean(found["miou"])
        print(f"{arm:<24} mIoU {mean:.1f} {found['miou']}  mAP {found['map']}")


if __name__ == "__main__":
    main()
