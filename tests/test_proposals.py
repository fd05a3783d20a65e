"""Files of mask proposals: each form as its tool writes it, damaged files, and the command line."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from small_runs import CLASSES, OpenSmall, small_recipe, write_photos

import camkit
from camkit.bench.cache import fingerprint
from camkit.bulk.running import run
from camkit.capture import Capture
from camkit.cli import main
from camkit.data import ProposalFolder, read_cam, read_proposals, write_shapes
from camkit.errors import DataError
from camkit.method import read_refiners, read_regions
from camkit.ops.mask_runs import MaskRuns
from camkit.photo import read_picture
from camkit.refiners import AtReducedSize, Regions, Segments
from camkit.vocabulary import Vocabulary

SIZE = (6, 9)


def masks(count=3, rng_seed=0, size=SIZE):
    return np.random.default_rng(rng_seed).random((count, *size)) < 0.4


def counts_by_hand(mask):
    """COCO: alternating runs outside and inside, down the columns."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def encoded(mask):
    return {"size": list(mask.shape), "counts": counts_by_hand(mask)}


# Runs


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), rows=st.integers(1, 8))
@settings(deadline=None)
def test_masks_come_back_from_runs(seed, share, rows):
    rng = np.random.default_rng(seed)
    actual = rng.random((3, rows, 5)) < share
    runs = MaskRuns.of(actual, (rows, 5))
    assert np.array_equal(runs.dense(), actual)
    assert runs.areas.tolist() == actual.sum((1, 2)).tolist()
    from_coco = MaskRuns.of([encoded(mask) for mask in actual], (rows, 5))
    assert np.array_equal(from_coco.dense(), actual)
    chosen = np.array([True, False, True])
    assert np.array_equal(runs.kept(chosen).dense(), actual[chosen])


def test_a_run_that_goes_on_in_the_next_column_is_encoded():
    mask = np.zeros((3, 3), bool)
    mask[2, 0] = mask[0, 1] = True  # pixels 2 and 3 down the columns
    assert np.array_equal(MaskRuns.of_mask(mask).dense()[0], mask)
    joined = MaskRuns.of_coco({"size": [3, 3], "counts": [2, 2, 5]})
    assert np.array_equal(joined.dense()[0], mask)


def test_labels_are_masks_in_the_order_of_their_values_and_negative_ones_none():
    labels = np.array([[4, 4, -1], [0, 4, 7]])
    runs = MaskRuns.of_labels(labels)
    assert np.array_equal(runs.dense(), [labels == 0, labels == 4, labels == 7])


def test_pieces_are_the_sets_of_masks_of_each_pixel():
    actual = masks(5)
    pieces = MaskRuns.of(actual, SIZE).pieces().numpy()
    sets = {}
    for place in np.ndindex(*SIZE):
        sets.setdefault(tuple(actual[(slice(None), *place)]), set()).add(int(pieces[place]))
    assert sets.pop((False,) * 5) == {-1}
    assert all(len(numbers) == 1 for numbers in sets.values())
    assert len(set.union(*sets.values())) == len(sets) == pieces.max() + 1
    assert (MaskRuns.of([], SIZE).pieces() == -1).all()
    assert MaskRuns.of([np.ones(SIZE, bool)], SIZE).pieces().unique().tolist() == [0]


def test_the_top_mask_is_the_last_of_the_order():
    actual = masks(4)
    order = np.array([2, 0, 3, 1])
    expected = np.full(SIZE, -1)
    for mask in order:
        expected[actual[mask]] = mask
    assert np.array_equal(MaskRuns.of(actual, SIZE).top(order), expected)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 60), share=st.floats(0, 1))
@settings(deadline=None)
def test_compressed_counts_are_read_as_pycocotools_writes_them(seed, rows, share):
    tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, 40)) < share
    mask[:, 10:30] = rng.random() < 0.5  # long runs, too
    written = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    for counts in (written["counts"], written["counts"].decode()):
        runs = MaskRuns.of_coco({"size": written["size"], "counts": counts})
        assert np.array_equal(runs.dense()[0], mask)
    assert MaskRuns.of_coco(encoded(mask)).areas[0] == tools.area(written)


