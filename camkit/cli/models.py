"""Where the command line gets a model: a local folder, timm's hub, or what comes with camkit."""

import argparse
import os
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from torch import nn

from camkit.bench.protocol import PhotoSettings
from camkit.capture.host import find_patch_embeddings
from camkit.data import VOC_CLASSES, demo_model, imagenet_vocabulary
from camkit.errors import CamkitError
from camkit.vocabulary import Vocabulary

DEFAULT_MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"

EMBEDDED = "demo"
"""Names the small model that comes with camkit; it is not the default model, but its student."""

_PATIENCE = 3.0  # seconds; timm itself asks a hub that does not answer for almost a minute


@dataclass(frozen=True)
class OpenedModel:
    """A model with its weights, and how to speak to it."""

    model: nn.Module
    vocabulary: Vocabulary
    photos: PhotoSettings
    source: str
    embedded: bool = False


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every command with a model shares."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="timm model name with its weights tag, or demo, the small model that comes with "
        "camkit (default: %(default)s)",
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


def open_model(name: str, *, size: int = 384, or_embedded: bool = False) -> OpenedModel:
    """Load a timm model with trained weights; never random ones.

    Looks for ``CAMKIT_DATA/weights/NAME[.fp16].safetensors``, then asks timm's hub. The name
    "demo" is the model that comes with camkit, and nobody is asked.

    Args:
        name: timm's name with the weights tag, or "demo".
        size: long side of photos in pixels, where the model takes any size.
        or_embedded: where neither folder nor hub has the default model, take the one that comes
            with camkit, and say so. Not for figures: it is another model.

    Raises:
        CamkitError: the model is unknown to timm, or its weights are neither here nor to be had.
    """
    import timm

    if name == EMBEDDED:
        return _embedded(size)
    architecture = known_architecture(name)
    found = _local(name, architecture)
    if found is None and or_embedded and name == DEFAULT_MODEL:
        found = _from_hub_soon(name)
        if found is None:
            print("taking the small model that comes with camkit instead", file=sys.stderr)
            return _embedded(size)
    model, source = found or _from_hub(name)
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
    folder = data_folder()
    names = (f"{name}.fp16.safetensors", f"{name}.safetensors")
    found = [folder / "weights" / n for n in names if folder and (folder / "weights" / n).is_file()]
    return _from_file(found[0], architecture) if found else None


def _from_file(path: Path, architecture: str) -> tuple[Any, str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # a patch head is a second classifier for training; the ViT itself has no place for it
    try:
        weights = {
            key: value.float()
            for key, value in load_file(path).items()
            if not key.startswith("patch_head.")
        }
        outputs = len(weights["head.weight"]) if "head.weight" in weights else 0
        model = create(architecture, pretrained=False, num_classes=outputs)
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:  # a broken file; shapes or names that differ
        raise CamkitError(f"{path} does not fit {architecture}: {error}") from error
    return model, str(path)


def _from_hub(name: str, *, patient: bool = True) -> tuple[Any, str]:
    """Weights from timm's hub, or from an earlier download.

    Args:
        name: timm's, with the weights tag.
        patient: let timm ask a hub that is slow to answer.
    """
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
        if _hub_is_there(surely=not patient):
            return create(name, pretrained=True), "timm hub"
        if path := _downloaded(name):
            return create(name, pretrained=True, pretrained_cfg_overlay={"file": path}), path
        raise ConnectionError("no answer, and nothing kept of an earlier download")
    except (OSError, RuntimeError, ValueError) as error:
        raise CamkitError(
            f"no weights for {name}: neither in CAMKIT_DATA/weights/ "
            f"({data_folder() or 'CAMKIT_DATA names no folder'}) nor from timm's hub "
            f"({type(error).__name__}); set CAMKIT_DATA to a folder that has "
            f"weights/{name}.safetensors, or connect to the hub; --model {EMBEDDED} needs neither"
        ) from error


def _from_hub_soon(name: str) -> tuple[Any, str] | None:
    """What the hub has, or nothing."""
    try:
        return _from_hub(name, patient=False)
    except CamkitError as error:
        short = isinstance(error.__cause__, ConnectionError)
        print("timm's hub does not answer" if short else error, file=sys.stderr)
        return None


def _downloaded(name: str) -> str | None:
    """The file that an earlier download of timm's left."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    settings = timm.models.get_pretrained_cfg(name)
    place = (settings and settings.hf_hub_id) or "timm/"
    place += name if place.endswith("/") else ""
    files = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
    found = (try_to_load_from_cache(place, file) for file in files)
    return next((path for path in found if isinstance(path, str)), None)


def _hub_is_there(*, surely: bool) -> bool:
    """Whether the hub answers; unless it must be sure, one that is slow to answer counts too."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE):
            return True
    except HTTPError:  # an answer, if only to say no
        return True
    except (OSError, ValueError) as error:  # no network, no such host; not an address
        reason = getattr(error, "reason", error)
        answered = isinstance(reason, ssl.SSLError)  # with a certificate that timm may know
        return answered or (isinstance(reason, TimeoutError) and not surely)


def _embedded(size: int) -> OpenedModel:
    source = "camkit itself (a small student of the default model)"
    return OpenedModel(
        demo_model(), imagenet_vocabulary(), PhotoSettings(size=size), source, embedded=True
    )


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
        return imagenet_vocabulary()
    if outputs == len(VOC_CLASSES):
        return Vocabulary(VOC_CLASSES)
    if outputs == 0:
        raise CamkitError("this model has no classifier, so it cannot tell classes apart")
    return Vocabulary(tuple(f"output {index}" for index in range(outputs)))
