"""Patches of any size and form, and images of any number of channels: the grid is measured."""

import numpy as np
import pytest
import timm
import torch
from helpers import capture_of
from hosts import HandMade, shaken
from torch import nn

import camkit
from camkit import UnsupportedModelError, photo_from_array
from camkit.capture.anatomy import grid_of_aspect
from camkit.capture.host import find_patch_embeddings
from camkit.edits.protocol import Picture
from camkit.grid import Grid
from camkit.ops.images import to_rgb
from camkit.photo import Photo
from camkit.refiners import GuidedFilter, PixelAdaptive
from camkit.seeds import ClassAttentionSeed, ModelRunner, Views

ASKED = torch.zeros(1, 1, dtype=torch.int64)


class Cuts(HandMade):
    """Makes patches by any module, which returns (b, d, h, w) or (b, n, d)."""

    def __init__(self, embed):
        super().__init__()
        self.patch_embed = embed

    def tokens(self, pixels):
        patches = self.patch_embed(pixels)
        patches = patches.flatten(2).mT if patches.dim() == 4 else patches
        x = self.sequence(patches)
        for block in self.blocks:
            x = x + block(block.norm(x))
        return self.norm(x)


class Unfolded(nn.Module):
    """Patches without a convolution; perhaps each with a norm of its own pixels, as lucidrains'."""

    def __init__(self, patch, *, norm=False):
        super().__init__()
        size = 3 * patch[0] * patch[1]
        self.cut = nn.Unfold(patch, stride=patch)
        self.norm = nn.LayerNorm(size) if norm else nn.Identity()
        self.project = nn.Linear(size, 24)

    def forward(self, pixels):
        return self.project(self.norm(self.cut(pixels).mT))


def stem(*, norm):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), norm(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.GELU()),
        *(nn.Conv2d(16, 24, 3, 2, 1),),
    )


def pooled():
    """As compact transformers cut images: no convolution steps over pixels."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(8, 24, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    )


STEMS = {
    "4x16": (lambda: nn.Conv2d(3, 24, (4, 16), (4, 16)), (32, 64), (8, 4)),
    "2x2": (lambda: nn.Conv2d(3, 24, 2, 2), (12, 8), (6, 4)),
    "overlapping": (lambda: nn.Conv2d(3, 24, 16, 12), (100, 64), (8, 5)),
    "stem": (lambda: stem(norm=nn.BatchNorm2d), (64, 96), (8, 12)),
    "stem that sees all": (lambda: stem(norm=lambda d: nn.GroupNorm(1, d)), (64, 96), (8, 12)),
    "pooled": (pooled, (32, 48), (8, 12)),
    "8x16 unfolded": (lambda: Unfolded((8, 16)), (64, 64), (8, 4)),
    "8x16 with a norm": (lambda: Unfolded((8, 16), norm=True), (64, 96), (8, 6)),
    "one row": (lambda: Unfolded((16, 4)), (16, 64), (1, 16)),
}


def host(name):
    build, size, grid = STEMS[name]
    torch.manual_seed(0)
    return shaken(Cuts(build())), torch.randn(2, 3, *size), Grid(*grid)


@pytest.mark.parametrize("name", STEMS)
def test_the_grid_is_that_of_the_stem(name):
    model, pixels, grid = host(name)
    assert capture_of(model, pixels).grid == grid


@pytest.mark.parametrize("name", STEMS)
def test_the_token_that_a_pixel_moves_lies_where_the_pixel_is(name):
    """The slow way: change a few pixels at a place, and see which patch moves most."""
    model, pixels, grid = host(name)
    found = capture_of(model, pixels).grid
    height, width = pixels.shape[-2:]
    with torch.no_grad():
        plain = patches_of(model, pixels)
        for row, col in [(0, 0), (grid.rows - 1, 0), (0, grid.cols - 1), (grid.rows // 2, 1)]:
            y = (2 * row + 1) * height // (2 * grid.rows)
            x = (2 * col + 1) * width // (2 * grid.cols)
            changed = pixels.clone()
            changed[..., max(y - 1, 0) : y + 1, max(x - 1, 0) : x + 1] += 3.0
            moved = (patches_of(model, changed) - plain).norm(dim=-1)[0]
            most = divmod(int(moved.argmax()), found.cols)
            # a stem's kernels overlap, so that a neighbour may move more
            reach = int("stem" in name or name == "pooled")
            assert max(abs(most[0] - row), abs(most[1] - col)) <= reach


def patches_of(model, pixels):
    patches = model.patch_embed(pixels)
    return patches.flatten(2).mT if patches.dim() == 4 else patches


class Dropped(nn.Module):
    """Keeps some patches only, as masked autoencoders do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 8, 8)

    def forward(self, pixels):
        return self.conv(pixels).flatten(2).mT[:, [0, 1, 3, 5, 7, 8, 9, 12]]