def test_compressed_counts_are_read_by_hand():
    """5, 3, 37, 4 - 3 = 1, 5 - 37 = -32: bits of 5, "0" is zero, bit 5 says that more follows."""
    text = "53" + chr(48 + (37 & 31 | 32)) + "11" + chr(48 + 32) + chr(48 + 31)
    counts = [5, 3, 37, 4, 5]
    rows = sum(counts)
    runs = MaskRuns.of_coco({"size": [rows, 1], "counts": text})
    assert (runs.starts.tolist(), runs.ends.tolist()) == ([5, 45], [8, 49])
    assert np.array_equal(
        runs.dense(), MaskRuns.of_coco({"size": [rows, 1], "counts": counts}).dense()
    )


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        ({"counts": [54]}, r"`size` must be \[rows, columns\], got None"),
        ({"size": [6, 9.0], "counts": [54]}, r"`size` must be \[rows, columns\], got \[6, 9.0\]"),
        ({"size": [0, 9], "counts": []}, r"`size` must be \[rows, columns\], got \[0, 9\]"),
        ({"size": [6, 9], "counts": [50]}, "must add up to the 54 pixels of 6x9, .* sum of 50"),
        ({"size": [6, 9], "counts": [60, -6]}, "without negative numbers, got a sum of 54"),
        ({"size": [2, 2], "counts": [2**62] * 4 + [4]}, "got a sum of 1.84"),
        ({"size": [6, 9], "counts": [5.5]}, "must be a list of whole numbers, or text, got float"),
        ({"size": [6, 9], "counts": [[5], [5, 6]]}, "list of whole numbers, or text, got list"),
        ({"size": [6, 9]}, "must be a list of whole numbers, or text, got NoneType"),
        ({"size": [6, 9], "counts": "é"}, "must be ASCII characters"),
        ({"size": [6, 9], "counts": "5 "}, "damaged: a character or the end does not fit"),
        ({"size": [6, 9], "counts": "5P"}, "damaged: a character or the end does not fit"),
        ({"size": [6, 9], "counts": "P" * 12 + "0"}, "a number has more than 40 bits"),
    ],
)
def test_damaged_encodings_are_refused(damaged, words):
    with pytest.raises(ValueError, match=words):
        MaskRuns.of_coco(damaged)


# Files


def write_json(folder, actual):
    (folder / "a.json").write_text(json.dumps([encoded(mask) for mask in actual]))


def write_generator(folder, actual):
    """As segment-anything's amg.py with --convert-to-rle."""
    dicts = [
        {"segmentation": encoded(m), "area": int(m.sum()), "bbox": [0, 0, 1, 1], "id": place}
        for place, m in enumerate(actual)
    ]
    (folder / "a.json").write_text(json.dumps(dicts))


def write_annotations(folder, actual):
    """As the files of SA-1B."""
    annotations = [{"segmentation": encoded(mask), "predicted_iou": 0.9} for mask in actual]
    (folder / "a.json").write_text(json.dumps({"image": {}, "annotations": annotations}))


def write_pngs(folder, actual):
    """As segment-anything's amg.py."""
    (folder / "a").mkdir()
    (folder / "a" / "metadata.csv").write_text("id,area\n")
    for place, mask in enumerate(actual):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "a" / f"{place}.png")


def write_npy(folder, actual):
    np.save(folder / "a.npy", actual)


def write_npz(folder, actual):
    np.savez_compressed(folder / "a.npz", masks=actual)


WRITERS = [write_json, write_generator, write_annotations, write_pngs, write_npy, write_npz]


@pytest.mark.parametrize("write", WRITERS)
def test_masks_are_read_in_every_form(tmp_path, write):
    actual = masks(12)
    write(tmp_path, actual)
    assert np.array_equal(ProposalFolder(tmp_path).of_photo("a").dense(), actual)


