"""Models for the command line: from timm, transformers, the user's own code, or camkit itself."""

import argparse
import os
import ssl
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import nn

from camkit.capture.scores import known_classes
from camkit.cli.own_models import (
    Weights,
    build_model,
    first_line,
    fit,
    grey_image,
    open_transformers,
    read_checkpoint,
    timm_options,
)
from camkit.data import VOC_CLASSES, demo_model
from camkit.data.text import read_text
from camkit.errors import CamkitError, DataError
from camkit.inputs import photo_settings
from camkit.names import read_vocabulary, vocabulary_of
from camkit.photo import PhotoSettings, photo_from_array
from camkit.printing import several, short_repr
from camkit.seeds.views import ModelCall, ModelRunner, stated_size
from camkit.segmenters import PretrainedSegmenter
from camkit.untrusted import read_json
from camkit.vocabulary import Vocabulary

DEFAULT_MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"

EMBEDDED = "demo"
"""Name of the small model that comes with camkit: a student of the default model."""

MODELS = """Models: NAME or timm:NAME, a model of timm with its weights, or with those of
--checkpoint; hf:NAME, an image classifier of transformers in a folder or on the hub; module:build
or file.py:build, a function of yours that returns a model, or (model, call) where
call(model, images) runs it; demo, the small model that comes with camkit. Size, mean and standard
deviation of photos, and the names of classes, are those that the model states; --size, --mean,
--std and --names set them."""

_TIMEOUT = 3.0  # seconds; timm itself waits almost a minute for a hub that does not answer


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, how it is called, and where the weights come from."""

    model: nn.Module
    source: str
    call: ModelCall | None = None

    __repr__ = short_repr


@dataclass(frozen=True)
class ModelSource:
    """Opens a model, in any process; its repr identifies the model.

    Attributes:
        name: see `MODELS`.
        checkpoint: file of its weights, whose hash identifies them.
        folder: where relative files and the user's modules are.
        wait: for timm's hub, if it is slow.
    """

    name: str
    checkpoint: Path | None = field(default=None, repr=False, compare=False)
    folder: Path = field(default_factory=Path.cwd, repr=False, compare=False)
    wait: bool = field(default=True, repr=False, compare=False)

    @property
    def kind(self) -> Literal["timm", "hf", "code", "demo"]:
        if self.name == EMBEDDED:
            return "demo"
        prefix, colon, _ = self.name.partition(":")
        if prefix == "hf":
            return "hf"
        return "code" if colon and prefix != "timm" else "timm"

    @property
    def bare(self) -> str:
        """The name without the prefix of its library."""
        return self.name.removeprefix("timm:").removeprefix("hf:")

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, opened when it is first needed.

        Raises:
            CamkitError: there is no such model, or its weights cannot be found or do not fit.
        """
        if self.kind in ("hf", "demo") and self.checkpoint is not None:
            raise CamkitError(f"--model {self.name} has weights of its own; omit --checkpoint")
        if self.kind == "demo":
            return LoadedModel(demo_model(), "camkit itself (a small student of the default model)")
        if self.kind == "hf":
            return LoadedModel(self._transformers().eval(), self.bare)
        if self.kind == "code":
            model, call = build_model(self.name, self.folder)
            if self.checkpoint is not None:
                fit(model, read_checkpoint(self.checkpoint), f"{self.checkpoint} does not fit it")
            return LoadedModel(model.eval(), str(self.checkpoint or self.name), call)
        model, source = self._timm()
        return LoadedModel(model.eval(), source)

    def _transformers(self) -> nn.Module:
        local = (self.folder / self.bare).is_dir()
        online = not local and _hub_answers(slow_counts=True)
        return open_transformers(self.bare, self.folder, online=online)

    def _timm(self) -> tuple[nn.Module, str]:
        architecture, path = known_architecture(self.bare), self.checkpoint
        path = _in_data_folder(self.bare) if path is None else path
        if path is None:
            return _from_hub(self.bare, wait=self.wait)
        return _timm_model(self.bare, architecture, path), str(path)

    def __call__(self) -> nn.Module:
        return self.loaded.model

    def call(self, model: nn.Module, pixels: Any) -> Any:
        """Call the model as the user's code says."""
        call = self.loaded.call
        return model(pixels) if call is None else call(model, pixels)

    def __reduce__(self) -> tuple[type, tuple[str, Path | None, Path]]:
        return ModelSource, (self.name, self.checkpoint, self.folder)  # opened again elsewhere


