"""Tell what camkit sees in a model, what works on it, and the line to begin with."""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from camkit.cli.models import DEFAULT_MODEL, create, known_architecture
from camkit.diagnosis import diagnose
from camkit.errors import CamkitError
from camkit.manifest import environment
from camkit.method import DEFAULT_REFINE, PRESETS, suitable
from camkit.native.kernels import kernel_state
from camkit.seeds import ModelRunner

EXAMPLES = """examples:
  camkit doctor
  camkit doctor vit_small_patch14_reg4_dinov2 --size 224
  camkit doctor mymodels:build              (build() or a model, in mymodels.py or a package)

Weights do not matter here, so none are loaded.
From Python: print(camkit.diagnose(model, images))"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        help="timm model name, or module:name of a model or of a function that makes one "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="side of the square image it is tried with, in pixels (default: the model's own)",
    )


def execute(options: argparse.Namespace) -> int:
    model = _from_code(options.model) if ":" in options.model else _from_timm(options.model)
    side = options.size or _own_size(model)
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = diagnose(model.eval(), images)
    rows = {"name": f"{options.model}, tried with one image of {side}x{side}", **found.rows}
    if found.refusal is None:
        steps = ", then ".join(map(repr, DEFAULT_REFINE))
        rows["defaults"] = f"{_default(model, images)}, then {steps}"
    rows["kernels"] = kernel_state()
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in environment().items())
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")
    return 0 if found.refusal is None else 1


def _default(model: nn.Module, images: Tensor) -> str:
    preset = suitable(PRESETS, ModelRunner(model), images * 2 - 1, images)
    if preset.edit is None:
        return repr(preset.seed)
    return f"{preset.seed!r} under {preset.edit!r} of the last {preset.edit_blocks} blocks"


def _from_timm(name: str) -> nn.Module:
    model: nn.Module = create(known_architecture(name))
    return model


def _from_code(place: str) -> nn.Module:
    module, _, name = place.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:  # as `python -m` would find it
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CamkitError(f"{place}: {error}; expected module:name") from error
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise CamkitError(f"{place} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _own_size(model: nn.Module) -> int:
    settings = getattr(model, "pretrained_cfg", None) or {}
    return int(settings.get("input_size", (3, 224, 224))[-1])