@pytest.mark.parametrize("suffix", [".png", ".npy", ".npz"])
@pytest.mark.parametrize("unlabelled", [None, 0])
def test_label_images_are_read(tmp_path, suffix, unlabelled):
    labels = np.random.default_rng(0).integers(0, 4, SIZE).astype(np.uint8)
    if suffix == ".png":
        Image.fromarray(labels).save(tmp_path / "a.png")
    else:
        {".npy": np.save, ".npz": np.savez}[suffix](tmp_path / f"a{suffix}", labels)
    found = ProposalFolder(tmp_path, unlabelled).of_photo("a").dense()
    assert np.array_equal(found, [labels == value for value in range(unlabelled is not None, 4)])


def test_names_may_hold_folders_and_dots(tmp_path):
    (tmp_path / "v1.5").mkdir()
    np.save(tmp_path / "v1.5" / "a.b.npy", masks())
    assert len(ProposalFolder(tmp_path).of_photo("v1.5/a.b")) == 3


def test_a_folder_stays_the_same_in_another_working_directory(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", masks())
    monkeypatch.chdir(tmp_path)
    folder = ProposalFolder(".")
    monkeypatch.chdir("/")
    assert len(folder.of_photo("a")) == 3


@pytest.mark.parametrize("write", [write_json, write_pngs])
def test_a_photo_without_any_mask_has_none(tmp_path, write):
    write(tmp_path, [])
    assert len(ProposalFolder(tmp_path).of_photo("a")) == 0


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def put_array(name, array):
    return lambda folder: np.save(folder / name, array, allow_pickle=True)


def put_pngs(*arrays):
    def write(folder):
        (folder / "a").mkdir()
        for place, array in enumerate(arrays):
            Image.fromarray(array).save(folder / "a" / f"{place}.png")

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            lambda _: None,
            "has no proposals of a: neither a folder of that name nor a file end",
        ),
        (put("a.jpg", b""), "has no proposals of a"),
        (put("a.pkl", pickle.dumps(Trap())), "has no proposals of a"),
        (put("a.json", b"{"), "a.json is not JSON"),
        (put("a.json", b"[" * 100_000), "a.json cannot be read: .*nested too deeply"),
        (put("a.json", b"3"), "must hold a list of masks: dicts with a COCO encoding"),
        (put("a.json", b'{"annotations": 3}'), "must hold a list of masks"),
        (
            put("a.json", b'[{"segmentation": [[1, 2, 3, 4, 5, 6]]}]'),
            "proposals in place 0 must hold .*, got list; polygons and boxes have to be drawn",
        ),
        (
            put("a.json", b'[{"size": [6, 9], "counts": [3]}]'),
            "a.json: .*place 0: `counts` must ad",
        ),
        (put("a.npy", pickle.dumps(Trap())), "a.npy is no .npy, .npz or safetensors file"),
        (
            put_array("a.npy", np.array([Trap()])),
            "a.npy cannot be read .*holds a pickle, which could run code",
        ),
        (put("a.npz", b"PK\x03\x04"), "a.npz cannot be read"),
        (
            put_array("a.npy", np.zeros(SIZE)),
            "a.npy: proposals must hold bool masks .*, got float64",
        ),
        (put("a.png", b"no picture"), "a.png cannot be read as an image"),
        (put_pngs(np.zeros((*SIZE, 3), np.uint8)), "0.png is of mode RGB; expected a grey mask"),
        (put_pngs(np.arange(54, dtype=np.uint8).reshape(SIZE)), "one other value inside, got 54"),
        (
            put_pngs(np.zeros(SIZE, np.uint8), np.zeros((2, 2), np.uint8)),
            "a: proposals must all have the size of the picture, got 6x9 .* and 2x2 .*in place 1",
        ),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path, write, words):
    write(tmp_path)
    with pytest.raises(DataError, match=words):
        ProposalFolder(tmp_path).of_photo("a")


@pytest.mark.parametrize("name", ["0.jpg", "0.npy", "mask"])
def test_a_folder_of_other_files_is_not_taken_for_no_masks(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"holds {name}, but no masks as PNG files; convert them"):
        ProposalFolder(tmp_path).of_photo("a")


