"""The small model and the photographs that come with camkit."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camkit.data.names import check_split
from camkit.data.sample import Sample
from camkit.errors import DataError

DEMO_WEIGHTS = Path(__file__).parent / "vit_tiny_9_blocks_distilled.safetensors"

DEMO_CLASSES = ("cat", "person", "cup", "tripod")
"""Classes of the masks, by names that an ImageNet classifier's vocabulary knows."""

_CONTENT = {  # public domain (NASA), or CC0 by their photographers: see THIRD_PARTY.md
    "astronaut.png": ("person",),
    "camera.png": ("person", "tripod"),
    "coffee.png": ("cup",),
    "chelsea.png": ("cat",),
}
_SCALE = ".scale"
_LARGEST = 127.0


def demo_model() -> Any:
    """Make the small model that comes with camkit; nothing is downloaded.

    It is a ViT of width 192, patch 16 and nine blocks with 1000 ImageNet outputs, trained by
    ``benchmarks/train_demo_model.py`` to imitate timm's twelve-block ViT-Ti/16 of "How to train
    your ViT?" (Steiner et al., 2021). It is for trying camkit: its maps come near the teacher's,
    but it often confuses classes (``benchmarks/results/demo_model.json``). Colours are normalised
    with the defaults of `camkit.load_photo`; `imagenet_vocabulary` names the outputs.

    Returns:
        A timm ``VisionTransformer`` in evaluation mode, float32, for images of any size.

    Raises:
        DataError: the file with the weights is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = expand_rows(load_file(DEMO_WEIGHTS))
        model = blank_model()
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise DataError(f"{DEMO_WEIGHTS} cannot be read ({error}); install camkit again") from error
    return model.eval()


def blank_model() -> Any:
    """Make a model like `demo_model`'s, with random weights."""
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=9, dynamic_img_size=True)


def round_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round matrices and kernels to 8 bits with one scale per row, all else to half precision.

    The float32 scales are stored as ``name.scale``.
    """
    packed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not name.endswith("weight") or weight.ndim < 2:
            packed[name] = weight.half()
            continue
        rows = weight.float().flatten(1)
        scale = (rows.abs().amax(dim=1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        steps = (rows / scale[:, None]).round().clamp(-_LARGEST, _LARGEST)
        packed[name] = steps.to(torch.int8).view_as(weight)
        packed[name + _SCALE] = scale
    return packed


def expand_rows(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `round_rows`, except for the rounding; returns a float32 state dict."""
    weights = {}
    for name, values in packed.items():
        if name.endswith(_SCALE):
            continue
        weights[name] = values.float()
        if values.dtype == torch.int8:
            shape = (-1,) + (1,) * (values.ndim - 1)
            weights[name] *= packed[name + _SCALE].view(shape)
    return weights


@dataclass(frozen=True)
class DemoPhotos:
    """Four photographs for trying camkit; far too few to measure with.

    They are the photographs in scikit-image's wheel that may be redistributed and show an object
    that ImageNet has a name for, except for the rocket, which is too thin. Masks are drawn by hand;
    the video camera, blurred fur at the cat's chin and a line along each border are 255, ignore.
    """

    root: Path
    photos: Path
    classes: tuple[str, ...] = DEMO_CLASSES
    splits: tuple[str, ...] = ("all",)

    def split(self, name: str = "all") -> tuple[Sample, ...]:
        """List the photographs, or raise DataError if this version of scikit-image lacks one."""
        check_split(name, self.splits)
        samples = []
        for file, shown in _CONTENT.items():
            photo = self.photos / file
            if not photo.is_file():
                raise DataError(
                    f"{photo} does not exist, though scikit-image 0.24 to 0.26 contain it; "
                    "install one of these versions"
                )
            classes = tuple(sorted(self.classes.index(label) for label in shown))
            samples.append(Sample(photo.stem, photo, self.root / "masks" / file, classes))
        return tuple(samples)

    def entries(self, name: str = "all") -> Iterator[Sample | DataError]:
        yield from self.split(name)


def demo_photos() -> DemoPhotos:
    """Open the photographs that come with camkit; nothing is copied or downloaded.

    Raises:
        DataError: scikit-image, which holds the photographs, is not installed.
    """
    spec = find_spec("skimage")  # importing it would take a second
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the demo photographs are part of scikit-image; install it: pip install scikit-image"
        )
    photos = Path(spec.submodule_search_locations[0]).absolute() / "data"
    return DemoPhotos(Path(__file__).parent, photos)
