"""A forward may run several passes through the blocks; each is seen and edited as if alone."""

import pytest
import torch
from forks import (
    CLASSES,
    DIM,
    GRID,
    Attention,
    Chunks,
    CropsAndTeacher,
    Flips,
    SharedBlocks,
    Vit,
    convolved,
)
from hosts import shaken
from torch import nn

from camkit import attach, watch
from camkit.capture.passes import same_pictures, small_pictures
from camkit.edits import DOEI, ScaleOutput
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.seeds import ClassWeightSeed, GradientSeed

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
IDS = torch.arange(CLASSES).expand(3, CLASSES)


def photos(images=3, size=(32, 48), seed=0):
    return torch.rand(images, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def host():
    return shaken(CropsAndTeacher()).eval()


@pytest.fixture
def crops():
    return photos(6, (16, 24), seed=1)


def blocks_of(model, pixels):
    with watch(model) as seen:
        model(pixels)
    return seen.capture


def same_blocks(mine, theirs):
    assert len(mine.blocks) == len(theirs.blocks)
    for one, other in zip(mine.blocks, theirs.blocks, strict=True):
        torch.testing.assert_close(one.head_mean(), other.head_mean(), **CLOSE)
    assert (mine.grid, mine.images) == (theirs.grid, theirs.images)


def test_each_pass_is_what_a_forward_of_its_own_shows(host, crops):
    pixels = photos()
    with watch(host) as seen:
        host(pixels, crops)
    whole, small, teacher = seen.passes
    features = ("encoder", "encoder", "teacher")
    for capture, name, images in zip(seen.passes, features, (pixels, crops, crops), strict=True):
        tower = getattr(host, name)
        same_blocks(capture, blocks_of(tower, images))
    assert (whole.grid, small.grid, teacher.grid) == (Grid(*GRID), Grid(2, 3), Grid(2, 3))
    assert teacher.names == ("teacher.blocks.0.attn", "teacher.blocks.1.attn")


def test_scores_belong_to_the_pass_whose_classifier_made_them(host, crops):
    pixels = photos()
    plain = blocks_of(host, pixels)
    with watch(host) as seen:
        scores = host(pixels, crops)[0]
    assert [p.outputs is None for p in seen.passes] == [False, True, True]
    assert torch.equal(seen.passes[0].outputs, scores)
    seed = ClassWeightSeed()
    torch.testing.assert_close(seed(seen.passes[0], IDS), seed(plain, IDS), **CLOSE)


def test_gradients_reach_the_pass_that_the_scores_are_of(host, crops):
    pixels, seed = photos(), GradientSeed()
    with watch(host, gradients=True) as plain:
        host(pixels)
    with watch(host, gradients=True) as seen, torch.no_grad():
        host(pixels, crops)
    torch.testing.assert_close(seed(seen.passes[0], IDS), seed(plain.capture, IDS), **CLOSE)


def test_a_mixture_is_refused_with_the_choice(host, crops):
    with watch(host) as seen:
        host(photos(), crops)
    with pytest.raises(
        CaptureError, match=r"3 passes.*seen\.passes.*passes\[1\]: 6 images of 16x24"
    ):
        _ = seen.capture


@pytest.mark.parametrize("edit", [DOEI(), DOEI.as_drawn()], ids=["logits", "outputs"])
def test_an_edit_acts_in_each_pass_as_in_a_forward_of_its_own(host, crops, edit):
    pixels = photos()
    with attach(host, edit):
        scores, student, teacher = host(pixels, crops)
    with attach(host, edit):
        torch.testing.assert_close(scores, host(pixels)[0], **CLOSE)
    for name, seen in (("encoder", student), ("teacher", teacher)):
        tower = getattr(host, name)
        plain = tower.forward_features(crops)[:, 0]
        with attach(tower, edit):
            expected = tower(crops)
        torch.testing.assert_close(tower.head(seen), expected, **CLOSE)
        assert not torch.allclose(seen, plain, atol=1e-4)


class Remembers(ScaleOutput):
    """An edit that keeps what it is told of each pass."""

    def __init__(self):
        super().__init__(1.0)
        object.__setattr__(self, "told", [])

    def __call__(self, tokens, output, attention, site):
        patches = len(site.anatomy.patches(output.shape[1]))
        self.told.append((len(output), patches, site.picture.colours(patches), site.labels))
        return super().__call__(tokens, output, attention, site)


def patch_means(rgb, cell=8):
    return torch.nn.functional.avg_pool2d(rgb, cell).flatten(2).mT


def test_an_edit_is_told_the_colours_and_labels_of_its_own_pass(host, crops):
    rgb, labels, edit = (photos() + 1) / 2, torch.eye(CLASSES)[:3].bool(), Remembers()
    half = (0.5, 0.5, 0.5)
    with attach(host, edit, normalisation=(half, half)) as handle:
        with handle.batch(labels=labels, rgb=rgb):
            host(rgb * 2 - 1, crops)
        with handle.batch(labels=[labels, torch.ones(6, CLASSES).bool()]):
            host(rgb * 2 - 1, crops)
    first, second = edit.told[:6], edit.told[6:]
    small = (crops + 1) / 2
    for (images, patches, colours, known), pictures, given in zip(
        first[::2], (rgb, small, small), (labels, None, None), strict=True
    ):
        assert (images, patches) == (len(pictures), patch_means(pictures).shape[1])
        torch.testing.assert_close(colours, patch_means(pictures), atol=1e-4, rtol=1e-4)
        assert known is given if given is None else torch.equal(known, given)
    assert [None if call[3] is None else len(call[3]) for call in second[::2]] == [3, 6, None]


def test_labels_of_a_pass_must_fit_its_images(host, crops):
    labels = [None, torch.ones(4, CLASSES).bool()]
    refused = pytest.raises(ValueError, match="6 images of pass 1, got 4")
    with attach(host, DOEI.as_drawn()) as handle, handle.batch(labels=labels), refused:
        host(photos(), crops)


def test_flips_are_two_passes_and_colours_are_flipped_with_them():
    host, pixels = shaken(Flips()).eval(), photos()
    with watch(host) as seen:
        host(pixels)
    plain, flipped = seen.passes
    same_blocks(plain, blocks_of(host.backbone, pixels))
    same_blocks(flipped, blocks_of(host.backbone, pixels.flip(-1)))
    for capture, images in ((plain, pixels), (flipped, pixels.flip(-1))):
        alone = blocks_of(host.backbone, images).patch_embeddings()
        torch.testing.assert_close(capture.patch_embeddings(), alone, **CLOSE)
    edit, rgb = Remembers(), (pixels + 1) / 2
    with attach(host, edit) as handle, handle.batch(rgb=rgb):
        host(pixels)
    torch.testing.assert_close(edit.told[0][2], patch_means(rgb), **CLOSE)
    turned = patch_means(rgb.flip(-1))
    assert (edit.told[2][2] - turned).abs().max() < (edit.told[2][2] - patch_means(rgb)).abs().max()


def test_chunks_of_a_batch_are_passes_with_scores_of_their_own():
    host, pixels = shaken(Chunks()).eval(), photos(5)
    with watch(host) as seen:
        host(pixels)
    assert [capture.images for capture in seen.passes] == [2, 2, 1]
    for capture, chunk in zip(seen.passes, pixels.split(2), strict=True):
        same_blocks(capture, blocks_of(host.backbone, chunk))


def test_a_block_that_runs_several_times_is_one_pass():
    host = shaken(SharedBlocks(Attention)).eval()
    capture = blocks_of(host, photos())
    assert capture.names == ("blocks.0.attn",) * 3


def linear_patches():
    cut = nn.Unfold(8, stride=8)
    return cut, nn.Flatten(1, 1), _Turn(), nn.Linear(3 * 64, DIM)


class _Turn(nn.Module):
    def forward(self, x):
        return x.mT


def test_passes_are_told_apart_without_a_convolution():
    class Twice(Flips):
        def __init__(self):
            super().__init__()
            self.backbone = Vit(Attention, embed=linear_patches)

    host, pixels = shaken(Twice()).eval(), photos()
    with watch(host) as seen:
        host(pixels)
    assert len(seen.passes) == 2
    for capture, images in zip(seen.passes, (pixels, pixels.flip(-1)), strict=True):
        same_blocks(capture, blocks_of(host.backbone, images))


def test_a_convolution_that_is_called_twice_before_the_blocks_is_one_pass():
    class Joined(Vit):
        def forward_features(self, pixels):
            both = [self.patch_embed(x) for x in (pixels, pixels.flip(-1))]
            token = self.cls_token.expand(2 * len(pixels), -1, -1)
            return self.norm(self.through(torch.cat([token, torch.cat(both)], dim=1)))

    host, pixels = shaken(Joined(Attention, embed=convolved)).eval(), photos()
    capture = blocks_of(host, pixels)
    assert capture.images == 6
    alone = blocks_of(shaken_like(host), torch.cat([pixels, pixels.flip(-1)]))
    same_blocks(capture, alone)


def shaken_like(host):
    twin = Vit(Attention, embed=convolved)
    twin.load_state_dict(host.state_dict())
    return twin.eval()


def test_an_edit_says_that_it_leaves_unknown_colours_out():
    class Patched(nn.Module):
        """Cuts its patches itself, so that nothing shows the images of its second pass."""

        def __init__(self):
            super().__init__()
            self.backbone = Vit(Attention, embed=lambda: (nn.Linear(3 * 64, DIM),))

        def forward(self, pixels):
            cut = torch.nn.functional.unfold(pixels, 8, stride=8).mT
            return self.backbone(cut) + self.backbone(cut.flip(1))

    host = shaken(Patched()).eval()
    warned = pytest.warns(UserWarning, match=r"leaves the colours out.*handle\.rgb")
    with attach(host, DOEI.as_drawn()), warned:
        host(photos())


def test_a_list_of_batches_is_a_forward_with_a_pass_for_each_size():
    class MultiCrop(Flips):
        """As DINO: crops of one size go through the backbone together."""

        def forward(self, batches):
            sizes = dict.fromkeys(tuple(batch.shape[-2:]) for batch in batches)
            same = [[b for b in batches if tuple(b.shape[-2:]) == size] for size in sizes]
            return torch.cat([self.backbone(torch.cat(group)) for group in same])

    host = shaken(MultiCrop()).eval()
    batches = [photos(2), photos(2, seed=1), photos(2, (16, 24), seed=2)]
    expected = torch.cat([host.backbone(torch.cat(batches[:2])), host.backbone(batches[2])])
    with watch(host) as seen:
        assert torch.equal(host(batches), expected)
    assert [(p.images, p.grid) for p in seen.passes] == [(4, Grid(4, 6)), (2, Grid(2, 3))]
    same_blocks(seen.passes[0], blocks_of(host.backbone, torch.cat(batches[:2])))
    same_blocks(seen.passes[1], blocks_of(host.backbone, batches[2]))


def test_a_crop_is_not_taken_for_the_picture_and_a_normalised_one_is():
    rows = torch.linspace(0, 1, 64)
    picture = (rows[:, None] * rows)[None, None].repeat(1, 3, 1, 1)  # smooth, so a crop looks alike
    scaled = (picture - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / 0.225
    smaller = torch.nn.functional.interpolate(scaled, (48, 40), mode="area")
    assert same_pictures(small_pictures(scaled), picture)
    assert same_pictures(small_pictures(smaller), picture)
    assert not same_pictures(small_pictures(picture[..., :48, :48] ** 0.5), picture)
    assert not same_pictures(small_pictures(picture.flip(-1)), picture)
    assert not same_pictures(small_pictures(picture.repeat(2, 1, 1, 1)), picture)
