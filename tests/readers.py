"""What readers of the docs have before they type a page's lines, made with camkit's public names.

Nothing here imports a sub-package that camkit loads on first use, so a line of a page that relies
on such an import fails as it would for the reader. Pretrained models are small and random.
"""

import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import timm
import torch

import camkit

SIZE = (64, 96)


class Reader:
    """A model with ``outputs`` classes, a photo, and what one gets from them."""

    camkit, torch, np, Path = camkit, torch, np, Path
    score = 0.3

    def __init__(self, outputs):
        self.outputs = outputs

    @cached_property
    def open_clip(self):
        import open_clip

        return open_clip

    @cached_property
    def model(self):
        options = {"num_classes": self.outputs, "dynamic_img_size": True}
        return timm.create_model("vit_tiny_patch16_224", pretrained=True, **options)

    @cached_property
    def photo(self):
        """A bright disc at the left, a dark one at the right."""
        rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
        picture = np.full((*SIZE, 3), 120, np.uint8)
        for centre, colour in ((24, (230, 180, 40)), (70, (30, 40, 90))):
            picture[(rows - 32) ** 2 + (columns - centre) ** 2 < 18**2] = colour
        return camkit.photo_from_array(picture, size=96)

    @property
    def pixels(self):
        return self.photo.pixels

    @property
    def images(self):
        return self.photo.pixels

    @property
    def rgb(self):
        return self.photo.rgb

    @property
    def picture(self):
        return (self.photo.rgb.permute(0, 2, 3, 1) * 255).byte()

    classes = torch.tensor([[0, 2]])
    labels = torch.tensor([[True, False, True]])

    @cached_property
    def seed(self):
        return camkit.GradientSeed()

    @cached_property
    def seen(self):
        with camkit.watch(self.model, gradients=True, rgb=self.rgb) as seen:
            self.model(self.pixels)
        return seen

    @property
    def capture(self):
        return self.seen.capture

    @cached_property
    def cam(self):
        cam = camkit.normalize_cam(self.seed(self.capture, self.classes))
        return camkit.resize_cam(cam, SIZE)

    @property
    def mask(self):
        return camkit.to_mask(self.cam, None, background_score=0.5)

    @property
    def scores(self):
        return torch.rand(1, 3, *SIZE).softmax(1)

    @staticmethod
    def reshape(tokens):
        return tokens[:, 1:].mT.unflatten(-1, (4, 6))

    # Of docs/report.md, whose text says that they are those of a benchmark.

    @property
    def vocabulary(self):
        return camkit.Vocabulary(("circle", "square", "triangle"))

    @property
    def variants(self):
        refine = (camkit.Propagate(balance=3), camkit.refiners.Normalize("minmax"))
        return [camkit.bench.Variant("refined", camkit.Method(self.seed, refine=refine))]

    @property
    def dataset(self):
        return camkit.data.open_dataset("VOC2012")

    @property
    def photos(self):
        return camkit.bench.PhotoSettings(size=96)


OF_A_BENCHMARK = ("vocabulary", "variants", "dataset", "photos")
NAMES = tuple(name for name in vars(Reader) if not name.startswith("_"))


def names_of(outputs, wanted):
    """Return these names of a `Reader`; pretrained models are small and random from now on."""
    torch.manual_seed(0)
    without_downloads()
    reader = Reader(outputs)
    return {name: getattr(reader, name) for name in wanted}


def without_downloads():
    """Let timm and open_clip make small random models where a page asks for pretrained ones."""
    create_model = timm.create_model

    def tiny(name, *, pretrained=False, **options):
        small = {"depth": 3, "embed_dim": 48, "num_heads": 3} if pretrained else {}
        return create_model(name, pretrained=False, **(small | options)).eval()

    timm.create_model = tiny
    if open_clip := sys.modules.get("open_clip"):  # an optional package
        open_clip.create_model_and_transforms = tiny_clip


def tiny_clip(*_, **__):
    vision = {"image_size": SIZE, "patch_size": 16, "width": 32, "layers": 5, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    made = sys.modules["open_clip"].model.CLIP(16, vision, text).eval()
    colours = {"mean": (0.481, 0.458, 0.408), "std": (0.269, 0.261, 0.276)}
    sys.modules["open_clip"].model.set_model_preprocess_cfg(made, {**colours, "size": SIZE})
    return made, None, None