@dataclass(frozen=True)
class OpenedModel:
    """A model with its weights, its class names and how it expects photos.

    Attributes:
        model: in evaluation mode.
        vocabulary: its class names.
        photos: how it expects photos.
        source: where its weights come from.
        opener: opens it again in other processes.
    """

    model: nn.Module
    vocabulary: Vocabulary
    photos: PhotoSettings
    source: str
    opener: ModelSource

    @property
    def embedded(self) -> bool:
        """Whether it is the model that comes with camkit."""
        return self.opener.kind == "demo"

    @property
    def own_code(self) -> bool:
        """Whether the user's code made it."""
        return self.opener.kind == "code"

    @property
    def call(self) -> ModelCall | None:
        """Calls the model, if it takes more than images; can be sent to other processes."""
        return None if self.opener.loaded.call is None else self.opener.call

    __repr__ = short_repr


def add_model_arguments(parser: argparse.ArgumentParser, *, name: bool = True) -> None:
    """Add the options that `open_named` reads, with ``name`` also ``--model``."""
    add = parser.add_argument
    if name:
        add("--model", default=DEFAULT_MODEL, help="see below (default: %(default)s)")
    add("--checkpoint", metavar="FILE", help="weights of the model: .safetensors, .pth")
    add(
        "--names",
        metavar="FILE",
        help="class names of the model, one per line in the order of its outputs, or JSON",
    )
    add(
        "--size",
        default="384",
        help="long side that photos are resized to, in pixels, or ROWSxCOLS (default: %(default)s; "
        "a model with a fixed size keeps it)",
    )
    add("--mean", metavar="NUMBERS", help="of the model's photos, such as 0.485,0.456,0.406")
    add("--std", metavar="NUMBERS", help="the same for the standard deviation")


def open_named(settings: Mapping[str, Any], *, or_embedded: bool = False) -> OpenedModel:
    """Open the model that the options of `add_model_arguments` describe.

    Raises:
        CamkitError: see `open_model`.
        ValueError: an option has another form.
    """
    return open_model(
        settings["model"],
        size=read_size(settings["size"]),
        or_embedded=or_embedded,
        checkpoint=settings["checkpoint"],
        names=None if settings["names"] is None else Path(settings["names"]),
        mean=_numbers("--mean", settings["mean"]),
        std=_numbers("--std", settings["std"]),
    )