def test_hidden_files_of_a_folder_are_no_masks(tmp_path):
    write_pngs(tmp_path, masks())
    (tmp_path / "a" / "._0.png").write_bytes(b"of a file manager")
    (tmp_path / "a" / "metadata.csv").write_text("id,area")  # of amg.py
    assert len(ProposalFolder(tmp_path).of_photo("a")) == 3


def test_a_photo_may_have_the_name_of_a_folder_of_photos(tmp_path):
    write_json(tmp_path, masks())
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "b.npy", masks(2))
    folder = ProposalFolder(tmp_path)
    assert [len(folder.of_photo(key)) for key in ("a", "a/b")] == [3, 2]


def test_two_files_of_one_photo_are_refused(tmp_path):
    write_npy(tmp_path, masks())
    write_json(tmp_path, masks())
    with pytest.raises(DataError, match=r"has a.json and a.npy; keep only one of them"):
        ProposalFolder(tmp_path).of_photo("a")


def test_two_arrays_in_a_file_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", masks=masks(), others=masks())
    with pytest.raises(
        DataError, match="must hold one array of masks or labels, got masks, others"
    ):
        read_proposals(tmp_path / "a.npz")


def test_a_lost_folder_and_another_ending_are_refused(tmp_path):
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"mask is not a folder; did you mean .*masks\?"):
        ProposalFolder(tmp_path / "mask")
    with pytest.raises(DataError, match=r"must be a folder of PNG masks or end in \.json"):
        read_proposals(tmp_path / "a.txt")


# Words


@pytest.mark.parametrize(
    ("text", "refiner"),
    [
        ("regions", Regions()),
        ("regions:slic", Regions("slic")),
        ("regions:rule=sepl,overlap=cut", Regions(rule="sepl", overlap="cut")),
        ("regions:felzenszwalb,scales=50x200", Regions(Segments("felzenszwalb", (50.0, 200.0)))),
        ("regions:slic,scales=80,sigma=1", Regions(Segments("slic", (80.0,), sigma=1.0))),
        ("regions:slic,compactness=5", Regions(Segments("slic", compactness=5.0))),
        ("regions:least=20", Regions(Segments("felzenszwalb", least=20))),
    ],
)
def test_words_are_the_regions_they_describe(text, refiner):
    assert read_refiners([text]) == (refiner,)


def test_a_folder_in_words_is_that_of_the_option(tmp_path):
    (step,) = read_refiners([f"regions:folder={tmp_path},rule=vote,unlabelled=0"])
    assert step == Regions(ProposalFolder(tmp_path, 0), rule="vote")
    assert step == read_regions(tmp_path, "rule=vote,unlabelled=0")


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("slic,folder={}", "a folder has no setting proposals; omit one of them"),
        ("folder={},scales=50", "a folder has no setting scales"),
        ("unlabelled=255", "unlabelled is a value in files; add folder=DIR"),
        ("rule=median", r"rule must be mean\|vote\|sepl, got 'median'"),
        ("sides=3", "'sides=3' is no setting of regions; its settings are .*folder=STR"),
    ],
)
def test_words_that_do_not_go_together_are_refused(tmp_path, written, words):
    with pytest.raises(ValueError, match=words):
        read_refiners(["regions:" + written.format(tmp_path)])


def test_files_keep_the_size_of_the_photo_where_the_picture_is_reduced(tmp_path):
    np.save(tmp_path / "a.npy", masks())
    regions = Regions(ProposalFolder(tmp_path))
    capture = Capture.of_picture(torch.rand(1, 3, *SIZE), keys=["a"])
    cam = torch.rand(1, 1, 3, 3)
    known = replace(capture, sizes=(SIZE,))
    half = AtReducedSize(regions, scale=0.5)
    assert torch.equal(half(cam, capture), half(cam, known))


def test_results_of_files_are_never_cached(tmp_path):
    assert fingerprint(Regions("slic")) is not None
    assert fingerprint(Regions(ProposalFolder(tmp_path))) is None  # the files may change


# Commands


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), 4, size=(48, 64))