class Mixed(nn.Module):
    """Every place gets something of every other, as in the first stages of a pyramid (MiT)."""

    def forward(self, maps):
        flat = maps.flatten(2)
        shares = torch.rand(2 * flat.shape[-1:], generator=torch.Generator().manual_seed(0))
        return (flat @ shares.softmax(0)).view_as(maps) + 0.01 * maps


def test_the_last_convolution_of_a_pyramid_shows_the_grid():
    """Its stages mix places, so that no change of pixels tells where a patch lies."""
    torch.manual_seed(0)
    stages = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Mixed(), nn.Conv2d(8, 24, 2, 2))
    model = shaken(Cuts(stages))
    assert list(find_patch_embeddings(model)) == ["patch_embed.0"]
    assert capture_of(model, torch.randn(2, 3, 32, 48)).grid == Grid(4, 6)


def test_patches_that_lie_on_no_grid_are_refused():
    with pytest.raises(camkit.CaptureError, match="leave 8, but the patch grid is 4x4"):
        capture_of(shaken(Cuts(Dropped())), torch.randn(2, 3, 32, 32))


class ReducedToEight(Unfolded):
    """Keeps the same patches, and no convolution shows the grid they come from."""

    def forward(self, pixels):
        return super().forward(pixels)[:, [0, 1, 3, 5, 7, 8, 9, 12]]


def test_patches_without_a_grid_ask_for_its_name():
    with pytest.raises(UnsupportedModelError, match=r"name it with `grid=\(rows, cols\)`"):
        capture_of(shaken(Cuts(ReducedToEight((8, 8)))), torch.randn(2, 3, 32, 32))


def test_a_resnet_stem_is_measured():
    options = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 5}
    model = shaken(timm.create_model("vit_tiny_r_s16_p8_224", img_size=(64, 96), **options))
    assert list(find_patch_embeddings(model)) == ["patch_embed.backbone.conv"]
    assert capture_of(model, torch.randn(2, 3, 64, 96)).grid == Grid(2, 3)


def test_measuring_leaves_the_model_and_the_random_numbers_alone():
    model, pixels, _ = host("8x16 unfolded")
    ran = []
    handle = model.head.register_forward_hook(lambda *_: ran.append(1))
    state = torch.get_rng_state()
    capture_of(model, pixels)
    capture_of(model, pixels)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert ran == [1, 1]


def test_scales_are_rounded_to_patches_of_their_own_height_and_width():
    model, pixels, _ = host("4x16")
    sizes = []
    model.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-2:]))
    pipeline = camkit.wrap(
        model, seed=ClassAttentionSeed(), views=Views(scales=(1.0, 0.4, 1.6), tiles=2)
    )
    pipeline.stages(pixels, rgb=pixels.sigmoid(), classes=ASKED.expand(2, 1))
    assert {(32, 64), (12, 32), (52, 96), (16, 32)} <= set(map(tuple, sizes))
    with pytest.raises(ValueError, match=r"patches of 4x16; use .*multiple=16"):
        pipeline.stages(pixels[..., :40], rgb=pixels[..., :40].sigmoid(), classes=[[0], [0]])


def test_views_of_patches_that_do_not_divide_the_image_are_refused():
    model, pixels, _ = host("overlapping")
    pipeline = camkit.wrap(model, seed=ClassAttentionSeed(), views=Views(scales=(1.0, 0.5)))
    with pytest.raises(UnsupportedModelError, match=r"8x5 patches do not divide .* 100x64"):
        pipeline.stages(pixels, rgb=pixels.sigmoid(), classes=[[0], [0]])


