"""Models for the command line: from a local folder, timm's hub, or camkit itself."""

import argparse
import os
import ssl
import sys
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from torch import nn

from camkit.capture.host import patch_step
from camkit.data import VOC_CLASSES, demo_model, imagenet_vocabulary
from camkit.errors import CamkitError
from camkit.photo import PhotoSettings
from camkit.printing import short_repr
from camkit.vocabulary import Vocabulary

DEFAULT_MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"

EMBEDDED = "demo"
"""Name of the small model that comes with camkit: a student of the default model."""

_TIMEOUT = 3.0  # seconds; timm itself waits almost a minute for a hub that does not answer


@dataclass(frozen=True)
class OpenedModel:
    """A model with its weights, its class names and how it expects photos."""

    model: nn.Module
    vocabulary: Vocabulary
    photos: PhotoSettings
    source: str
    embedded: bool = False

    __repr__ = short_repr


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all commands with a model share."""
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
    """Return the folder in CAMKIT_DATA as an absolute path, or None if it is not a folder."""
    name = os.environ.get("CAMKIT_DATA", "")
    return Path(name).absolute() if name and Path(name).is_dir() else None


def open_model(name: str, *, size: int = 384, or_embedded: bool = False) -> OpenedModel:
    """Load a timm model with trained weights, never with random ones.

    The weights come from ``CAMKIT_DATA/weights/NAME[.fp16].safetensors``, else from timm's hub.

    Args:
        name: timm's name with the weights tag, or "demo", the model that comes with camkit.
        size: long side of photos in pixels, for models that take any size.
        or_embedded: if neither folder nor hub has the default model, use the embedded model, and
            say so on the error stream. Do not publish its figures: it is another model.

    Raises:
        CamkitError: timm does not know the model, or its weights cannot be found.
    """
    import timm

    if name == EMBEDDED:
        return _embedded(size)
    architecture = known_architecture(name)
    loaded = _from_folder(name, architecture)
    if loaded is None and or_embedded and name == DEFAULT_MODEL:
        try:
            loaded = _from_hub(name, wait=False)
        except CamkitError as error:
            short = isinstance(error.__cause__, ConnectionError)
            print("timm's hub does not answer" if short else error, file=sys.stderr)
            print("using the small model that comes with camkit instead", file=sys.stderr)
            return _embedded(size)
    model, source = loaded or _from_hub(name)
    # timm does not know the tag of the user's own weights; photos then take the default settings
    registered = name if timm.is_model_pretrained(name) else architecture
    settings = timm.models.get_pretrained_cfg(registered)
    rows, cols = settings.input_size[1:] if settings else (224, 224)
    patch = patch_step(model)
    photos = PhotoSettings(
        size=size if getattr(model, "dynamic_img_size", False) else (rows, cols),
        mean=tuple(settings.mean) if settings else (0.5, 0.5, 0.5),
        std=tuple(settings.std) if settings else (0.5, 0.5, 0.5),
        multiple=16 if patch is None else lcm(*patch),
    )
    return OpenedModel(model.eval(), _vocabulary(model.num_classes), photos, source)


def known_architecture(name: str) -> str:
    """Return the architecture in a timm model name, or raise `CamkitError` if timm lacks it."""
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = timm.list_models(f"*{architecture.split('_')[0]}*")[:3]
        hint = f", such as {', '.join(close)}" if close else ""
        raise CamkitError(f'timm has no model "{architecture}"; see timm.list_models(){hint}')
    return architecture


def create(name: str, **options: Any) -> Any:
    """Create a timm model, for any image size if its architecture allows."""
    import timm

    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:
        return timm.create_model(name, **options)


def _from_folder(name: str, architecture: str) -> tuple[Any, str] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = data_folder()
    if folder is None:
        return None
    files = [folder / "weights" / f"{name}{end}.safetensors" for end in (".fp16", "")]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return None
    try:
        # a patch head is a second classifier for training, which timm's ViT lacks
        state = load_file(path).items()
        weights = {k: value.float() for k, value in state if not k.startswith("patch_head.")}
        outputs = len(weights["head.weight"]) if "head.weight" in weights else 0
        model = create(architecture, pretrained=False, num_classes=outputs)
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:  # a broken file; other shapes or names
        raise CamkitError(f"{path} does not fit {architecture}: {error}") from error
    return model, str(path)


def _from_hub(name: str, *, wait: bool = True) -> tuple[Any, str]:
    """Load weights from timm's hub or an earlier download; ``wait`` for a hub that is slow."""
    import timm

    place = data_folder() or "CAMKIT_DATA names no folder"
    if not timm.is_model_pretrained(name):
        known = timm.list_pretrained(f"{name.partition('.')[0]}*")[:3]
        raise CamkitError(
            f'no weights are called "{name}": neither in CAMKIT_DATA/weights/ ({place}) nor in '
            "timm's list" + (f"; did you mean {' or '.join(known)}?" if known else "")
        )
    print(f"{name} is not in CAMKIT_DATA/weights/; asking timm's hub for it", file=sys.stderr)
    try:
        if _hub_answers(slow_counts=wait):
            return create(name, pretrained=True), "timm hub"
        if path := _downloaded(name):
            return create(name, pretrained=True, pretrained_cfg_overlay={"file": path}), path
        raise ConnectionError("no answer, and no earlier download")
    except (OSError, RuntimeError, ValueError) as error:
        raise CamkitError(
            f"no weights for {name}: neither in CAMKIT_DATA/weights/ ({place}) nor from timm's hub "
            f"({type(error).__name__}); set CAMKIT_DATA to a folder that has "
            f"weights/{name}.safetensors, or connect to the hub; --model {EMBEDDED} needs neither"
        ) from error


def _downloaded(name: str) -> str | None:
    """Return the file of an earlier download by timm, if there is one."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    settings = timm.models.get_pretrained_cfg(name)
    repository = (settings and settings.hf_hub_id) or "timm/"
    repository += name if repository.endswith("/") else ""
    files = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
    cached = (try_to_load_from_cache(repository, file) for file in files)
    return next((path for path in cached if isinstance(path, str)), None)


def _hub_answers(*, slow_counts: bool) -> bool:
    """Test whether the hub answers; with ``slow_counts``, a timeout counts as an answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_TIMEOUT):
            return True
    except HTTPError:  # also an answer
        return True
    except (OSError, ValueError) as error:  # no network, no such host; not an address
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # its certificate may be known to timm
            return True
        return isinstance(reason, TimeoutError) and slow_counts


def _embedded(size: int) -> OpenedModel:
    source = "camkit itself (a small student of the default model)"
    photos = PhotoSettings(size=size)
    return OpenedModel(demo_model(), imagenet_vocabulary(), photos, source, embedded=True)


def _vocabulary(outputs: int) -> Vocabulary:
    """Name the outputs of a classifier: ImageNet's with the VOC groups, VOC's, or numbers."""
    if outputs == 1000:
        return imagenet_vocabulary()
    if outputs == len(VOC_CLASSES):
        return Vocabulary(VOC_CLASSES)
    if outputs == 0:
        raise CamkitError("this model has no classifier, so it cannot tell classes apart")
    return Vocabulary(tuple(f"output {index}" for index in range(outputs)))
