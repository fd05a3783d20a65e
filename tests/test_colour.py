"""Pixels brought back to colours, and the colours an edit is told."""

import pytest
import skimage.data
import torch
from hosts import HandMade
from PIL import Image

from camkit import attach, load_photo
from camkit.edits.protocol import Picture
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.ops.images import NORMALISATIONS, detect_normalisation, to_rgb

EMPTY = torch.zeros(0, 3, 16, 24)


@pytest.fixture(params=NORMALISATIONS)
def normalisation(request):
    return NORMALISATIONS[request.param]


def normalised(rgb, normalisation):
    """Channel by channel, as a data loader does it."""
    means, deviations = normalisation
    return torch.stack(
        [(rgb[:, c] - means[c]) / deviations[c] for c in range(3)],
        dim=1,
    )


def picture(images=2):
    """Colours that reach from black to white."""
    rgb = torch.rand(images, 3, 16, 24)
    rgb[:, :, 0, 0], rgb[:, :, -1, -1] = 0.0, 1.0
    return rgb


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
def test_pixels_of_black_to_white_pictures_become_their_colours(normalisation, dtype, error):
    rgb = picture()
    found = to_rgb(normalised(rgb, normalisation).to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), rgb, atol=error, rtol=0)


def test_the_normalisation_of_a_batch_is_seen_where_one_image_is_dark_and_one_light(normalisation):
    rgb = picture()
    rgb[0], rgb[1] = 0.3 * rgb[0], 0.7 + 0.3 * rgb[1]
    assert detect_normalisation(normalised(rgb, normalisation)) == normalisation


@pytest.mark.parametrize("name", ["astronaut", "rocket", "page"])
def test_real_photos_become_their_colours(tmp_path, normalisation, name):
    path = tmp_path / f"{name}.png"
    Image.fromarray(getattr(skimage.data, name)()).save(path)
    mean, std = normalisation
    photo = load_photo(path, size=112, mean=mean, std=std)
    assert detect_normalisation(photo.pixels) == normalisation
    torch.testing.assert_close(to_rgb(photo.pixels), photo.rgb, atol=1e-6, rtol=0)


