"""Regions: scores per region, by slow loops over masks, planted segments, and laws."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coarse import captured
from hypothesis import given, settings, strategies as st

import camkit
from camkit import CaptureError, resize_cam, to_mask
from camkit.capture import Capture
from camkit.errors import DataError
from camkit.ops.mask_runs import MaskRuns
from camkit.refiners import Regions, Segments, Superpixels, UnusedRegionsWarning, chain

ROWS, COLS = 12, 16
RULES = [
    (rule, overlap) for rule in ("mean", "vote", "sepl") for overlap in ("mean", "cut", "rank")
]
every_rule = pytest.mark.parametrize(("rule", "overlap"), RULES)


def given_masks(*masks):
    """A function that proposes these masks for every picture."""
    return lambda _: list(masks)


def box(top, bottom, left, right):
    mask = np.zeros((ROWS, COLS), bool)
    mask[top:bottom, left:right] = True
    return mask


def refine(refiner, cam, rgb=None):
    rgb = torch.rand(len(cam), 3, ROWS, COLS) if rgb is None else rgb
    return refiner(cam, Capture.of_picture(rgb))


def random_masks(count, rng_seed):
    rng = np.random.default_rng(rng_seed)
    masks = []
    for _ in range(count):
        top, bottom = np.sort(rng.integers(0, ROWS + 1, 2))
        left, right = np.sort(rng.integers(0, COLS + 1, 2))
        masks.append(box(top, bottom, left, right) & (rng.random((ROWS, COLS)) < 0.9))
    return masks


# Rules, by loops


def votes_by_loops(scores, background_score):
    votes = np.zeros_like(scores)
    for y, x in np.ndindex(ROWS, COLS):
        best = scores[:, y, x].max()
        if best > background_score:
            tied = scores[:, y, x] == best
            votes[:, y, x] = tied / tied.sum()
    return votes


def pieces_by_loops(masks):
    pieces = {}
    for y, x in np.ndindex(ROWS, COLS):
        held = tuple(bool(mask[y, x]) for mask in masks)
        if any(held):
            pieces.setdefault(held, np.zeros((ROWS, COLS), bool))[y, x] = True
    return list(pieces.values())


def sepl_by_loops(scores, votes, mask):
    """What each class gets of a mask, and the mean of the class that gets it."""
    means = np.array([each[mask].mean() for each in scores])
    inside = np.array([each[mask].sum() for each in votes])
    most = (inside >= 0.85 * votes.sum((1, 2))) & (inside > 0)
    taken = (2 * inside > mask.sum()) | most
    best = max(means[taken], default=-1.0)
    winners = taken & (means == best)
    return winners / max(winners.sum(), 1), best


def by_loops(cam, masks, rule, overlap, background_score):
    """The definition of `Regions` for one image, pixel by pixel in float64."""
    scores = cam[0].double().numpy()
    votes = votes_by_loops(scores, background_score)
    marks = scores if rule == "mean" else votes
    masks = [mask for mask in masks if 0 < mask.sum() <= 0.95 * ROWS * COLS]
    masks = pieces_by_loops(masks) if overlap == "cut" else masks
    if rule == "sepl":
        found = [sepl_by_loops(scores, votes, mask) for mask in masks]
    else:
        means = [np.array([each[mask].mean() for each in marks]) for mask in masks]
        found = [(each, each.max()) for each in means]
    refined = marks.copy()
    for y, x in np.ndindex(ROWS, COLS):
        over = [place for place, mask in enumerate(masks) if mask[y, x]]
        if over and overlap == "rank":
            top = max(over, key=lambda i: (found[i][1], -masks[i].sum(), -i))
            refined[:, y, x] = found[top][0]
        elif over:
            refined[:, y, x] = np.mean([found[i][0] for i in over], 0)
    return refined


@every_rule
@given(seed=st.integers(0, 10**6), count=st.integers(0, 6), classes=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_every_rule_is_that_of_loops_over_masks_and_pixels(rule, overlap, seed, count, classes):
    generator = torch.Generator().manual_seed(seed)
    cam = resize_cam(torch.rand(1, classes, 3, 4, generator=generator), (ROWS, COLS))
    masks = random_masks(count, seed)
    refiner = Regions(given_masks(*masks), rule=rule, overlap=overlap, background_score=0.55)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedRegionsWarning)
        found = refine(refiner, cam)
    expected = by_loops(cam, masks, rule, overlap, 0.55)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)


def test_sepl_takes_a_mask_filled_by_half_and_a_mask_that_holds_most_of_the_label():
    cam = torch.zeros(1, 1, ROWS, COLS)
    cam[..., 0:4, 0:8] = 0.9  # a label of 32 pixels
    filled = box(0, 4, 0, 5)  # 20 of 20 pixels are labelled
    holds = box(0, 7, 0, 14)  # 28 of 98, 87.5% of the label
    half = box(3, 5, 6, 8)  # 2 of 4: no more than half, and little of the label
    holds[0:4, 7] = False
    out = refine(Regions(given_masks(filled, holds, half), rule="sepl"), cam)[0, 0] > 0.5
    assert out.numpy()[filled | holds].all()
    alone = half & ~holds  # under this mask only, which nobody takes: background
    assert alone.any()
    assert not out.numpy()[alone].any()
    free = ~(filled | holds | half)
    assert torch.equal(out[torch.from_numpy(free)], cam[0, 0][torch.from_numpy(free)] > 0.5)


def test_a_mask_that_two_classes_claim_goes_to_the_higher_mean_in_any_order():
    cam = torch.zeros(1, 2, ROWS, COLS)
    cam[:, 0, 0:2, 0:2] = 0.6  # all of a small label lies in the mask
    cam[:, 1, 2:8, 0:8] = 0.9  # a label that fills more than half of it
    refiner = Regions(given_masks(box(0, 8, 0, 8)), rule="sepl")
    for order in ([0, 1], [1, 0]):
        out = refine(refiner, cam[:, order])[0]
        assert torch.equal(out[order.index(1)] > 0.5, torch.from_numpy(box(0, 8, 0, 8)))
        assert not out[order.index(0)].any()


def test_classes_with_equal_scores_share_a_region():
    cam = torch.full((1, 2, ROWS, COLS), 0.8)
    for rule in ("vote", "sepl"):
        out = refine(Regions(given_masks(box(0, 6, 0, 6)), rule=rule), cam)
        torch.testing.assert_close(out, torch.full_like(out, 0.5))


# Laws


@every_rule
def test_class_order_never_changes_the_result(rule, overlap):
    cam = (torch.rand(1, 4, ROWS, COLS) * 8).round() / 8  # many equal scores
    refiner = Regions(given_masks(*random_masks(12, 3)), rule=rule, overlap=overlap)
    order = [2, 0, 3, 1]
    assert torch.equal(refine(refiner, cam[:, order]), refine(refiner, cam)[:, order])


@every_rule
def test_mask_order_never_changes_the_result_of_distinct_scores(rule, overlap):
    cam, masks = torch.rand(1, 3, ROWS, COLS), random_masks(12, 4)
    one, other = (
        Regions(given_masks(*m), rule=rule, overlap=overlap) for m in (masks, masks[::-1])
    )
    torch.testing.assert_close(refine(one, cam), refine(other, cam))


@every_rule
def test_true_segments_give_the_ceiling(rule, overlap):
    """Maps that miss the outlines of three objects become exact."""
    truth = np.zeros((ROWS, COLS), np.int64)
    truth[1:7, 1:6], truth[5:11, 8:15], truth[2:5, 10:13] = 1, 2, 3
    objects = F.one_hot(torch.from_numpy(truth)).movedim(-1, 0)[None, 1:].float()
    coarse = resize_cam(F.avg_pool2d(objects, 2), (ROWS, COLS))
    classes = torch.tensor([[0, 1, 2]])
    assert not np.array_equal(to_mask(coarse, classes, background_score=0.5)[0].numpy(), truth)
    refiner = Regions(lambda _: truth, rule=rule, overlap=overlap, background_score=0.45)
    mask = to_mask(refine(refiner, coarse), classes, background_score=0.5)
    assert np.array_equal(mask[0].numpy(), truth)


@every_rule
@pytest.mark.parametrize(
    "masks",
    [[], [np.ones((ROWS, COLS), bool)], [np.zeros((ROWS, COLS), bool)]],
    ids=["no proposal", "the whole picture", "an empty mask"],
)
def test_proposals_that_say_nothing_change_no_label_and_it_is_said_once(rule, overlap, masks):
    cam, classes = torch.rand(1, 3, 3, 4), torch.tensor([[0, 1, 2]])
    refiner = Regions(lambda _: masks, rule=rule, overlap=overlap, background_score=0.6)
    outs = []
    with warnings.catch_warnings(record=True) as seen:
        for _ in range(2):
            warnings.simplefilter("always")  # Python forgets what was said
            outs.append(refine(refiner, cam))
    assert [each.category for each in seen] == [UnusedRegionsWarning]
    assert "no region that covers a pixel" in str(seen[0].message)
    expected = to_mask(resize_cam(cam, (ROWS, COLS)), classes, background_score=0.6)
    score = 0.6 if rule == "mean" else 0.5
    for out in outs:
        assert torch.equal(to_mask(out, classes, background_score=score), expected)


@every_rule
def test_empty_maps_stay_empty_and_it_is_said(rule, overlap):
    refiner = Regions(given_masks(box(0, 6, 0, 6)), rule=rule, overlap=overlap)
    with pytest.warns(UnusedRegionsWarning, match="every map is zero"):
        out = refine(refiner, torch.zeros(1, 2, 3, 4))
    assert not out.any()


@pytest.mark.parametrize("overlap", ["mean", "cut"])
def test_means_of_a_class_do_not_depend_on_other_classes(overlap):
    refiner = Regions(given_masks(box(0, 6, 0, 6), box(3, 9, 2, 10)), overlap=overlap)
    cam = torch.rand(1, 3, 3, 4)
    together = refine(refiner, cam)
    alone = [refine(refiner, cam[:, [place]]) for place in range(3)]
    assert torch.equal(together, torch.cat(alone, 1))


def test_an_empty_map_beside_another_takes_no_mask():
    cam = torch.zeros(1, 2, ROWS, COLS)
    cam[:, 1, :6, :6] = 0.9
    out = refine(Regions(given_masks(box(0, 6, 0, 6), box(8, 10, 8, 10)), rule="sepl"), cam)
    assert not out[:, 0].any()
    assert torch.equal(out[0, 1] > 0.5, torch.from_numpy(box(0, 6, 0, 6)))


@every_rule
def test_pixels_under_no_mask_keep_their_labels(rule, overlap):
    cam = torch.rand(1, 2, ROWS, COLS)
    out = refine(Regions(given_masks(box(0, 6, 0, 8)), rule=rule, overlap=overlap), cam)
    free = torch.from_numpy(~box(0, 6, 0, 8))
    kept = to_mask(cam, background_score=0.5)[:, free]
    assert torch.equal(to_mask(out, background_score=0.5)[:, free], kept)
    if rule == "mean":
        assert torch.equal(out[..., free], cam[..., free])


@pytest.mark.parametrize("overlap", ["mean", "cut", "rank"])
def test_means_are_differentiable_in_the_maps(overlap):
    cam = torch.rand(1, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    masks = [mask[::2, ::2] for mask in random_masks(5, 1)]
    capture = Capture.of_picture(torch.rand(1, 3, 6, 8).double())
    refiner = Regions(lambda _: masks, overlap=overlap)
    assert torch.autograd.gradcheck(lambda maps: refiner(maps, capture), (cam,))


def test_two_images_get_their_own_proposals():
    rgb = torch.stack([torch.zeros(3, ROWS, COLS), torch.ones(3, ROWS, COLS)])
    left, top = box(0, ROWS, 0, 8), box(0, 6, 0, COLS)
    refiner = Regions(lambda picture: [top if picture.max() else left])
    cam = torch.rand(2, 1, ROWS, COLS)
    out = refine(refiner, cam, rgb)
    for image, mask in enumerate((left, top)):
        mean = cam[image, 0][torch.from_numpy(mask)].mean()
        torch.testing.assert_close(out[image, 0][torch.from_numpy(mask)], mean.expand(mask.sum()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_rule
def test_a_gpu_gives_the_same(rule, overlap):
    cam, rgb = torch.rand(2, 3, 3, 4), torch.rand(2, 3, ROWS, COLS)
    refiner = Regions(given_masks(*random_masks(12, 3)), rule=rule, overlap=overlap)
    found = refiner(cam.cuda(), Capture.of_picture(rgb.cuda()))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), refine(refiner, cam, rgb), atol=1e-5, rtol=0)


# The function and what it returns


def test_the_picture_is_that_of_the_capture_and_gradients_are_off():
    seen = []

    def propose(picture):
        seen.append((picture.dtype, picture.copy(), torch.is_grad_enabled()))
        picture[:] = 0  # its own copy
        return [box(0, 6, 0, 6)]

    rgb = torch.rand(1, 3, ROWS, COLS)
    before = rgb.clone()
    refine(Regions(propose), torch.rand(1, 1, ROWS, COLS), rgb)
    assert (seen[0][0], seen[0][2]) == (np.uint8, False)
    assert np.array_equal(seen[0][1], (255 * rgb[0]).round().byte().permute(1, 2, 0).numpy())
    assert torch.equal(rgb, before)


def test_the_list_of_dicts_of_segment_anything_is_the_list_of_its_masks():
    one, two = box(0, 6, 0, 6), box(3, 9, 2, 12)
    runs = {"size": [ROWS, COLS], "counts": [14, 2, ROWS * COLS - 16]}  # column 1, rows 2 and 3
    dicts = [
        {"segmentation": one, "area": 36, "bbox": [0, 0, 5, 5], "predicted_iou": 0.9},
        {"segmentation": two, "stability_score": 0.97},
        {"segmentation": runs},
    ]
    cam = torch.rand(1, 2, ROWS, COLS)
    out = refine(Regions(lambda _: dicts), cam)
    assert torch.equal(out, refine(Regions(given_masks(one, two, box(2, 4, 1, 2))), cam))
    stacked = torch.from_numpy(np.stack([one, two, box(2, 4, 1, 2)]))
    assert torch.equal(out, refine(Regions(lambda _: stacked), cam))


def test_several_label_images_are_the_masks_of_all():
    labels = np.stack([np.arange(ROWS * COLS).reshape(ROWS, COLS) // side for side in (24, 48)])
    labels[0, :2] = -1  # under no mask
    masks = [each == value for each in labels for value in np.unique(each) if value >= 0]
    cam = torch.rand(1, 2, ROWS, COLS)
    out = refine(Regions(lambda _: labels), cam)
    assert torch.equal(out, refine(Regions(given_masks(*masks)), cam))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "must be bool masks .*, a label image .*, got NoneType"),
        ({"masks": []}, "must be bool masks .*, got dict"),
        ([[0, 0, 5, 5]], "proposals in place 0 must hold bool masks .*, got list"),
        (np.zeros((2, ROWS, COLS)), "got float64; write `scores > threshold`"),
        (np.zeros((1, 1, ROWS, COLS), bool), r"must be \(H, W\) or \(n, H, W\), got shape"),
        ([np.zeros((1, ROWS, COLS), bool)], r"must be a mask or label image \(H, W\), got shape"),
        ([{"segmentation": [[1.0, 2.0]]}], "proposals in place 0 must hold bool masks"),
        ([{"counts": [3], "size": [1, 2]}], "place 0: `counts` must add up to the 2 pixels of 1x2"),
        ([box(0, 1, 0, 1), np.zeros((2, 2), bool)], "got 12x16 .* in place 0 and 2x2 in place 1"),
        ([np.zeros((16, 12), bool)], r"are 16x12 .*, but the photo is 12x16; make them of the upr"),
        ([np.zeros((2, 2), bool)], r"are 2x2 .*, but the photo is 12x16; make them of the photo"),
    ],
)
def test_what_is_no_proposal_is_refused(value, words):
    with pytest.raises((ValueError, TypeError), match=words):
        refine(Regions(lambda _: value), torch.rand(1, 1, ROWS, COLS))


@pytest.mark.usefixtures("no_shape_checks")
def test_proposals_must_be_a_function_or_a_reader():
    for wrong in (3, None, Segments):
        with pytest.raises(TypeError, match="`proposals` must be a function of the picture, a"):
            Regions(wrong)


def test_of_masks_with_equal_ranks_up_to_rounding_the_smaller_counts():
    """Both masks have 0.7 as their best mean, but not the same mean of the other class."""
    cam = torch.zeros(1, 2, ROWS, COLS)
    cam[:, 0, :6, :6] = 0.7  # sums of 0.7 are rounded
    cam[:, 1, :3, :3] = 0.3
    small, large = box(0, 3, 0, 3), box(0, 6, 0, 6)
    for masks in ((small, large), (large, small)):
        out = refine(Regions(given_masks(*masks), overlap="rank"), cam)[0, 1]
        torch.testing.assert_close(out[:3, :3], torch.full((3, 3), 0.3))
        torch.testing.assert_close(out[3:6, :6], torch.full((3, 6), 0.3 * 9 / 36))


class Generator:
    """A callable whose repr is an address."""

    def __call__(self, _):
        return []


def test_the_repr_of_a_function_has_no_address():
    assert repr(Regions(random_masks)).startswith("Regions(proposals=random_masks, rule='mean'")
    assert "method='slic'" in repr(Regions(Segments("slic")))
    assert repr(Regions(Generator())) == repr(Regions(Generator()))
    assert "Generator.__call__" in repr(Regions(Generator().__call__))


# Names of photos


@dataclasses.dataclass(frozen=True)
class ByName:
    """Masks by the name of a photo."""

    masks: dict

    def of_photo(self, key):
        return self.masks[key]


READER = ByName({"a": [box(0, 6, 0, 6)], "b": [box(4, 12, 4, 12)]})


def test_proposals_are_found_by_the_names_of_the_capture():
    cam, rgb = torch.rand(2, 2, ROWS, COLS), torch.rand(2, 3, ROWS, COLS)
    capture = Capture.of_picture(rgb, keys=["b", "a"])
    out = Regions(READER)(cam, capture)
    for image, key in enumerate("ba"):
        alone = refine(Regions(given_masks(*READER.masks[key])), cam[image : image + 1])
        assert torch.equal(out[image : image + 1], alone)


@pytest.mark.parametrize("keys", [(), ("",)])
def test_a_capture_without_names_says_what_to_do(keys):
    capture = Capture.of_picture(torch.rand(1, 3, ROWS, COLS), keys=keys)
    words = r"ByName finds .* by its name, .* has no name; set it by dataclasses\.replace\(capture"
    with pytest.raises(CaptureError, match=words):
        Regions(READER)(torch.rand(1, 1, ROWS, COLS), capture)


def test_names_must_be_one_for_each_picture():
    with pytest.raises(
        ValueError, match="`keys` must have one entry for each of 1 pictures, got 2"
    ):
        Capture.of_picture(torch.rand(1, 3, 4, 4), keys=["a", "b"])


def test_proposals_of_the_photo_fit_a_picture_of_the_models_size():
    """The mean is over the photo, and each pixel of the picture gets the scores at its centre."""
    cam, size = torch.rand(1, 1, 3, 4), (ROWS // 2, COLS // 2)
    capture = Capture.of_picture(torch.rand(1, 3, *size), keys=["a"], sizes=[(ROWS, COLS)])
    out = Regions(READER)(cam, capture)
    assert out.shape[2:] == size
    large = refine(Regions(given_masks(*READER.masks["a"])), cam)
    assert torch.equal(out, large[:, :, 1::2, 1::2])
    with pytest.raises(DataError, match=r"the proposals of a are 12x16 .*, but the photo is 6x8"):
        Regions(READER)(cam, dataclasses.replace(capture, sizes=()))


def test_a_pipeline_tells_the_names_and_sizes_of_photos(tmp_path):
    from PIL import Image
    from skimage.data import chelsea

    photo = chelsea()[::3, ::3]
    Image.fromarray(photo).save(tmp_path / "a.png")
    masks = np.zeros((1, *photo.shape[:2]), bool)
    masks[:, :40, :60] = True
    reader = ByName({"a": masks})
    model = camkit.data.demo_model()
    refiner = Regions(reader, background_score=0.5)
    plain = camkit.wrap(model, refine=camkit.method.WITHOUT_EDGES)
    wrapped = camkit.wrap(model, refine=(*camkit.method.WITHOUT_EDGES, refiner))
    result = wrapped(tmp_path / "a.png", classes=["cat"])
    cam = plain(tmp_path / "a.png", classes=["cat"]).cam[0, 0]
    inside = result.cam[0, 0][5:30, 5:50]  # away from the edges of the model's picture
    torch.testing.assert_close(inside, cam[:40, :60].mean().expand_as(inside), atol=0.02, rtol=0)
    with pytest.raises(CaptureError, match="has no name"):
        wrapped(photo, classes=["cat"])


# Superpixels, a case of Regions


def superpixels_before(refiner, cam, rgb):
    """The formula of `Superpixels` before `Regions`, for all images at once."""
    maps = resize_cam(cam, tuple(rgb.shape[-2:]))
    if refiner.vote is not None:
        background = maps.new_full((len(maps), 1, *maps.shape[2:]), refiner.vote)
        winner = torch.cat([background, maps], 1).argmax(1)
        maps = F.one_hot(winner, maps.shape[1] + 1).movedim(-1, 1)[:, 1:].to(maps.dtype)
    index = refiner.segments(rgb).flatten(1)[:, None].expand(-1, maps.shape[1], -1)
    means = maps.new_zeros(*maps.shape[:2], int(index.max()) + 1)
    means = means.scatter_reduce(2, index, maps.flatten(2), "mean", include_self=False)
    return means.gather(2, index).view_as(maps)


@pytest.mark.parametrize("method", ["slic", "felzenszwalb"])
@pytest.mark.parametrize("vote", [None, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_superpixels_keep_their_bits(method, vote, dtype):
    rgb = resize_cam(torch.rand(2, 3, 12, 16), (96, 128))
    cam, refiner = torch.rand(2, 3, 6, 8, dtype=dtype), Superpixels(method, vote=vote)
    assert refiner.segments(rgb)[0].max() > 3
    assert torch.equal(refiner(cam, captured(rgb)), superpixels_before(refiner, cam, rgb))


def test_superpixels_are_regions_of_one_scale():
    rgb, cam = resize_cam(torch.rand(1, 3, 12, 16), (96, 128)), torch.rand(1, 2, 6, 8)
    regions = Regions(Segments("felzenszwalb", (100,)), overlap="cut", largest=1.0)
    assert torch.equal(Superpixels("felzenszwalb")(cam, captured(rgb)), regions(cam, captured(rgb)))
    once = Regions(Segments("felzenszwalb", (100,)), largest=1.0)
    torch.testing.assert_close(once(cam, captured(rgb)), regions(cam, captured(rgb)))


def test_regions_stand_in_a_chain_behind_others():
    cam, capture = torch.rand(1, 2, 3, 4), Capture.of_picture(torch.rand(1, 3, ROWS, COLS))
    refiner = Regions(given_masks(box(0, 6, 0, 6)))
    both = chain(camkit.refiners.Normalize(), refiner)(cam, capture)
    assert torch.equal(both, refiner(camkit.normalize_cam(cam), capture))


def test_a_thousand_proposals_are_kept_as_runs():
    """Held in float32, they would take 750 MB."""
    labels = np.arange(375)[:, None] // 12 * 32 + np.arange(500) // 16
    masks = MaskRuns.of_labels(labels)
    assert len(masks) >= 1000
    assert sum(part.nbytes for part in (masks.starts, masks.ends, masks.owners)) < 2e6