@pytest.fixture
def work(shapes, tmp_path):
    """Coarse maps of the true shapes, and the true segments as proposals."""
    for folder in ("cams", "masks"):
        (tmp_path / folder).mkdir()
    for sample in (*shapes.split("train"), *shapes.split("val")):
        ids = np.array(Image.open(sample.mask))
        truth = torch.stack([torch.from_numpy(ids == index + 1) for index in sample.classes])
        small = torch.nn.functional.avg_pool2d(truth[None].float(), 8)
        cam = camkit.resize_cam(small, (48, 64))[0].clamp(0, 1).numpy()
        content = dict(zip(sample.classes, cam, strict=True))
        np.save(tmp_path / "cams" / f"{sample.name}.npy", content)
        dicts = [{"segmentation": encoded(ids == value)} for value in np.unique(ids)]
        (tmp_path / "masks" / f"{sample.name}.json").write_text(json.dumps(dicts))
    return tmp_path


def refine(shapes, work, *options, out="out", workers=0):
    photos = shapes.root / "JPEGImages"
    arguments = ["refine", work / "cams", "--images", photos, "--out", work / out]
    return main([str(each) for each in (*arguments, "--workers", workers, *options)])


def test_true_segments_in_files_give_true_masks(shapes, work):
    options = ["--regions", work / "masks", "--region-settings", "rule=sepl,background_score=0.4"]
    assert refine(shapes, work, *options) == 0
    masks = ["mask", work / "out", "--out", work / "drawn", "--background-score", 0.5]
    assert main([str(each) for each in (*masks, "--workers", 0)]) == 0
    for sample in (*shapes.split("train"), *shapes.split("val")):
        drawn = np.array(Image.open(work / "drawn" / f"{sample.name}.png"))
        assert np.array_equal(drawn, np.array(Image.open(sample.mask)))


def test_the_command_refines_as_python_does_behind_other_steps(shapes, work):
    assert refine(shapes, work, "--refine", "blur:2", "--regions", work / "masks") == 0
    sample = shapes.split("train")[0]
    rgb = torch.from_numpy(read_picture(sample.photo)).permute(2, 0, 1)[None] / 255
    cam = read_cam(work / "cams" / f"{sample.name}.npy").cam[None]
    both = camkit.chain(camkit.refiners.Blur(2.0), Regions(ProposalFolder(work / "masks")))
    expected = both(cam, Capture.of_picture(rgb, keys=[sample.name]))[0]
    assert torch.equal(read_cam(work / "out" / f"{sample.name}.npy").cam, expected.clamp(0, 1))


@pytest.mark.slow
def test_worker_processes_write_the_same_bytes(shapes, work):
    for workers in (0, 2):
        words = f"regions:folder={work / 'masks'},rule=vote"
        assert refine(shapes, work, "--refine", words, out=f"o{workers}", workers=workers) == 0
    for path in (work / "o0").glob("*.npy"):
        assert path.read_bytes() == (work / "o2" / path.name).read_bytes()


def test_a_photo_without_proposals_fails_alone_and_is_done_later(shapes, work, capsys):
    lost = work / "masks" / f"{shapes.split('train')[0].name}.json"
    content = lost.read_text()
    lost.unlink()
    assert refine(shapes, work, "--regions", work / "masks") == 1
    assert f"has no proposals of {lost.stem}" in capsys.readouterr().err
    assert len(list((work / "out").glob("*.npy"))) == 3
    lost.write_text(content)
    assert refine(shapes, work, "--regions", work / "masks") == 0
    assert "1 CAM files written, 3 existed already" in capsys.readouterr().out


