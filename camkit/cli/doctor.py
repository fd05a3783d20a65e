"""Report what camkit recognises in a model, what works on it, and the line to start with."""

import argparse
import re

import torch
from torch import nn

from camkit.capture.host import find_patch_embeddings
from camkit.cli.models import (
    DEFAULT_MODEL,
    MODELS,
    ModelSource,
    create,
    explained,
    known_architecture,
    read_size,
    source_of,
)
from camkit.diagnosis import diagnose
from camkit.manifest import environment
from camkit.method import PRESETS
from camkit.native.kernels import kernel_state
from camkit.native.loader import native_state
from camkit.pipeline import wrap
from camkit.seeds.views import ModelCall, stated_size

EXAMPLES = f"""examples:
  camkit doctor
  camkit doctor vit_small_patch14_reg4_dinov2 --size 224
  camkit doctor mymodels:build              (in mymodels.py or a package; imports and runs it)
  camkit doctor vit_tiny_patch16_224 --checkpoint own.pth

{MODELS}

The answer does not depend on weights, so those of timm are not loaded.
From Python: print(camkit.diagnose(model, images))"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help=f"see below (default: {DEFAULT_MODEL})")
    parser.add_argument("--model", dest="named", metavar="MODEL", help="the same")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights, to see whether they fit")
    parser.add_argument(
        "--class-tokens",
        type=positions,
        metavar="POSITIONS",
        help="positions of the class tokens, such as 0 or 1-20, if camkit cannot tell them",
    )
    parser.add_argument(
        "--other-tokens",
        type=positions,
        metavar="POSITIONS",
        help="positions of further tokens that are no patches, of the background, say",
    )
    parser.add_argument(
        "--size",
        help="side of the square test image in pixels, or ROWSxCOLS (default: the model's own)",
    )


def positions(text: str) -> list[int]:
    """Read positions such as ``0,5-8``.

    >>> positions("0,5-8")
    [0, 5, 6, 7, 8]
    """
    places: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if found is None:
            raise argparse.ArgumentTypeError(f"expected positions such as 0,5-8, got {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        places += range(first, last + 1)
    return places


def execute(options: argparse.Namespace) -> int:
    if options.model is not None and options.named is not None:
        raise ValueError(f"{options.model} and --model {options.named} both name a model; give one")
    source = source_of(options.named or options.model or DEFAULT_MODEL, options.checkpoint)
    model, call = _open(source)
    size = read_size(options.size) if options.size else _stated(model)
    height, width = (size, size) if isinstance(size, int) else size
    channels = next((c.in_channels for c in find_patch_embeddings(model).values()), 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, channels, height, width, generator=generator)
    roles = {"class_tokens": options.class_tokens, "other_tokens": options.other_tokens}
    with explained(images.shape):
        diagnosis = diagnose(model, images, call=call, **roles)
    rows = {"name": f"{source.name}, tried with one image of {height}x{width}", **diagnosis.rows}
    if diagnosis.refusal is None:
        pipeline = wrap(model, call=call, **roles)
        pipeline.vocabulary = None  # a model may state other classes than it returns
        rgb = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        with explained(images.shape):
            method = pipeline.decide(images * 2 - 1, rgb)
        default = repr(method.seed)
        if method.edit is not None:
            default += f" under {method.edit!r} of the last {method.edit_blocks} blocks"
        rows["defaults"] = ", then ".join([default, *map(repr, method.refine)])
        if len(pipeline.passed_over) == len(PRESETS):
            rows["defaults"] = "none of the presets works"
        if pipeline.passed_over:
            rows["presets not used"] = "; ".join(pipeline.passed_over)
    rows["kernels"] = kernel_state()
    rows["dense CRF"] = native_state("dense_crf")
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in environment().items())
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return 0 if diagnosis.refusal is None else 1


def _open(source: ModelSource) -> tuple[nn.Module, ModelCall | None]:
    """Return a model, and how to call it if the user's code says so; timm's needs no weights."""
    if source.kind == "timm" and source.checkpoint is None:
        return create(known_architecture(source.bare)).eval(), None
    return source.loaded.model, source.loaded.call


def _stated(model: nn.Module) -> tuple[int, int]:
    """Return the rows and columns that a model says it takes, or 224."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" in settings:
        rows, cols = settings["input_size"][1:]
        return rows, cols
    return stated_size(model) or (224, 224)
