"""Where the command line gets a model: a local folder of weights first, then timm's hub."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from camkit.bench.protocol import PhotoSettings
from camkit.capture.search import find_patch_embeddings
from camkit.data import VOC_CLASSES, VOC_IN_IMAGENET
from camkit.errors import CamkitError
from camkit.vocabulary import Vocabulary

DEFAULT_MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@dataclass(frozen=True)
class OpenedModel:
    """A model with its weights, and how to speak to it."""

    model: nn.Module
    vocabulary: Vocabulary
    photos: PhotoSettings
    source: str


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command with a model shares."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="timm model name with its weights tag (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=384,
        help="long side that photos are resized to, in pixels (default: %(default)s)",
    )


def data_folder() -> Path | None:
    """The folder that CAMKIT_DATA names, with weights/ and data sets in it."""
    named = os.environ.get("CAMKIT_DATA", "")
    return Path(named) if named and Path(named).is_dir() else None


def open_model(name: str, *, size: int = 384) -> OpenedModel:
    """Load a timm model with trained weights; never random ones.

    Looks for ``CAMKIT_DATA/weights/NAME[.fp16].safetensors``, then asks timm's hub.

    Raises:
        CamkitError: the model is unknown to timm, or its weights are neither here nor to be had.
    """
    import timm

    architecture = known_architecture(name)
    model, source = _local(name, architecture) or _from_hub(name)
    # weights of one's own bear a tag that timm does not know; photos are read as by default then
    registered = name if timm.is_model_pretrained(name) else architecture
    settings = timm.models.get_pretrained_cfg(registered)
    mean = tuple(settings.mean) if settings else (0.5, 0.5, 0.5)
    std = tuple(settings.std) if settings else (0.5, 0.5, 0.5)
    embedding = next(iter(find_patch_embeddings(model).values()), None)
    photos = PhotoSettings(
        size=size if getattr(model, "dynamic_img_size", False) else _fixed_size(settings),
        mean=mean,
        std=std,
        multiple=16 if embedding is None else embedding.stride[0],
    )
    return OpenedModel(model.eval(), _vocabulary(model.num_classes), photos, source)


def known_architecture(name: str) -> str:
    """The architecture in a timm model name.

    Raises:
        CamkitError: timm knows none of that name.
    """
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = timm.list_models(f"*{architecture.split('_')[0]}*")[:3]
        hint = f", such as {', '.join(close)}" if close else ""
        raise CamkitError(f'timm has no model "{architecture}"; see timm.list_models(){hint}')
    return architecture


def _local(name: str, architecture: str) -> tuple[Any, str] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = data_folder()
    names = (f"{name}.fp16.safetensors", f"{name}.safetensors")
    found = [folder / "weights" / n for n in names if folder and (folder / "weights" / n).is_file()]
    if not found:
        return None
    # a patch head is a second classifier for training; the ViT itself has no place for it
    try:
        weights = {
            key: value.float()
            for key, value in load_file(found[0]).items()
            if not key.startswith("patch_head.")
        }
        outputs = len(weights["head.weight"]) if "head.weight" in weights else 0
        model = create(architecture, pretrained=False, num_classes=outputs)
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:  # a broken file; shapes or names that differ
        raise CamkitError(f"{found[0]} does not fit {architecture}: {error}") from error
    return model, str(found[0])


def _from_hub(name: str) -> tuple[Any, str]:
    import timm

    if not timm.is_model_pretrained(name):
        known = timm.list_pretrained(f"{name.partition('.')[0]}*")[:3]
        raise CamkitError(
            f'no weights are called "{name}": neither in CAMKIT_DATA/weights/ '
            f"({data_folder() or 'CAMKIT_DATA names no folder'}) nor in timm's list"
            + (f"; did you mean {' or '.join(known)}?" if known else "")
        )
    print(f"{name} is not in CAMKIT_DATA/weights/; asking timm's hub for it", file=sys.stderr)
    try:
        model = create(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CamkitError(
            f"no weights for {name}: neither in CAMKIT_DATA/weights/ "
            f"({data_folder() or 'CAMKIT_DATA names no folder'}) nor from timm's hub "
            f"({type(error).__name__}); set CAMKIT_DATA to a folder that has "
            f"weights/{name}.safetensors, or connect to the hub"
        ) from error
    return model, "timm hub"


def create(name: str, **options: Any) -> Any:
    """A timm model that takes any image size, where its architecture can."""
    import timm

    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:
        return timm.create_model(name, **options)


def _fixed_size(settings: Any) -> tuple[int, int]:
    rows, cols = settings.input_size[1:] if settings else (224, 224)
    return rows, cols


def _vocabulary(outputs: int) -> Vocabulary:
    """Names for a classifier: ImageNet's with the VOC groups behind them, VOC's, or numbers."""
    if outputs == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        names = tuple(ImageNetInfo("imagenet-1k").label_descriptions())
        single = tuple((index,) for index in range(1000))
        return Vocabulary((*names, *VOC_IN_IMAGENET), (*single, *VOC_IN_IMAGENET.values()))
    if outputs == len(VOC_CLASSES):
        return Vocabulary(VOC_CLASSES)
    if outputs == 0:
        raise CamkitError("this model has no classifier, so it cannot tell classes apart")
    return Vocabulary(tuple(f"output {index}" for index in range(outputs)))