def test_a_run_is_continued_with_the_same_settings_only(shapes, work, capsys):
    options = ["--regions", work / "masks"]
    assert refine(shapes, work, *options) == 0
    assert "ProposalFolder" in json.loads((work / "out" / "settings.json").read_text())["job"]
    assert refine(shapes, work, *options) == 0
    assert "4 existed already" in capsys.readouterr().out
    assert refine(shapes, work, *options, "--region-settings", "rule=vote") == 1
    assert "holds results of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing says how to refine; give steps (--refine), mask proposals"),
        (["--refine", "blur", "--region-settings", "rule=vote"], "add --regions FOLDER, or omit"),
        (["--regions", "lost"], "lost is not a folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(shapes, work, capsys, options, words):
    assert refine(shapes, work, *options) == 1
    assert words in capsys.readouterr().err


# Runs with a model


@pytest.mark.parametrize("beside_the_model", [False, True])
def test_a_bulk_run_finds_proposals_by_the_keys_of_its_images(tmp_path, beside_the_model):
    source = write_photos(tmp_path / "in", 5)
    recipe = small_recipe(cams="npz")
    plain = run(recipe, source, tmp_path / "plain", workers=0)
    assert plain.failed == 0
    for path in (tmp_path / "plain" / "cams").rglob("*.npz"):
        place = tmp_path / "masks" / path.relative_to(tmp_path / "plain" / "cams").with_suffix("")
        place.mkdir(parents=True)
        size = np.load(path)["attn_highres"].shape[1:]
        left = np.zeros(size, np.uint8)
        left[:, : size[1] // 2] = 255
        Image.fromarray(left).save(place / "0.png")
        Image.fromarray(255 - left).save(place / "1.png")
    refiner = Regions(ProposalFolder(tmp_path / "masks"))
    finish = (*recipe.writing.finish, refiner)
    changed = replace(recipe, writing=replace(recipe.writing, finish=finish))
    if beside_the_model:
        method = replace(recipe.method, refine=(*recipe.method.refine, refiner))
        changed = replace(recipe, method=method)
    assert run(changed, source, tmp_path / "out", workers=0).failed == 0
    for path in (tmp_path / "out" / "cams").rglob("*.npz"):
        cam = np.load(path)["attn_highres"].astype(np.float32)
        before = np.load(tmp_path / "plain" / path.relative_to(tmp_path / "out"))["attn_highres"]
        halves = np.split(before.astype(np.float32), [cam.shape[2] // 2], 2)
        for place, half in zip((cam.shape[2] // 4, 3 * cam.shape[2] // 4), halves, strict=True):
            means = half.mean((1, 2))
            np.testing.assert_allclose(cam[:, cam.shape[1] // 2, place], means, atol=0.02)
    with pytest.raises(DataError, match="holds results of other settings"):
        run(recipe, source, tmp_path / "out", workers=0)


def test_an_image_without_proposals_fails_in_a_bulk_run_and_the_others_do_not(tmp_path):
    source = write_photos(tmp_path / "in", 3)
    (tmp_path / "masks").mkdir()
    for name, size in (("p000", (40, 60)), ("p002", (48, 48))):
        np.save(
            tmp_path / "masks" / f"{name}.npy",
            np.arange(size[0])[:, None] // 20 + np.zeros(size, int),
        )
    recipe = small_recipe(finish=(Regions(ProposalFolder(tmp_path / "masks")),))
    summary = run(recipe, source, tmp_path / "out", workers=0)
    assert (summary.written, summary.failed) == (2, 1)
    assert "has no proposals of p001" in (tmp_path / "out" / "errors.tsv").read_text()


def test_a_benchmark_finds_proposals_by_the_names_of_its_photos(shapes, work):
    from camkit.bench.evaluator import variant_maps
    from camkit.bench.protocol import Variant

    photo = camkit.load_photo(shapes.split("train")[0].photo, size=96)
    refiner = Regions(ProposalFolder(work / "masks"), rule="vote", overlap="cut")
    model, vocabulary = OpenSmall()(), Vocabulary(CLASSES)
    variants = [
        Variant(name, camkit.Method(refine=chain))
        for name, chain in (("plain", ()), ("regions", (refiner,)))
    ]
    maps = variant_maps(model, photo, torch.tensor([[0, 1]]), variants, vocabulary)
    capture = Capture.of_picture(photo.rgb, keys=[photo.path.stem], sizes=[photo.size])
    assert torch.equal(maps[variants[1]], refiner(maps[variants[0]], capture))