def open_model(  # noqa: PLR0913 - each setting is a choice of its own
    name: str,
    *,
    size: int | tuple[int, int] = 384,
    or_embedded: bool = False,
    checkpoint: str | Path | None = None,
    names: Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> OpenedModel:
    """Load a model with trained weights, never with random ones (unless the user's code does).

    The weights of a timm model come from ``checkpoint``, else from
    ``CAMKIT_DATA/weights/NAME[.fp16].safetensors``, else from timm's hub.

    Args:
        name: see `MODELS`.
        size: long side of photos in pixels, for models that take any size; or rows and columns.
        or_embedded: if neither folder nor hub has the default model, use the embedded model, and
            say so on the error stream. Do not publish its figures: it is another model.
        checkpoint: file of weights.
        names: file of class names.
        mean: of photos; None is what the model states.
        std: of photos; None is what the model states.

    Raises:
        CamkitError: the model is not known, its weights cannot be found or do not fit, or it does
            not state how it expects photos.
    """
    default = or_embedded and name == DEFAULT_MODEL and checkpoint is None
    opener = source_of(name, checkpoint, wait=not default)
    if default:
        opener = _default_or_embedded(opener)
    loaded = opener.loaded
    photos = PhotoSettings(size=size)
    if opener.kind != "demo":
        photos = _photos(loaded.model, size, mean, std)
    photo_from_array(np.zeros((2, 2, 3), np.uint8), **photos.arguments())  # refuses wrong settings
    own = opener.kind in ("hf", "code") or checkpoint is not None
    outputs = None if own else known_classes(loaded.model)
    if outputs is None:  # own models are always tried
        photos, outputs = _tried(loaded, photos)
    vocabulary = _vocabulary(loaded.model, outputs, names, own=own)
    return OpenedModel(loaded.model, vocabulary, photos, loaded.source, opener)


def source_of(name: str, checkpoint: str | Path | None, *, wait: bool = True) -> ModelSource:
    """Return the source of a model, and say so if it imports and runs the user's code."""
    source = ModelSource(
        name, None if checkpoint is None else Path(checkpoint).absolute(), wait=wait
    )
    if source.kind == "code":
        print(f"importing {name} from {source.folder}, and running it", file=sys.stderr)
    return source


def segmenter_of(name: str, device: str | None) -> PretrainedSegmenter:
    """Return the opener of a promptable segmenter of transformers.

    Args:
        name: of a folder or on the hub, with or without ``hf:``.
        device: of the segmenter; None uses a GPU if there is one where it is opened.
    """
    source = ModelSource(f"hf:{name.removeprefix('hf:')}")
    local = (source.folder / source.bare).is_dir()
    online = not local and _hub_answers(slow_counts=True)
    return PretrainedSegmenter(source.bare, device, source.folder, online)


def _default_or_embedded(opener: ModelSource) -> ModelSource:
    """Return the default model with its weights if they are at hand, else the embedded model."""
    if _in_data_folder(opener.bare) is not None:
        return opener
    try:
        _ = opener.loaded
    except CamkitError as error:
        short = isinstance(error.__cause__, ConnectionError)
        print("timm's hub does not answer" if short else error, file=sys.stderr)
        print("using the small model that comes with camkit instead", file=sys.stderr)
        return ModelSource(EMBEDDED)
    return opener


def data_folder() -> Path | None:
    """Return the folder in CAMKIT_DATA as an absolute path, or None if it is not a folder."""
    name = os.environ.get("CAMKIT_DATA", "")
    return Path(name).absolute() if name and Path(name).is_dir() else None


def known_architecture(name: str) -> str:
    """Return the architecture in a timm model name, or raise `CamkitError` if timm lacks it."""
    import timm

    architecture = name.partition(".")[0]
    if timm.is_model(architecture):
        return architecture
    if Path(name).suffix == ".py":
        raise CamkitError(f"name what makes the model in {name}, such as --model {name}:build")
    if Path(name).is_file():
        raise CamkitError(f"{name} is a file; use --model NAME --checkpoint {name}")
    if Path(name).is_dir():
        raise CamkitError(f"{name} is a folder; for a model of transformers, use --model hf:{name}")
    close = get_close_matches(architecture, timm.list_models(), n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
    raise CamkitError(f'timm has no model "{architecture}"; {hint}')


def create(name: str, **options: Any) -> Any:
    """Create a timm model, for any image size if its architecture allows."""
    import timm

    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:
        return timm.create_model(name, **options)


def _in_data_folder(name: str) -> Path | None:
    """Return the file of a model's weights in the folder of CAMKIT_DATA, if there is one."""
    folder = data_folder()
    if folder is None:
        return None
    files = [folder / "weights" / f"{name}{end}.safetensors" for end in (".fp16", "")]
    return next((path for path in files if path.is_file()), None)


def _timm_model(name: str, architecture: str, path: Path) -> Any:
    """Create a timm model as a file of weights needs it, and load them."""
    import timm

    # a patch head is a second classifier for training, which timm's ViT lacks
    weights: Weights = {
        k: v for k, v in read_checkpoint(path).items() if not k.startswith("patch_head.")
    }
    # timm does not know the tag of the user's own weights; photos then take the default settings
    registered = name if timm.is_model_pretrained(name) else architecture
    what = f"{path} does not fit {architecture}"
    weights, options = timm_options(weights, timm.models.get_pretrained_cfg(registered))
    try:
        model = create(registered, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise CamkitError(f"{what}: {first_line(error)}") from error
    fit(model, weights, what)
    return model


def _from_hub(name: str, *, wait: bool = True) -> tuple[Any, str]:
    """Load weights from timm's hub or an earlier download; ``wait`` for a hub that is slow."""
    import timm

    place = data_folder() or "CAMKIT_DATA names no folder"
    if not timm.is_model_pretrained(name):
        listed = timm.list_pretrained(f"{name.partition('.')[0]}*")
        known = get_close_matches(name, listed, n=3) or listed[:3]
        raise CamkitError(
            f'no weights are called "{name}": neither in CAMKIT_DATA/weights/ ({place}) nor in '
            "timm's list" + (f"; did you mean {' or '.join(known)}?" if known else "")
        )
    print(f"{name} is not in CAMKIT_DATA/weights/; asking timm's hub for it", file=sys.stderr)
    try:
        if _hub_answers(slow_counts=wait):
            return create(name, pretrained=True), "timm hub"
        if path := _downloaded(name):
            # the listed file would be numpy's, and timm 1.0.9 would read this one as such
            overlay = {"file": path, "custom_load": False}
            return create(name, pretrained=True, pretrained_cfg_overlay=overlay), path
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
    except HTTPError as answer:  # also one
        answer.close()
        return True
    except (OSError, ValueError) as error:  # no network, no such host; not an address
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):  # its certificate may be known to timm
            return True
        return isinstance(reason, TimeoutError) and slow_counts


def _photos(
    model: nn.Module,
    size: int | tuple[int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> PhotoSettings:
    """Return how the model expects photos: as it states, or as the options say."""
    side = size if isinstance(size, int) else max(size)
    given: dict[str, Any] = {"mean": mean, "std": std}
    if mean is None or std is None:
        try:
            stated = photo_settings(model, size=side)
        except CamkitError as error:
            raise CamkitError(
                f"{str(error).partition('; give')[0]}; give --mean and --std: those of ImageNet "
                "are --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
            ) from error
        given = {"mean": mean or stated.mean, "std": std or stated.std}
    photos = photo_settings(model, given, size=side)
    return photos if isinstance(size, int) else replace(photos, size=size)


def _tried(loaded: LoadedModel, photos: PhotoSettings) -> tuple[PhotoSettings, int | None]:
    """Run the model on a grey image; if only the size that it states works, photos get this size.

    Returns:
        Settings of photos, and the number of the model's class scores, if it has any.

    Raises:
        CamkitError: it cannot be run, or camkit cannot read its attention.
    """
    step, size, stated = photos.multiple, photos.size, stated_size(loaded.model)
    sides = (size, size) if isinstance(size, int) else size
    rows, cols = (max(1, round(side / step)) * step for side in sides)
    image = grey_image(photos.channels, (rows, cols))
    try:
        with explained(image.shape), torch.no_grad():
            return photos, ModelRunner(loaded.model, call=loaded.call)(image).class_count
    except CamkitError:
        if stated in (None, (rows, cols)) or isinstance(size, tuple):
            raise
    return _tried(loaded, replace(photos, size=stated))


@contextmanager
def explained(shape: Sequence[int]) -> Iterator[None]:
    """Turn what a model raises on images of a shape into a `CamkitError`."""
    try:
        yield
    except CamkitError:
        raise
    except Exception as error:  # the user's code may raise anything
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        raise CamkitError(
            f"the model cannot be run on images of shape {tuple(shape)} ({type(error).__name__}: "
            f"{first_line(error)}){notes}; --size ROWSxCOLS sets the size"
        ) from error


def _vocabulary(
    model: nn.Module, outputs: int | None, names: Path | None, *, own: bool
) -> Vocabulary:
    """Name the outputs of a classifier: as the file says, as the model does, or by numbers."""
    as_stated = outputs is None or known_classes(model) in (None, outputs)
    if names is not None:
        return _named(model if as_stated else None, outputs, names)
    stated = vocabulary_of(model) if as_stated else None
    if stated is not None:
        return stated
    if outputs is None:
        raise CamkitError(
            "this model has no classifier, so it cannot tell classes apart; if it has one that "
            "camkit does not find, name its classes by --names"
        )
    if outputs == len(VOC_CLASSES) and not own:
        return Vocabulary(VOC_CLASSES)
    return _one_each(tuple(f"output {index}" for index in range(outputs)))


def _one_each(names: tuple[str, ...]) -> Vocabulary:
    """Name output after output, whatever number of classes the model states."""
    return Vocabulary(names, tuple((index,) for index in range(len(names))))


def _named(model: nn.Module | None, outputs: int | None, path: Path) -> Vocabulary:
    """Read class names from a file, for a model, or for one that states wrong classes (None)."""
    text = read_text(path)
    value: Any = text.rstrip().splitlines()
    if path.suffix.lower() == ".json":
        value = read_json(text, path)
        if isinstance(value, dict) and all(key.isdigit() for key in value):
            value = {int(key): name for key, name in value.items()}  # as id2label of transformers
    if not value:
        raise DataError(f"{path} is empty; expected one class name per line")
    try:
        vocabulary = Vocabulary.of(value) if model is None else read_vocabulary(value, model)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
    if outputs is not None and vocabulary.members is None and len(vocabulary) != outputs:
        raise DataError(
            f"{path} has {several(len(vocabulary), 'name')}, but the model has "
            f"{several(outputs, 'output')}"
        )
    return vocabulary if vocabulary.members is not None else _one_each(vocabulary.names)


def read_size(text: str) -> int | tuple[int, int]:
    """Read ``384`` or ``224x224``."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise ValueError(
            f"--size must be pixels or ROWSxCOLS, such as 384 or 224x224, got {text!r}"
        )
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read ``0.5`` or ``0.485,0.456,0.406``."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"{option} must be one number, or one per channel with commas, such as "
            f"0.485,0.456,0.406, got {text!r}"
        ) from error
