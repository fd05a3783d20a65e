"""Quality of maps by a classifier whose answers are known by hand."""

import math

import pytest
import torch
from hosts import HandMade
from torch import nn

from camkit import Vocabulary, photo_from_array
from camkit.bench import Quality
from camkit.ops.images import gaussian_blur


class CornerLight(nn.Module):
    """Class 0 is as likely as the upper left quarter is bright; the other class never changes."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels):
        rows, cols = pixels.shape[-2:]
        corner = pixels[:, :, : rows // 2, : cols // 2].mean((1, 2, 3))
        return torch.stack([corner * self.gain, torch.zeros_like(corner)], 1)


@pytest.fixture
def photo():
    """White in the upper left quarter, black elsewhere; pixels are +1 and -1."""
    colours = torch.zeros(32, 32, 3, dtype=torch.uint8)
    colours[:16, :16] = 255
    return photo_from_array(colours.numpy(), size=(32, 32), multiple=1)


def scores(photo, cam, **settings):
    names = Vocabulary(("corner", "other"))
    (found,) = Quality(**settings)(CornerLight(), photo, cam, (0,), names)
    return found


def corner_map():
    cam = torch.zeros(1, 1, 32, 32)
    cam[..., :16, :16] = 1.0
    return cam


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_deletion_by_hand(photo):
    """Five pictures; the bright quarter goes first, for the mean colour, -0.5: +1, then -0.5."""
    found = scores(photo, corner_map(), steps=5)
    first, rest = sigmoid(1.0), sigmoid(-0.5)
    assert found.deletion == pytest.approx((first / 2 + 3 * rest + rest / 2) / 4, abs=1e-6)


def test_insertion_by_hand(photo):
    """The blurred quarter is replaced at the first step, and nothing changes after it."""
    found = scores(photo, corner_map(), steps=5, blur_width=4.0)
    blurred = float(gaussian_blur(photo.pixels, 4.0)[..., :16, :16].mean())
    first, rest = sigmoid(blurred), sigmoid(1.0)
    assert found.insertion == pytest.approx((first / 2 + 3 * rest + rest / 2) / 4, abs=1e-6)


def test_what_is_left_behind_by_hand(photo):
    """Faded to half, the corner keeps half its score; faded out, nothing."""
    assert scores(photo, corner_map() / 2).background == pytest.approx(0.5)
    assert scores(photo, corner_map()).background == 0.0
    assert scores(photo, 1 - corner_map()).background == pytest.approx(1.0)


def test_the_right_map_beats_the_wrong_one(photo):
    right, wrong = scores(photo, corner_map()), scores(photo, 1 - corner_map())
    assert right.insertion > wrong.insertion
    assert right.deletion < wrong.deletion
    assert right.background < wrong.background


def test_the_batch_does_not_matter(photo):
    assert scores(photo, corner_map(), batch=1) == scores(photo, corner_map(), batch=100)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 1}, "`steps` must be at least 2, got 1"),
        ({"images": 0}, "`images` must be at least 1, got 0"),
        ({"blur_width": 0.0}, "`blur_width` must be above 0, got 0.0"),
        ({"batch": 0}, "`batch` must be at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Quality(**settings)


@pytest.mark.parametrize("returns", ["an embedding first", "probabilities"])
def test_a_model_is_measured_by_its_class_scores(photo, returns):
    class Host(HandMade):
        def forward(self, pixels):
            token = self.tokens(pixels)[:, 0]
            scores = self.head(token)
            return (token, scores) if returns == "an embedding first" else scores.softmax(-1)

    torch.manual_seed(0)
    plain, host = HandMade(), Host()
    host.load_state_dict(plain.state_dict())
    names, cam = Vocabulary(tuple("abcde")), corner_map()
    (found,), (expected,) = (Quality(steps=3)(m, photo, cam, (2,), names) for m in (host, plain))
    assert found.deletion == pytest.approx(expected.deletion, abs=1e-6)
    assert found.insertion == pytest.approx(expected.insertion, abs=1e-6)
    assert found.background == pytest.approx(expected.background, abs=1e-6)
