"""Read-outs: what their sums solve, add up to, know, and refuse."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from camkit import Readout
from camkit.errors import DataError
from camkit.readout import ImageMoments, Moments, Origin

ORIGIN = Origin("Net", "0" * 64, "{}")
RNG = np.random.default_rng(0)
BACKGROUND, CAT, DOG = (torch.tensor(RNG.normal(m, 1.0, (400, 3))) for m in (-2.0, 2.0, 3.0))


def readout_of(
    patches: dict[str, torch.Tensor], *, background: torch.Tensor = BACKGROUND, photos: int = 10
) -> Readout:
    """A read-out of given patches; its photos have one class each, in turn."""
    names = tuple(patches)
    groups = [background, *patches.values()]
    sums = [Moments.of(g).spread_to([i], len(groups)) for i, g in enumerate(groups)]
    images = ImageMoments.none(len(names), 3)
    for photo in range(photos):
        label = photo % len(names)
        images = images + ImageMoments.of(groups[label + 1][photo % 400], [label], len(names))
    return Readout(names, sum(sums[1:], sums[0]), images, photos, ORIGIN)


def test_classes_of_few_photos_share_a_column() -> None:
    patches = {"cat": CAT, "dog": DOG, "cow": -CAT}
    tokens, names = torch.zeros(1, 1, 3).double(), [["cat", "dog", "cow"]]
    own = replace(readout_of(patches, photos=30), form="classes")
    assert len(set(own._margins(tokens)[0, 0].tolist())) == 3
    few = replace(readout_of(patches, photos=29), form="classes")  # one shows 9 cows
    assert few._margins(tokens).shape[-1] == 3  # a column for cows alone, as the only rare class
    fewer = replace(readout_of(patches, photos=28), form="classes")
    margins = fewer.margins(tokens, names)[0, :, 0].tolist()
    assert fewer._margins(tokens).shape[-1] == 2
    assert margins[1] == fewer._margins(tokens)[0, 0, 1] != margins[0]


def test_the_solution_is_that_of_ridge_regression_on_the_patches_themselves() -> None:
    readout = replace(readout_of({"cat": CAT, "dog": DOG[:250]}, photos=20), form="classes")
    features = torch.cat([BACKGROUND, CAT, DOG[:250]])
    groups = torch.tensor([0] * 400 + [1] * 400 + [2] * 250)
    weight = torch.tensor([400**-0.5, 400**-0.5, 250**-0.5]).double()
    weight = (weight / weight.mean())[groups]
    # a penalty on the deviations from the weighted mean, as rows that are added to the equations
    mean = (weight[:, None] * features).sum(0) / weight.sum()
    target = torch.nn.functional.one_hot(groups).double()
    aim = (weight[:, None] * target).sum(0) / weight.sum()
    rows = weight.sqrt()[:, None] * (features - mean)
    penalty = 0.1 * (rows**2).sum() / 3
    stacked = torch.cat([rows, penalty.sqrt() * torch.eye(3).double()])
    wanted = torch.cat([weight.sqrt()[:, None] * (target - aim), torch.zeros(3, 3).double()])
    solved = torch.linalg.lstsq(stacked, wanted).solution
    scores = (DOG - mean) @ solved + aim
    margins = readout.margins(DOG[None], [["dog", "cat"]])[0]
    torch.testing.assert_close(margins[0], scores[:, 2] - scores[:, 0])
    torch.testing.assert_close(margins[1], scores[:, 1] - scores[:, 0])


def test_one_column_joins_the_classes_and_reads_them_alike() -> None:
    readout = readout_of({"cat": CAT, "dog": DOG})
    joined = readout_of({"animal": torch.cat([CAT, DOG])})
    assert not readout.by_class
    margins = readout.margins(DOG[None], [["cat", "dog"]])[0]
    torch.testing.assert_close(margins[0], margins[1])
    torch.testing.assert_close(margins[:1], joined.margins(DOG[None], [["animal"]])[0])


def test_the_form_follows_the_number_of_photos_unless_it_is_stated() -> None:
    assert not readout_of({"cat": CAT}, photos=99).by_class
    assert readout_of({"cat": CAT}, photos=100).by_class
    assert not replace(readout_of({"cat": CAT}, photos=100), form="object").by_class


def test_sums_of_two_sets_are_the_sums_of_all_photos() -> None:
    whole = readout_of({"cat": CAT, "dog": DOG}, photos=12)
    first = readout_of({"cat": CAT[:100]}, background=BACKGROUND[:30], photos=0)
    second = readout_of({"dog": DOG, "cat": CAT[100:]}, background=BACKGROUND[30:], photos=0)
    joined = sum([first, second])
    assert isinstance(joined, Readout)
    assert joined.classes == ("cat", "dog")
    torch.testing.assert_close(joined.patches.count, whole.patches.count)
    torch.testing.assert_close(joined.patches.total, whole.patches.total)
    torch.testing.assert_close(joined.patches.product, whole.patches.product)
    assert (whole + whole).photos == 24
    torch.testing.assert_close((whole + whole).images.labelled, 2 * whole.images.labelled)


def test_classes_without_patches_or_that_look_like_background_are_not_known() -> None:
    hidden = torch.tensor(RNG.normal(-2.0, 1.0, (100, 3)))
    readout = readout_of({"cat": CAT, "fog": hidden, "rare": DOG[:49], "none": DOG[:0]}, photos=0)
    assert [readout.knows(name) for name in readout.classes] == [True, False, False, False]
    assert not readout.knows("never seen")
    margins = readout.margins(CAT[None], [["cat", "fog"]])
    assert margins[0, 0].abs().sum() > 0
    assert not margins[0, 1].any()


def test_the_share_read_as_object_is_that_of_normal_margins() -> None:
    readout = readout_of({"cat": CAT, "fog": torch.tensor(RNG.normal(-0.5, 1.0, (5000, 3)))})
    joined = replace(readout, form="classes")
    margins = joined.margins(CAT[None], [["cat"]])[0, 0]
    assert joined.shares["cat"] == pytest.approx(float((margins > 0).double().mean()), abs=0.02)
    share = 0.5 * (1 + math.erf(float(margins.mean() / margins.std(correction=0)) / math.sqrt(2)))
    assert joined.shares["cat"] == pytest.approx(share, abs=1e-6)


def test_the_classifier_is_ridge_regression_of_the_labels() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")

    vectors = torch.cat([CAT[:60], DOG[:60]])
    labels = torch.zeros(120, 2).double()
    labels[:60, 0], labels[60:, 1], labels[50:70] = 1, 1, 1
    images = ImageMoments.none(2, 3)
    for vector, row in zip(vectors, labels, strict=True):
        images = images + ImageMoments.of(vector, row.nonzero()[:, 0].tolist(), 2)
    readout = replace(readout_of({"cat": CAT, "dog": DOG}), images=images, photos=120)
    centred = vectors - vectors.mean(0)
    ridge = linear_model.Ridge(alpha=float((centred**2).sum() / 3)).fit(
        vectors.numpy(), labels.numpy()
    )
    scores = readout.class_scores(DOG[None], [["dog"]])[0, 0]
    np.testing.assert_allclose(scores.numpy(), ridge.predict(DOG.numpy())[:, 1], atol=1e-9)
    assert readout.has_classifier("cat")
    assert not readout.has_classifier("cow")
    assert not replace(readout, form="object").has_classifier("cat")


def test_a_saved_read_out_is_the_same(tmp_path: object) -> None:
    readout = readout_of({"cat": CAT, "dog": DOG}, photos=100)
    path = readout.save(f"{tmp_path}/sub/readout.safetensors")
    loaded = Readout.load(path)
    assert repr(loaded) == repr(readout)
    assert loaded.origin == ORIGIN
    for name, tensor in readout._tensors().items():
        assert torch.equal(loaded._tensors()[name], tensor), name


def test_read_outs_of_another_origin_are_refused() -> None:
    readout = readout_of({"cat": CAT})
    for other in (replace(ORIGIN, weights="1" * 64), replace(ORIGIN, method='{"seed": 1}')):
        with pytest.raises(ValueError, match="do not add up"):
            readout + replace(readout, origin=other)
    assert (readout + replace(readout, origin=replace(ORIGIN, weights=""))).photos == 20
    with pytest.raises(ValueError, match="3 channels, this model has 4"):
        readout.margins(torch.zeros(1, 2, 4), [["cat"]])


def test_files_that_hold_no_read_out_are_refused(tmp_path: object) -> None:
    good = readout_of({"cat": CAT}).save(f"{tmp_path}/good.safetensors")
    with pytest.raises(DataError, match="cannot be read"):
        Readout.load(f"{tmp_path}/missing.safetensors")
    save_file({"a": torch.zeros(1)}, f"{tmp_path}/other.safetensors")
    with pytest.raises(DataError, match="holds no read-out"):
        Readout.load(f"{tmp_path}/other.safetensors")
    from safetensors import safe_open

    with safe_open(str(good), framework="pt") as file:
        facts = file.metadata()
    broken = {
        "short": lambda t: t | {"patches.total": t["patches.total"][:1]},
        "nan": lambda t: t | {"patches.total": t["patches.total"] * math.nan},
        "single": lambda t: t | {"patches.count": t["patches.count"].float()},
        "missing": lambda t: {name: t[name] for name in t if name != "images.photos"},
    }
    for name, change in broken.items():
        path = f"{tmp_path}/{name}.safetensors"
        save_file(change(load_file(good)), path, metadata=facts)
        with pytest.raises(DataError, match="holds no read-out"):
            Readout.load(path)
