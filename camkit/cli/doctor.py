"""Report what camkit recognises in a model, what works on it, and the line to start with."""

import argparse
import importlib
import re
import sys
from pathlib import Path

import torch
from torch import nn

from camkit.capture.host import find_patch_embeddings
from camkit.cli.models import DEFAULT_MODEL, create, known_architecture
from camkit.diagnosis import diagnose
from camkit.errors import CamkitError
from camkit.manifest import environment
from camkit.method import PRESETS
from camkit.native.kernels import kernel_state
from camkit.pipeline import wrap
from camkit.seeds.views import ModelCall

EXAMPLES = """examples:
  camkit doctor
  camkit doctor vit_small_patch14_reg4_dinov2 --size 224
  camkit doctor mymodels:build              (build() or a model, in mymodels.py or a package)

build() may also return (model, call): then the model is called by call(model, images), for a model
that takes more than images.

The answer does not depend on weights, so none are loaded.
From Python: print(camkit.diagnose(model, images))"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        help="timm model name, or module:name of a model or of a function that returns one "
        "(default: %(default)s)",
    )
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
        type=int,
        help="side of the square test image in pixels (default: the model's own)",
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
    model: nn.Module
    call: ModelCall | None = None
    if ":" in options.model:
        model, call = _from_code(options.model)
    else:
        model = create(known_architecture(options.model))
    settings = getattr(model, "pretrained_cfg", None) or {}
    side = options.size or int(settings.get("input_size", (3, 224, 224))[-1])
    channels = next((c.in_channels for c in find_patch_embeddings(model).values()), 3)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, channels, side, side, generator=generator)
    roles = {"class_tokens": options.class_tokens, "other_tokens": options.other_tokens}
    diagnosis = diagnose(model.eval(), images, call=call, **roles)
    rows = {"name": f"{options.model}, tried with one image of {side}x{side}", **diagnosis.rows}
    if diagnosis.refusal is None:
        pipeline = wrap(model, call=call, **roles)
        rgb = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
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
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in environment().items())
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return 0 if diagnosis.refusal is None else 1


def _from_code(place: str) -> tuple[nn.Module, ModelCall | None]:
    """Return a model of the user's code, and how to call it if the code says so."""
    module, _, name = place.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:  # as `python -m` does
        sys.path.insert(0, folder)
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CamkitError(f"{place}: {error}; expected module:name") from error
    built = value() if callable(value) and not isinstance(value, nn.Module) else value
    model, call = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module) or not (call is None or callable(call)):
        parts = built if isinstance(built, tuple) else (built,)
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise CamkitError(
            f"{place} gave {kinds or 'nothing'}, expected a torch.nn.Module, or (model, call) "
            "where call(model, images) runs it"
        )
    return model, call
