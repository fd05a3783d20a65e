"""Fitting over photos: what counts as an example, what the result is, what is refused."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hosts import shaken
from optional import open_clip
from torch import nn

import camkit
from camkit.cli import main
from camkit.cli.models import EMBEDDED, open_model
from camkit.data.embedded import demo_photos
from camkit.fitting import sure_patches
from camkit.method import split_refine
from camkit.pipeline import UnfittedClassWarning
from camkit.refiners import AtReducedSize, Normalize
from camkit.seeds import FittedSeed, TextClasses
from camkit.seeds.fitted import contested

VISION = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 64}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}


def words(prompts):
    """A tokenizer that gives every text its own numbers; the last is the largest, as in CLIP."""
    rows = [[1 + sum(map(ord, text[i : i + 4])) % 47 for i in range(0, 28, 4)] for text in prompts]
    return torch.tensor([[*row, 49] for row in rows])


SETTINGS = open_model(EMBEDDED).photos


@pytest.fixture(scope="module")
def opened():
    return open_model(EMBEDDED)


@pytest.fixture(scope="module")
def vocabulary(opened):
    return opened.vocabulary.subset(list(demo_photos().classes))


@pytest.fixture(scope="module")
def samples():
    return demo_photos().split()


@pytest.fixture(scope="module")
def pipeline(opened, vocabulary):
    return camkit.wrap(opened.model, vocabulary=vocabulary, photos=SETTINGS)


@pytest.fixture(scope="module")
def smooth(opened, vocabulary):
    """The same without the refiner that follows edges: its maps are on the patch grid."""
    return camkit.wrap(
        opened.model, vocabulary=vocabulary, photos=SETTINGS, refine=camkit.method.WITHOUT_EDGES
    )


def read_by(readout, opened, vocabulary):
    """The pipeline of `smooth` with a read-out."""
    chain = camkit.method.WITHOUT_EDGES
    return camkit.wrap(
        opened.model, vocabulary=vocabulary, photos=SETTINGS, readout=readout, refine=chain
    )


def labels_of(samples):
    return [list(sample.classes) for sample in samples]


@pytest.fixture(scope="module")
def readout(pipeline, samples):
    return camkit.fit(pipeline, [s.photo for s in samples], labels_of(samples))


def test_patches_far_from_the_background_score_are_examples():
    maps = torch.tensor([[0.9, 0.55, 0.1, 0.3], [0.0, 0.7, 0.2, 0.45]])
    assert sure_patches(maps, 0.5).tolist() == [0, 1, -1, -2]
    # the object of the second map may be anywhere
    maps[1] = 0.3
    assert sure_patches(maps, 0.5).tolist() == [0, -2, -2, -2]


def test_a_fit_counts_the_sure_patches_and_the_labels(smooth, samples, readout):
    counts, photos = torch.zeros(5), torch.zeros(4)
    for sample in samples:
        photo = smooth.prepare(sample.photo)
        stages = smooth.stages(photo.pixels, rgb=photo.rgb, classes=[list(sample.classes)])
        groups = sure_patches(stages.cam[0].flatten(1), stages.method.background_score)
        counts[0] += (groups == -1).sum()
        for slot, index in enumerate(sample.classes):
            counts[index + 1] += (groups == slot).sum()
            photos[index] += 1
    assert readout.classes == demo_photos().classes
    assert readout.photos == len(samples)
    assert readout.patches.count.tolist() == counts.tolist()
    assert readout.images.photos.tolist() == photos.tolist()


def test_read_outs_of_parts_add_up_to_that_of_all_photos(pipeline, samples, readout):
    parts = [
        camkit.fit(pipeline, [s.photo for s in part], labels_of(part))
        for part in (samples[:1], samples[1:])
    ]
    joined = sum(parts)
    order = [joined.classes.index(name) for name in readout.classes]
    rows = [0, *(place + 1 for place in order)]
    torch.testing.assert_close(joined.patches.count[rows], readout.patches.count)
    torch.testing.assert_close(
        joined.patches.product[rows], readout.patches.product, rtol=1e-4, atol=1e-2
    )


def test_fitted_maps_are_the_mean_of_first_maps_and_spread_evidence(
    opened, vocabulary, smooth, samples, readout
):
    sample = next(s for s in samples if len(s.classes) == 1)
    name = demo_photos().classes[sample.classes[0]]
    assert readout.knows(name)
    fitted = read_by(readout, opened, vocabulary)
    photo = smooth.prepare(sample.photo)
    plain = smooth.stages(photo.pixels, rgb=photo.rgb, classes=[list(sample.classes)])
    read = fitted.stages(photo.pixels, rgb=photo.rgb, classes=[list(sample.classes)])
    margins = readout.margins(plain.capture.patch_embeddings().detach(), [[name]])
    evidence = plain.capture.grid.fold((10 * margins).sigmoid())
    spread = camkit.Propagate(steps=1, blocks=6, balance=3)(evidence, plain.capture)
    wanted = (plain.cam + spread.clamp(0, 1)) / 2
    torch.testing.assert_close(read.cam, wanted, rtol=1e-4, atol=1e-5)
    assert read.method.background_score == 0.5
    assert read.unfitted == ((),)


def test_a_class_that_the_fit_never_saw_keeps_its_mask_and_is_named(
    opened, vocabulary, pipeline, samples
):
    cats = [s for s in samples if s.classes == (0,)]
    others = [s for s in samples if 0 not in s.classes]
    readout = camkit.fit(pipeline, [s.photo for s in others], labels_of(others))
    fitted = camkit.wrap(opened.model, vocabulary=vocabulary, photos=SETTINGS, readout=readout)
    with pytest.warns(UnfittedClassWarning, match='does not know "cat"'):
        result = fitted(cats[0].photo, classes="cat")
    assert result.unfitted == ("cat",)
    assert result.manifest()["unfitted"] == ["cat"]
    plain = pipeline(cats[0].photo, classes="cat")
    score = pipeline.method.background_score
    # stretching commutes with interpolation but for the kink at the score
    same = (result.mask == plain.mask).float().mean()
    assert same > 0.99
    assert (plain.cam > score).any()


def test_beside_an_unknown_class_unfitted_maps_decide_between_classes(
    opened, vocabulary, smooth, samples
):
    unknown, known = 1, 2  # a person and a cup
    others = [s for s in samples if unknown not in s.classes]
    readout = camkit.fit(smooth, [s.photo for s in others], labels_of(others))
    fitted = read_by(readout, opened, vocabulary)
    names = [[vocabulary.names[unknown], vocabulary.names[known]]]
    assert [readout.knows(name) for name in names[0]] == [False, True]
    photo = smooth.prepare(next(s.photo for s in samples if unknown in s.classes))
    asked = {"rgb": photo.rgb, "classes": [[unknown, known]]}
    seen = smooth.stages(photo.pixels, **asked)
    plain, read = seen.cam[0], fitted.stages(photo.pixels, **asked).cam[0]
    margins = readout.margins(seen.capture.patch_embeddings().detach(), names)
    evidence = seen.capture.grid.fold((10 * margins).sigmoid())
    spread = camkit.Propagate(steps=1, blocks=6, balance=3)(evidence, seen.capture)[0]
    raised = (plain[1] + spread[1].clamp(0, 1)) / 2
    score = smooth.method.background_score
    plain = torch.where(plain > score, (1 + (plain - score) / (1 - score)) / 2, plain / score / 2)
    stronger = plain[0] > plain[1]
    assert (raised > plain[1] + 1e-2)[stronger].any()  # what must not happen
    wanted = torch.where(stronger, plain[1], raised)
    torch.testing.assert_close(read[1], wanted, rtol=0, atol=1e-4)
    wanted = torch.where(stronger, plain[0], plain[0] * (wanted / plain[1]).clamp_max(1))
    torch.testing.assert_close(read[0], wanted, rtol=0, atol=1e-4)
    # patches where the unknown class is stronger, where it is weaker, and where evidence agrees
    unfitted = torch.tensor([[0.8, 0.6, 0.3], [0.6, 0.8, 0.7]])[None, :, None]
    evident = torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.4, 0.8]])[None, :, None]
    is_known = torch.tensor([False, True])[None, :, None, None]
    found = contested(evident, unfitted, is_known, ~is_known)[0, :, 0]
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.3, 0.3], [0.6, 0.4, 0.8]]))


def test_photos_without_labels_count_by_confident_guesses(pipeline, samples):
    photo = pipeline.prepare(samples[0].photo)
    outputs = pipeline.stages(photo.pixels, rgb=photo.rgb).capture.outputs
    scores = outputs.detach().softmax(1)
    members = pipeline.vocabulary.members
    sure = [c for c, held in enumerate(members) if float(scores[0, list(held)].sum()) >= 0.5]
    readout = camkit.fit(pipeline, [samples[0].photo, samples[1].photo], [None, samples[1].classes])
    named = {pipeline.vocabulary.names[c] for c in (*sure, *samples[1].classes)}
    assert set(readout.classes) == named
    with pytest.raises(ValueError, match="no photo has a class"):
        camkit.fit(pipeline, [samples[0].photo], [[]])


def test_edges_do_not_change_the_fit_and_follow_the_fitted_maps(
    opened, vocabulary, samples, readout
):
    crf = AtReducedSize(camkit.DenseCRF(background_score=0.5), scale=0.5)
    chain = (*camkit.method.WITHOUT_EDGES, crf)
    sharp = camkit.wrap(opened.model, vocabulary=vocabulary, photos=SETTINGS, refine=chain)
    again = camkit.fit(sharp, [s.photo for s in samples], labels_of(samples))
    assert again.digest == readout.digest
    assert again.origin == readout.origin
    assert split_refine(chain) == (camkit.method.WITHOUT_EDGES, (crf,))
    with_edges = camkit.wrap(
        opened.model, vocabulary=vocabulary, photos=SETTINGS, refine=chain, readout=readout
    )
    assert with_edges.method.refine == (crf,)
    assert isinstance(with_edges.method.seed, FittedSeed)


def test_another_model_method_or_view_is_refused(opened, vocabulary, pipeline, samples, readout):
    arguments = {"vocabulary": vocabulary, "photos": SETTINGS, "readout": readout}
    with pytest.raises(ValueError, match="does not fit: the method differs"):
        camkit.wrap(opened.model, seed=camkit.GradientSeed(), **arguments)
    with pytest.raises(ValueError, match="does not fit: the method differs"):
        camkit.wrap(opened.model, refine=Normalize(mode="minmax"), **arguments)
    with pytest.raises(ValueError, match="leave out `views`"):
        camkit.wrap(opened.model, views=camkit.Views(flip=True), **arguments)
    other = open_model(EMBEDDED).model
    camkit.wrap(other, **arguments)
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="does not fit: the hash of the weights differs"):
        camkit.wrap(other, **arguments)
    fitted = camkit.wrap(opened.model, **arguments)
    with pytest.raises(ValueError, match="without read-out"):
        camkit.fit(fitted, [samples[0].photo], [[0]])
    with pytest.raises(ValueError, match="each of the 2 photos, got 1"):
        camkit.fit(pipeline, [samples[0].photo] * 2, [[0]])


def test_a_benchmark_adds_the_row_of_a_read_out(opened, vocabulary, readout):
    rows = camkit.bench.standard_variants()
    row = camkit.bench.fitted_variant(rows, readout, opened.model)
    assert (row.name, row.base) == ("default, fitted", rows[-1])
    asked = camkit.wrap(opened.model, vocabulary=vocabulary, photos=SETTINGS, readout=readout)
    assert row.method == asked.method
    smooth = [each for each in rows if each.name == "hybrid + balanced propagation"]
    row = camkit.bench.fitted_variant(smooth, readout, opened.model)
    assert (row.base, row.method.refine) == (smooth[0], ())
    with pytest.raises(ValueError, match="does not fit: the method differs"):
        camkit.bench.fitted_variant(rows[:6], readout, opened.model)
    with pytest.raises(ValueError, match="no row with refiners"):
        camkit.bench.fitted_variant(rows[:1], readout, opened.model)


def test_a_copy_in_half_precision_takes_the_read_out(opened, vocabulary, readout):
    half = open_model(EMBEDDED).model.half()
    camkit.wrap(half, vocabulary=vocabulary, photos=SETTINGS, readout=readout)


def test_the_model_stays_as_it_is(opened, vocabulary, samples):
    model = open_model(EMBEDDED).model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    camkit.fit(
        camkit.wrap(model, vocabulary=vocabulary, photos=SETTINGS), [samples[0].photo], [[0]]
    )
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Pooled(nn.Module):
    """A model without class token, whose classifier reads the mean of the patches."""

    def __init__(self) -> None:
        super().__init__()
        settings = {"embed_dim": 32, "depth": 6, "num_heads": 2, "img_size": 64, "patch_size": 8}
        self.net = timm.models.VisionTransformer(
            **settings, num_classes=3, class_token=False, global_pool="avg"
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.net(pixels)


def test_pooled_patches_are_fitted_as_well():
    torch.manual_seed(0)
    settings = camkit.photo.PhotoSettings(size=64, multiple=64)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    pipeline = camkit.wrap(Pooled().eval(), photos=settings, vocabulary=["a", "b", "c"])
    readout = camkit.fit(pipeline, pictures, [["a"], ["b", "c"], [0]])
    assert readout.classes == ("a", "b", "c")
    assert readout.images.photos.tolist() == [2, 1, 1]


def test_the_command_line_fits_joins_and_reads(tmp_path: Path, capsys, samples):
    folder = tmp_path / "photos"
    folder.mkdir()
    for sample in samples:
        (folder / sample.photo.name).symlink_to(sample.photo)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(demo_photos().classes))
    files = [str(tmp_path / f"{part}.safetensors") for part in ("cat", "all", "both")]
    model = ["--model", EMBEDDED, "--vocabulary", str(names)]
    fit = ["fit", str(folder), *model]
    assert main([*fit, "--classes", "cat", "--out", files[0]]) == 0
    assert main([*fit, "--out", files[1]]) == 0
    assert "Readout(" in capsys.readouterr().out
    assert main(["fit", "--join", files[0], files[0], "--out", files[2]]) == 0
    assert camkit.Readout.load(files[2]).photos == 2 * len(samples)
    assert camkit.Readout.load(files[0]).classes == ("cat",)
    cat = next(str(s.photo) for s in samples if s.classes == (0,))
    out = ["--model", EMBEDDED, "--out", str(tmp_path / "cam")]
    assert main(["cam", cat, "--classes", "cat", "--readout", files[0], *out]) == 0
    text = next((tmp_path / "cam").rglob("manifest.json")).read_text()
    assert "FittedSeed" in text
    assert main(["fit", "--out", files[2]]) == 1
    assert "either INPUT or --join" in capsys.readouterr().err


def test_classes_of_clip_are_fitted_by_their_texts():
    model = shaken(open_clip.model.CLIP(16, VISION, TEXT))
    texts = TextClasses.from_prompts(model, ["cat", "dog"], tokenize=words, background=("sky",))
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(3)]
    arguments = {
        "photos": camkit.photo.PhotoSettings(size=64, multiple=64),
        "call": lambda model, pixels: model.encode_image(pixels),
    }
    labels = [["cat"], [1], ["cat", "dog"]]
    readout = camkit.fit(camkit.wrap(model, **arguments), pictures, labels, vocabulary=texts)
    assert readout.classes == ("cat", "dog")
    assert readout.images.photos.tolist() == [2, 2]
    fitted = camkit.wrap(model, readout=readout, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfittedClassWarning)  # noise shows no cat
        result = fitted(pictures[0], classes=texts)
    assert result.names == ("cat", "dog")
    assert set(result.unfitted) == {name for name in result.names if not readout.knows(name)}
