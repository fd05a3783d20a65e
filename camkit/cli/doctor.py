"""Tell what camkit sees in a model: attention, token roles, patch grid, and which seeds work."""

import argparse

import torch

from camkit.bench.variants import SEEDS
from camkit.capture import watch
from camkit.cli.models import add_model_arguments, open_model
from camkit.errors import CamkitError
from camkit.manifest import environment

EXAMPLES = """examples:
  camkit doctor
  camkit doctor --model vit_small_patch14_reg4_dinov2.lvd142m --size 224"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)


def execute(options: argparse.Namespace) -> int:
    opened = open_model(options.model, size=options.size)
    side = opened.photos.size if isinstance(opened.photos.size, int) else opened.photos.size[0]
    side = max(1, side // opened.photos.multiple) * opened.photos.multiple
    with (
        torch.no_grad(),
        watch(opened.model, gradients=True, vocabulary=opened.vocabulary) as seen,
    ):
        opened.model(torch.zeros(1, 3, side, side))
    capture = seen.capture
    anatomy = capture.anatomy
    heads, tokens = capture.blocks[0].shape[1:3]
    rows = {
        "model": f"{options.model} from {opened.source}",
        "photos": repr(opened.photos),
        "attention": f"{len(capture.blocks)} blocks of {heads} heads ({capture.names[0]}, ...), "
        f"seen as {type(capture.blocks[0]).__name__}",
        "tokens": f"{tokens}, of which {capture.grid.rows}x{capture.grid.cols} patches",
        "class tokens": _positions(anatomy.class_tokens),
        "distillation tokens": _positions(anatomy.distillation_tokens),
        "register tokens": _positions(anatomy.register_tokens),
        "other tokens": _positions(anatomy.other_tokens),
        "classes": f"{len(opened.vocabulary)}, such as {opened.vocabulary.names[0]}",
    }
    classes = torch.zeros(1, 1, dtype=torch.int64)
    for name, seed in SEEDS.items():
        try:
            seed(capture, classes)
        except CamkitError as error:
            rows[f"seed: {name}"] = f"no: {error}"
        else:
            rows[f"seed: {name}"] = "works"
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in environment().items())
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return 0


def _positions(positions: tuple[int, ...]) -> str:
    return ", ".join(map(str, positions)) or "none"
