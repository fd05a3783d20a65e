"""Models of the user: built by code, loaded from a checkpoint, or saved by transformers."""

import importlib
import importlib.util
import pickle
import sys
import traceback
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from camkit.errors import CamkitError, nearby
from camkit.seeds.views import ModelCall

Weights = Mapping[str, Tensor]

_NOT_WEIGHTS = (pickle.UnpicklingError, AttributeError, KeyError, ValueError, TypeError)
"""What reading a file raises that holds something else."""


def build_model(place: str, folder: Path) -> tuple[nn.Module, ModelCall | None]:
    """Return the model that the user's code makes, and how to call it if the code says so.

    Args:
        place: ``module:name`` or ``file.py:name``, of a model, of ``(model, call)``, or of a
            function that returns one of these.
        folder: where a module or a file is looked for first; `sys.path` keeps it.

    Raises:
        CamkitError: the code cannot be imported, raises an error, or makes something else.
    """
    source, _, name = place.rpartition(":")
    try:
        value: Any = getattr(_import(source, folder), name)
        built = value() if callable(value) and not isinstance(value, nn.Module) else value
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise CamkitError(f"{place}: {_reason(error)}") from error
    model, call = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module) or not (call is None or callable(call)):
        parts = built if isinstance(built, tuple) else (built,)
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise CamkitError(
            f"{place} gave {kinds or 'nothing'}, expected a torch.nn.Module, or (model, call) "
            "where call(model, images) runs it"
        )
    return model, call


def _import(source: str, folder: Path) -> ModuleType:
    """Import a module by its name or its file, as `python -m` does from the folder."""
    path = folder / source
    if path.suffix != ".py":
        _search_first(folder)
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name == source:
                hint = nearby(folder / f"{source}.py") or "; expected module:name or file.py:name"
                raise ModuleNotFoundError(f"{error}{hint}") from error
            raise
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist{nearby(path)}")
    _search_first(path.parent)  # for what it imports from its own folder
    spec = importlib.util.spec_from_file_location(f"_camkit_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _reason(error: BaseException) -> str:
    """Say what the user's code raised, and in which line."""
    files = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    where = f" ({files[-1][0]}, line {files[-1][1]})" if files else ""
    if isinstance(error, SystemExit):
        reason = "it ended the program; put what a script does under if __name__ == '__main__':"
    elif isinstance(error, ImportError | FileNotFoundError) or not files:
        reason = str(error)
    else:
        reason = f"it raised {type(error).__name__}: {error}"
    if isinstance(error, AttributeError) and not files:
        close = get_close_matches(error.name or "", dir(error.obj), n=1)
        reason += "".join(f"; did you mean {name}?" for name in close)
    return reason + where


def read_checkpoint(path: Path) -> Weights:
    """Read the weights in a .safetensors file or a file of torch.save, without running code.

    Usual wrappers are removed: ``state_dict``, ``model`` and their averages (``_ema``), the
    prefixes of DistributedDataParallel and torch.compile.

    Raises:
        CamkitError: the file does not exist, cannot be read, or holds something else.
    """
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    if not path.is_file():
        what = "is a folder" if path.is_dir() else f"does not exist{nearby(path)}"
        raise CamkitError(f"--checkpoint must be a file of weights: {path} {what}")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, *_NOT_WEIGHTS) as error:
        raise CamkitError(
            f"{path} cannot be read as weights ({first_line(error)}); save them alone, by "
            "torch.save(model.state_dict(), path) or as .safetensors: other pickles may run code"
        ) from error
    weights = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        held = ", ".join(map(str, list(state)[:5])) or "nothing"
        raise CamkitError(f"{path} holds {held}, no weights; save model.state_dict()")
    return {key: v.float() if v.is_floating_point() else v for key, v in weights.items()}


def timm_options(weights: Weights, settings: Any) -> tuple[Weights, dict[str, Any]]:
    """Return the weights by timm's names, and what creates the model that they were saved from.

    Args:
        weights: of a checkpoint, perhaps below a prefix.
        settings: timm's pretrained configuration of the architecture, or None.
    """
    options: dict[str, Any] = {}
    entrance = f"{getattr(settings, 'first_conv', None) or 'patch_embed.proj'}.weight"
    weights = without_prefix(weights, entrance)
    heads = getattr(settings, "classifier", None) or "head"
    head = weights.get(f"{heads if isinstance(heads, str) else heads[0]}.weight")
    if head is not None:
        options["num_classes"] = len(head)
    first, positions = weights.get(entrance), weights.get("pos_embed")
    if first is None or first.dim() != 4:
        return weights, options
    if first.shape[1] != 3:
        options["in_chans"] = first.shape[1]
    if positions is not None and positions.dim() == 3 and settings is not None:
        side = isqrt(positions.shape[1]) * first.shape[-1]  # fewer prefix tokens than a row
        if side != settings.input_size[-1]:
            options["img_size"] = side
    return weights, options


def fit(model: nn.Module, weights: Weights, what: str) -> None:
    """Load weights into a model; every one of them must fit.

    Args:
        model: gets the weights.
        weights: by name, perhaps below a prefix such as ``model.`` or ``backbone.``.
        what: file and model, for the error.

    Raises:
        CamkitError: names or shapes differ.
    """
    own = model.state_dict()
    weights = without_prefix(weights, next(iter(own), ""))
    shapes = [
        f"{key} is {_shape(weights[key])}, expected {_shape(own[key])}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    faults = [
        *_some("missing", [key for key in own if key not in weights]),
        *_some("unexpected", [key for key in weights if key not in own]),
        *_some("other shapes:", shapes),
    ]
    if faults:
        raise CamkitError(f"{what}: {'; '.join(faults)}")
    model.load_state_dict(weights)


def without_prefix(weights: Weights, name: str) -> Weights:
    """Return the weights below the one prefix, such as ``model.``, that leads to ``name``."""
    prefixes = [key.removesuffix(name) for key in weights if key.endswith(f".{name}")]
    if len(prefixes) != 1 or name in weights:
        return weights
    (start,) = prefixes
    return {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(what: str, items: list[str], most: int = 3) -> list[str]:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return [f"{what} {', '.join(items[:most])}{more}"] if items else []


def open_transformers(name: str, folder: Path, *, online: bool) -> nn.Module:
    """Open an image classifier of transformers with its trained weights.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the hub.
        folder: where a relative folder starts.
        online: whether the hub may be asked.

    Raises:
        CamkitError: transformers is missing, or has no such image classifier.
    """
    if find_spec("transformers") is None:
        raise CamkitError(
            "hf: models need transformers; install it with `pip install transformers`"
        )
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = (folder / name).is_dir()
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            str(folder / name) if local else name,
            output_loading_info=True,
            local_files_only=local or not online,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CamkitError(
            f"hf:{name} cannot be opened as an image classifier of transformers: "
            f"{first_line(error)}{'' if local else nearby(folder / name)}"
        ) from error
    missing = _some("missing", sorted(report["missing_keys"]))
    if missing:
        raise CamkitError(f"hf:{name} is not a trained image classifier: {missing[0]}")
    return model


def first_line(error: BaseException) -> str:
    """Return the first line of an error, cut to a readable length."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else f"{text[:200]}..."


def grey_image(channels: int, size: tuple[int, int]) -> Tensor:
    """Return a grey image to try a model on."""
    return torch.linspace(-1, 1, size[1]).expand(1, channels, *size)
