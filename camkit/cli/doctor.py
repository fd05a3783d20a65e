"""Report what camkit recognises in a model, what works on it, and the line to start with."""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from torch import nn

from camkit.cli.models import DEFAULT_MODEL, create, known_architecture
from camkit.diagnosis import diagnose
from camkit.errors import CamkitError
from camkit.manifest import environment
from camkit.native.kernels import kernel_state
from camkit.pipeline import wrap

EXAMPLES = """examples:
  camkit doctor
  camkit doctor vit_small_patch14_reg4_dinov2 --size 224
  camkit doctor mymodels:build              (build() or a model, in mymodels.py or a package)

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
        "--size",
        type=int,
        help="side of the square test image in pixels (default: the model's own)",
    )


def execute(options: argparse.Namespace) -> int:
    model: nn.Module
    if ":" in options.model:
        model = _from_code(options.model)
    else:
        model = create(known_architecture(options.model))
    settings = getattr(model, "pretrained_cfg", None) or {}
    side = options.size or int(settings.get("input_size", (3, 224, 224))[-1])
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    diagnosis = diagnose(model.eval(), images)
    rows = {"name": f"{options.model}, tried with one image of {side}x{side}", **diagnosis.rows}
    if diagnosis.refusal is None:
        method = wrap(model).decide(images * 2 - 1, images)
        default = repr(method.seed)
        if method.edit is not None:
            default += f" under {method.edit!r} of the last {method.edit_blocks} blocks"
        rows["defaults"] = ", then ".join([default, *map(repr, method.refine)])
    rows["kernels"] = kernel_state()
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in environment().items())
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return 0 if diagnosis.refusal is None else 1


def _from_code(place: str) -> nn.Module:
    module, _, name = place.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:  # as `python -m` does
        sys.path.insert(0, folder)
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CamkitError(f"{place}: {error}; expected module:name") from error
    model = value if isinstance(value, nn.Module) else value()
    if not isinstance(model, nn.Module):
        raise CamkitError(f"{place} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model