@pytest.mark.parametrize("told", [True, False], ids=["told", "found"])
def test_no_image_at_all_has_no_colours(told, normalisation):
    assert torch.equal(to_rgb(EMPTY, normalisation if told else None), EMPTY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_fit_no_normalisation_are_stretched_image_by_image(dtype):
    first = torch.tensor([0.0, 51.0, 102.0, 255.0])  # bytes
    second = torch.tensor([-20.0, -10.0, 0.0, 20.0])
    flat = torch.full((4,), 7.0)
    pixels = torch.stack([first, second, flat]).view(3, 1, 2, 2).expand(-1, 3, -1, -1).to(dtype)
    expected = torch.tensor([[0.0, 0.2, 0.4, 1.0], [0.0, 0.25, 0.5, 1.0], [0.0] * 4])
    expected = expected.view(3, 1, 2, 2).expand(-1, 3, -1, -1)
    torch.testing.assert_close(to_rgb(pixels).float(), expected, atol=1e-3, rtol=0)


def test_one_image_is_stretched_over_all_its_channels_together():
    pixels = torch.tensor([0.0, 50.0, 100.0]).view(1, 3, 1, 1)  # red, green, blue
    torch.testing.assert_close(to_rgb(pixels).flatten(), torch.tensor([0.0, 0.5, 1.0]))


def test_a_given_normalisation_is_used_as_given():
    grey = torch.full((1, 3, 2, 2), 0.5)  # would be read as colours in 0..1
    half, odd = NORMALISATIONS["half"], ((0.1, 0.2, 0.3), (0.2, 0.4, 1.4))
    torch.testing.assert_close(to_rgb(grey, half), torch.full((1, 3, 2, 2), 0.75))
    found = to_rgb(grey, odd)[0, :, 0, 0]
    torch.testing.assert_close(found, torch.tensor([0.2, 0.4, 1.0]))


def test_what_resizing_overshoots_is_cut_off(normalisation):
    rgb = picture()
    rgb[0, :, 3, 4], rgb[1, :, 5, 6] = 1.015, -0.015
    found = to_rgb(normalised(rgb, normalisation))
    torch.testing.assert_close(found, rgb.clamp(0, 1), atol=1e-6, rtol=0)


def block_means(rgb):
    """Mean colour of every block of 8x8 pixels, row by row."""
    rows, cols = rgb.shape[2] // 8, rgb.shape[3] // 8
    means = [
        rgb[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean((2, 3))
        for y in range(rows)
        for x in range(cols)
    ]
    return torch.stack(means, 1)


@pytest.mark.parametrize("grid", [Grid(2, 3), None], ids=["grid seen", "grid of the aspect"])
def test_colours_of_patches_are_the_means_of_their_blocks(grid):
    rgb = picture()
    expected = block_means(rgb)
    found = Picture(pixels=2 * rgb - 1, grid=grid).colours(6)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_half_precision_pixels_have_full_precision_colours():
    rgb = torch.full((1, 3, 16, 24), 0.2)
    rgb[:, :, 0, 0] = 1.0
    found = Picture(pixels=rgb.half(), rgb=rgb, grid=Grid(2, 3)).colours(6)
    torch.testing.assert_close(found, block_means(rgb))


def test_given_colours_win_over_pixels():
    rgb, pixels = picture(), torch.randn(2, 3, 16, 24)
    found = Picture(pixels=pixels, rgb=rgb, grid=Grid(2, 3)).colours(6)
    torch.testing.assert_close(found, block_means(rgb))


def test_colours_get_no_gradient_from_pictures_or_pixels():
    rgb, pixels = (picture().requires_grad_() for _ in range(2))
    for given, source in ((rgb, rgb), (None, pixels)):
        found = Picture(pixels=pixels, rgb=given, grid=Grid(2, 3)).colours(6)
        torch.testing.assert_close(found, block_means(source.detach()))
        assert not found.requires_grad


@pytest.mark.parametrize("patches", [5, 7])
def test_another_number_of_patches_than_were_cut_is_an_error(patches):
    with pytest.raises(CaptureError, match=f"were cut into 6 patches, but {patches} tokens"):
        Picture(pixels=picture(), grid=Grid(2, 3)).colours(patches)


def test_a_model_that_was_never_given_images_is_an_error():
    with pytest.raises(CaptureError, match=r"not called with images.*`handle\.rgb = "):
        Picture().colours(6)


def test_images_in_doubt_are_an_error_that_gives_the_doubt():
    with pytest.raises(CaptureError, match="two forwards at once"):
        Picture(pixels=picture(), doubt="two forwards at once").colours(6)


def told(model, pixels, *, rgb=None, normalisation=None):
    """The colours that an edit is told in each block."""
    found = []

    def listen(tokens, output, attention, site):
        found.append(site.picture.colours(6))
        return output

    with torch.no_grad(), attach(model, listen, normalisation=normalisation) as handle:
        handle.rgb = rgb
        model(pixels)
    return found


@pytest.mark.parametrize("given", ["pixels", "rgb", "normalisation"])
def test_an_edit_is_told_the_colours_of_the_images_of_its_forward(given):
    model, rgb = HandMade(), picture()
    if given == "pixels":
        found = told(model, normalised(rgb, NORMALISATIONS["imagenet"]))
    elif given == "rgb":
        found = told(model, torch.randn(2, 3, 16, 24), rgb=rgb)
    else:
        odd = ((0.3, 0.4, 0.5), (0.1, 0.9, 2.0))
        found = told(model, normalised(rgb, odd), normalisation=odd)
    assert len(found) == 2
    for colours in found:
        torch.testing.assert_close(colours, block_means(rgb), atol=1e-6, rtol=0)


def test_one_forward_after_the_other_has_its_own_colours():
    model, found = HandMade(), []

    def listen(tokens, output, attention, site):
        found.append(site.picture.colours(6))
        return output

    first, second = picture(), picture(images=3)
    with torch.no_grad(), attach(model, listen, blocks=1):
        model(first)
        model(second)
    torch.testing.assert_close(found[0], block_means(first))
    torch.testing.assert_close(found[1], block_means(second))