def vit(channels):
    options = {"embed_dim": 48, "num_heads": 3, "depth": 6, "num_classes": 5, "img_size": 48}
    return shaken(timm.create_model("vit_tiny_patch16_224", in_chans=channels, **options))


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


REFINE = (camkit.Propagate(), PixelAdaptive(), GuidedFilter())


def test_a_model_of_grey_images_takes_grey_photos(picture):
    """The same model with its kernel divided among three equal channels gives the same maps."""
    grey, colour = vit(1), vit(3)
    state = dict(grey.state_dict())
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].expand(-1, 3, -1, -1) / 3
    colour.load_state_dict(state)
    photo = photo_from_array(picture, size=(48, 48), channels=1)
    assert (photo.pixels.shape, photo.rgb.shape) == ((1, 1, 48, 48), (1, 3, 48, 48))
    repeated = Photo(photo.pixels.expand(-1, 3, -1, -1), photo.rgb, photo.size)
    found = camkit.wrap(grey, refine=REFINE, views=Views(flip=True))(photo, classes=[1])
    asked = camkit.wrap(colour, refine=REFINE, views=Views(flip=True))(repeated, classes=[1])
    assert found.settings["seed"] == asked.settings["seed"]
    torch.testing.assert_close(found.cam, asked.cam, rtol=1e-3, atol=1e-3)


def test_a_grey_photo_holds_the_luma_of_the_colours(picture):
    photo = photo_from_array(picture, size=(40, 60), multiple=1, mean=0.0, std=1.0, channels=1)
    red, green, blue = torch.from_numpy(picture).permute(2, 0, 1).double()
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    assert (photo.pixels[0, 0].double() * 255 - luma).abs().max() <= 0.51


def test_a_model_of_four_channels_takes_a_photo_of_ones_own(picture):
    colours = photo_from_array(picture, size=(48, 48))
    infrared = torch.randn(1, 1, 48, 48)
    photo = Photo(torch.cat([colours.pixels, infrared], 1), colours.rgb, colours.size)
    result = camkit.wrap(vit(4), refine=REFINE, views=Views(flip=True))(photo, classes=[1])
    assert result.mask.shape == (40, 60)
    assert result.cam.any()


@pytest.mark.parametrize(
    ("channels", "hint"),
    [(1, "use camkit.load_photo(path, channels=1)"), (4, "use a camkit.Photo of your own")],
)
def test_a_photo_of_other_channels_says_how_to_make_one(channels, hint, picture):
    photo = photo_from_array(picture, size=(48, 48))
    with pytest.raises(RuntimeError, match="channels") as caught:
        camkit.wrap(vit(channels), seed=ClassAttentionSeed())(photo, classes=[1])
    assert hint in caught.value.__notes__[0]
    assert f"takes images of {channels} channels, got 3" in caught.value.__notes__[0]


@pytest.mark.parametrize("channels", [1, 4])
def test_rgb_of_other_channels_is_refused_by_its_name(channels, no_shape_checks):
    model, pixels = vit(channels), torch.rand(1, channels, 48, 48)
    words = rf"`rgb` must hold .*\(images, 3, rows, cols\), got .*\(1, {channels}, 48, 48\)"
    with pytest.raises(ValueError, match=words), camkit.watch(model, rgb=pixels):
        model(pixels)
    with pytest.raises(ValueError, match=words):
        camkit.wrap(model).stages(pixels, rgb=pixels, classes=[1])
    with pytest.raises(ValueError, match=words):
        Picture(pixels, rgb=pixels).colours(9)


def test_colours_are_read_of_grey_pixels_and_asked_for_of_four_channels():
    grey = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(to_rgb(grey * 2 - 1), grey.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match=r"images of 4 channels tell no colours; .*`rgb=`"):
        to_rgb(torch.rand(1, 4, 8, 8))


def test_the_step_of_one_convolution_is_no_grid_of_another_number_of_patches():
    """A stem's first convolution returns a 24x24 map for the 3x3 patches of the model."""
    picture = Picture(torch.rand(1, 3, 48, 48), grid=Grid(24, 24))
    assert picture.colours(9).shape == (1, 9, 3)
    assert grid_of_aspect((48, 48), 9) == Grid(3, 3)


def test_a_view_runs_at_one_channel():
    runner = ModelRunner(vit(1))
    assert runner(torch.rand(1, 1, 48, 48)).grid == Grid(3, 3)
