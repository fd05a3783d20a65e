"""camkit eval: figures worked by hand, by another library, and by brute force."""

import json
import math

import numpy as np
import pytest
import torch
from optional import torchmetrics
from PIL import Image

from camkit.bulk import pair_truth, score_cams, score_masks
from camkit.cli import main
from camkit.data import draw_shapes
from camkit.errors import DataError
from camkit.mask import to_mask
from camkit.paint import save_mask
from camkit.score import (
    class_scores,
    class_table,
    confusion_matrix,
    mean_iou,
    paired_gain,
    pixel_accuracy,
)

SHAPES = ["--num-classes", "4"]
CONFUSION = torch.tensor([[50, 4, 0, 0], [6, 30, 0, 0], [2, 8, 0, 0], [0, 0, 0, 0]])


def evaluate(*arguments):
    return main(["eval", *map(str, arguments), "--workers", "0"])


def save_all(folder, masks):
    folder.mkdir()
    for name, mask in masks.items():
        save_mask(np.asarray(mask, dtype=np.uint8), folder / f"{name}.png")
    return folder


@pytest.fixture
def drawn(tmp_path):
    """Eight drawn truths, and for each maps that tell the shape with noise; a tenth ignored."""
    generator = torch.Generator().manual_seed(0)
    truths, cams = tmp_path / "gt", tmp_path / "cams"
    cams.mkdir()
    masks = {}
    for index, (_, mask) in enumerate(draw_shapes(8, size=(24, 40))):
        truth = torch.from_numpy(mask)
        ignored = torch.rand(truth.shape, generator=generator) < 0.1
        classes = sorted({int(value) - 1 for value in truth.unique() if value})
        maps = torch.stack([(truth == one + 1).float() for one in classes])
        maps = (0.6 * maps + 0.4 * torch.rand(maps.shape, generator=generator)).clamp(0, 1)
        content = {one: maps[slot].numpy() for slot, one in enumerate(classes)}
        np.save(cams / f"image{index}.npy", content)
        masks[f"image{index}"] = truth.masked_fill(ignored, 255)
    save_all(truths, masks)
    return cams, truths


def read(path):
    return torch.from_numpy(np.array(Image.open(path))).long()


def maps_of(path):
    content = np.load(path, allow_pickle=True).item()
    cam = torch.from_numpy(np.stack(list(content.values())))[None]
    return cam, torch.tensor([list(content)])


def masks_at(cams, score, folder):
    names = sorted(path.stem for path in cams.iterdir())
    drawn = {
        name: to_mask(*maps_of(cams / f"{name}.npy"), background_score=score)[0] for name in names
    }
    return save_all(folder, drawn)


def brute_force(cams, truths, score):
    """The mean IoU of all images at one background score, image after image."""
    total = torch.zeros(4, 4, dtype=torch.int64)
    for path in truths.iterdir():
        mask = to_mask(*maps_of(cams / f"{path.stem}.npy"), background_score=score)[0].long()
        total += confusion_matrix(read(path), mask, num_classes=4)
    return total


# Figures


def test_the_scores_of_a_class_worked_by_hand():
    background, first, second, third = class_scores(CONFUSION, ["bg", "a", "b", "c"])
    assert (background.iou, background.precision) == (50 / 62, 50 / 58)
    assert (background.recall, background.pixels) == (50 / 54, 54)
    assert (first.iou, first.precision, first.recall) == (30 / 48, 30 / 42, 30 / 36)
    assert (first.false_positives, first.false_negatives) == (12 / 48, 6 / 48)
    assert (second.iou, second.recall, second.false_negatives) == (0.0, 0.0, 1.0)
    assert math.isnan(second.precision)  # never predicted
    assert all(math.isnan(share) for share in (third.iou, third.precision, third.recall))
    assert pixel_accuracy(CONFUSION) == 0.8
    assert math.isnan(pixel_accuracy(torch.zeros(2, 2, dtype=torch.int64)))


def test_iou_and_both_errors_add_up_to_one():
    confusion = torch.randint(1, 1000, (6, 6))
    for score in class_scores(confusion, "abcdef"):
        assert score.iou + score.false_positives + score.false_negatives == pytest.approx(1)


def test_the_table_shows_shares_in_percent():
    lines = class_table(class_scores(CONFUSION, ["background", "a", "b", "c"])).splitlines()
    assert lines[0].split() == ["class", "IoU", "precision", "recall", "FP", "FN", "pixels"]
    assert lines[2].split() == ["a", "62.50", "71.43", "83.33", "25.00", "12.50", "36"]
    assert lines[4].split() == ["c", "-", "-", "-", "-", "-", "0"]


def test_a_name_too_few_is_refused():
    with pytest.raises(ValueError, match="must name 4 classes, the background too, got 3"):
        class_scores(CONFUSION, ["a", "b", "c"])


# Masks


@pytest.fixture
def tiny(tmp_path):
    """Two images of VOC, worked by hand: dog is 12, cat 8."""
    truths = save_all(tmp_path / "gt", {"a": [[0, 12, 12], [255, 12, 8]], "b": [[0, 0], [8, 8]]})
    masks = save_all(tmp_path / "masks", {"a": [[0, 12, 0], [12, 12, 12]], "b": [[0, 8], [8, 255]]})
    return masks, truths


def test_figures_of_masks_worked_by_hand(tiny, tmp_path, capsys):
    masks, truths = tiny
    assert evaluate(masks, "--gt", truths, "--json", tmp_path / "out.json") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # background: 2 hit of 3, and 1 dog and 1 ignored cat called background
    assert ["background", "40.00", "50.00", "66.67", "40.00", "20.00", "3"] in lines
    assert ["cat", "25.00", "50.00", "33.33", "25.00", "50.00", "3"] in lines
    assert ["dog", "50.00", "66.67", "66.67", "25.00", "25.00", "3"] in lines
    assert ["bird", "-", "-", "-", "-", "-", "0"] in lines
    assert ["pixel", "accuracy", "55.56"] in lines
    assert ["mIoU", "(present)", "38.33"] in [line[:3] for line in lines]
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["mean_iou"]["present"] == pytest.approx((2 / 5 + 1 / 4 + 2 / 4) / 3)
    assert figures["mean_iou"]["psa"] == pytest.approx((2 / 5 + 1 / 4 + 2 / 4) / 21)
    assert figures["pixel_accuracy"] == pytest.approx(5 / 9)
    assert figures["classes"][3] == {
        "name": "bird",
        **dict.fromkeys(("iou", "precision", "recall", "false_positives", "false_negatives")),
        "pixels": 0,
    }
    assert (figures["images"], figures["background_score"], figures["failed"]) == (2, None, {})


def test_true_masks_that_mark_objects_with_255_are_no_measurement(tmp_path, capsys):
    truths = save_all(tmp_path / "gt", {"a": [[0, 255], [0, 255]], "b": [[0, 0], [255, 0]]})
    masks = save_all(tmp_path / "masks", {"a": np.zeros((2, 2)), "b": np.zeros((2, 2))})
    assert evaluate(masks, "--gt", truths, "--num-classes", 2) == 1
    printed = capsys.readouterr()
    assert "nothing can be measured on 2 true masks" in printed.err
    assert "write class + 1 there instead: 1 for the first class" in printed.err
    assert "mIoU" not in printed.out


def test_labels_of_a_class_that_the_truth_lacks_are_counted(drawn, tmp_path, capsys):
    cams, truths = drawn
    classes = {path.stem: maps_of(path)[1][0].tolist() for path in cams.iterdir()}
    (tmp_path / "labels.json").write_text(json.dumps(classes))
    hidden = read(truths / "image3.png")
    save_mask(hidden.masked_fill(hidden > 0, 255).byte(), truths / "image3.png")
    options = ["--labels", tmp_path / "labels.json", "--json", tmp_path / "out.json"]
    assert evaluate(cams, "--gt", truths, *SHAPES, *options) == 0
    assert "the labels of 1 of 8 images name a class that the truth" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.json").read_text())["labels_without_a_pixel"] == 1


def test_mean_iou_is_that_of_torchmetrics(drawn, tmp_path, capsys):
    cams, truths = drawn
    masks = masks_at(cams, 0.5, tmp_path / "masks")
    assert evaluate(masks, "--gt", truths, *SHAPES, "--json", tmp_path / "out.json") == 0
    metric = torchmetrics.MulticlassJaccardIndex(num_classes=4, average="none", ignore_index=255)
    for path in masks.iterdir():
        metric.update(read(path), read(truths / path.name))
    figures = json.loads((tmp_path / "out.json").read_text())
    actual = [one["iou"] for one in figures["classes"]]
    assert actual == pytest.approx(metric.compute().tolist(), abs=1e-6)
    assert figures["mean_iou"]["present"] == pytest.approx(float(metric.compute().mean()), abs=1e-6)


@pytest.mark.slow
def test_two_workers_count_what_this_process_counts(drawn, tmp_path):
    cams, truths = drawn
    masks = masks_at(cams, 0.5, tmp_path / "masks")
    items = pair_truth(masks, truths)
    here, there = (score_masks(items, num_classes=4, workers=workers) for workers in (0, 2))
    assert torch.equal(here.confusion, there.confusion)
    items = pair_truth(cams, truths, cams=True)
    here, there = (score_cams(items, num_classes=4, workers=workers) for workers in (0, 2))
    assert torch.equal(here.confusion, there.confusion)


def test_names_of_classes_come_from_a_file(tiny, tmp_path, capsys):
    masks, truths = tiny
    names = [f"thing {number}" for number in range(1, 13)]
    for first in ([], ["background"]):
        (tmp_path / "names.txt").write_text("\n".join([*first, *names]))
        assert evaluate(masks, "--gt", truths, "--classes", tmp_path / "names.txt") == 0
        printed = capsys.readouterr().out
        rows = [line.split() for line in printed.splitlines()]
        assert ["thing", "12", "50.00"] in [row[:3] for row in rows]
        assert [row[0] for row in rows if row].count("background") == 1


def test_a_list_picks_the_images(tiny, tmp_path, capsys):
    masks, truths = tiny
    (tmp_path / "list.txt").write_text("b\n")
    assert evaluate(masks, "--gt", truths, "--list", tmp_path / "list.txt") == 0
    printed = capsys.readouterr().out
    assert "1 image of" in printed
    assert "pixel accuracy 50.00" in printed


def test_a_mask_that_is_not_there_is_not_passed_over(tiny, tmp_path, capsys):
    masks, truths = tiny
    (masks / "a.png").unlink()
    assert evaluate(masks, "--gt", truths) == 1
    error = capsys.readouterr().err
    assert "lacks 1 of 2 masks: a; list the images of your split (--list), or" in error
    assert evaluate(masks, "--gt", truths, "--partial") == 0
    assert "masks: 1 image" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("b\nc\n")
    assert evaluate(masks, "--gt", truths, "--list", tmp_path / "list.txt", "--partial") == 1
    assert "has no ground truth of c" in capsys.readouterr().err


def test_a_mask_that_cannot_be_counted_is_named_and_left_out(tiny, capsys):
    masks, truths = tiny
    save_mask(np.zeros((3, 2), np.uint8), masks / "b.png")
    assert evaluate(masks, "--gt", truths) == 1
    said = capsys.readouterr()
    assert f"camkit: b: {masks / 'b.png'} has 3x2 pixels (rows x columns) but" in said.err
    assert "b.png has 2x2; draw the mask at the size of its photo" in said.err
    assert "1 image could not be counted" in said.err
    assert "masks: 1 image" in said.out


@pytest.mark.parametrize(
    ("write", "reported"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read as an image"),
        (lambda path: Image.new("RGB", (2, 2)).save(path), "not colours"),
        (
            lambda path: save_mask(np.full((2, 2), 21), path),
            "holds the ids 21; allowed are 0 to 20",
        ),
    ],
)
def test_masks_that_hold_no_ids_are_reported(tiny, capsys, write, reported):
    masks, truths = tiny
    write(masks / "b.png")
    assert evaluate(masks, "--gt", truths) == 1
    assert reported in capsys.readouterr().err


def test_nothing_that_can_be_counted_is_no_zero(tiny, capsys):
    masks, truths = tiny
    for path in masks.iterdir():
        path.write_bytes(b"")
    assert evaluate(masks, "--gt", truths) == 1
    said = capsys.readouterr()
    assert said.err.startswith("camkit: not a single image could be counted; a: ")
    assert "mIoU" not in said.out


# CAM files


def test_the_best_score_on_the_same_images_is_called_an_oracle(drawn, tmp_path, capsys):
    cams, truths = drawn
    assert evaluate(cams, "--gt", truths, *SHAPES, "--json", tmp_path / "out.json") == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    means = [float(mean_iou(brute_force(cams, truths, step / 100))) for step in range(96)]
    best = max(range(96), key=means.__getitem__)
    assert figures["background_score"] == best / 100
    assert figures["mean_iou"]["present"] == means[best]
    assert figures["background_score_is"] == "oracle"
    assert f"background score {best / 100:.4g}, ORACLE: " in capsys.readouterr().out


def test_a_score_tuned_on_other_images_is_reported_on_these(drawn, tmp_path, capsys):
    cams, truths = drawn
    names = sorted(path.stem for path in truths.iterdir())
    (tmp_path / "tune.txt").write_text("\n".join(names[:4]))
    (tmp_path / "val.txt").write_text("\n".join(names[4:]))
    lists = ["--list", tmp_path / "val.txt", "--tune-list", tmp_path / "tune.txt"]
    assert evaluate(cams, "--gt", truths, *SHAPES, *lists, "--json", tmp_path / "out.json") == 0
    items = pair_truth(cams, truths, cams=True)
    tuned = score_cams(items[:4], num_classes=4, workers=0).background_score
    expected = score_cams(items[4:], num_classes=4, background_score=tuned, workers=0)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["background_score"], figures["background_score_is"]) == (tuned, "tuned")
    assert figures["mean_iou"]["present"] == float(mean_iou(expected.confusion))
    assert f"the best on {tmp_path / 'tune.txt'}" in capsys.readouterr().out
    assert evaluate(cams, "--gt", truths, *SHAPES, "--tune-list", tmp_path / "tune.txt") == 1
    assert "4 images are both tuned on and scored, such as image0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "score"),
    [(["--background-score", 0.3], 0.3), (["--background", "power", "--alpha", 1], 0.5)],
)
def test_a_given_score_is_the_mask_drawn_at_it(drawn, tmp_path, options, score):
    cams, truths = drawn
    assert evaluate(cams, "--gt", truths, *SHAPES, *options, "--json", tmp_path / "1.json") == 0
    masks = masks_at(cams, score, tmp_path / "masks")
    assert evaluate(masks, "--gt", truths, *SHAPES, "--json", tmp_path / "2.json") == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("1.json", "2.json"))
    assert one["classes"] == two["classes"]


def test_an_image_without_classes_is_all_background(tmp_path):
    truths = save_all(tmp_path / "gt", {"a": [[0, 1], [0, 0]], "b": [[1, 1], [0, 0]]})
    (tmp_path / "cams").mkdir()
    np.save(tmp_path / "cams" / "a.npy", {})
    np.save(tmp_path / "cams" / "b.npy", {0: np.array([[1, 1], [0, 0]], np.float32)})
    items = pair_truth(tmp_path / "cams", truths, cams=True)
    actual = score_cams(items, num_classes=2, background_score=0.5, workers=0)
    assert actual.confusion.tolist() == [[5, 0], [1, 2]]


def test_maps_of_another_size_are_resized_only_on_request(drawn, tmp_path, capsys):
    cams, truths = drawn
    np.save(cams / "image3.npy", {0: np.random.default_rng(0).random((6, 10)).astype(np.float32)})
    assert evaluate(cams, "--gt", truths, *SHAPES) == 1
    assert "image3.npy holds maps of 6x10 (rows x columns) but" in capsys.readouterr().err
    assert evaluate(cams, "--gt", truths, *SHAPES, "--resize") == 0
    assert "cams: 8 images" in capsys.readouterr().out


def test_options_of_cam_files_are_refused_for_masks(tiny, capsys):
    masks, truths = tiny
    assert evaluate(masks, "--gt", truths, "--background-score", 0.4) == 1
    assert "holds masks: --background-score, --alpha" in capsys.readouterr().err


def test_a_folder_with_both_is_taken_for_masks_unless_said(drawn, tmp_path, capsys):
    cams, truths = drawn
    for path in truths.iterdir():
        (cams / path.name).write_bytes(path.read_bytes())  # perfect masks
    assert evaluate(cams, "--gt", truths, *SHAPES) == 0
    assert "mIoU (present) 100.00" in capsys.readouterr().out
    assert evaluate(cams, "--gt", truths, *SHAPES, "--cams") == 0
    assert "ORACLE" in capsys.readouterr().out


# Against others


def test_the_gain_over_others_is_that_of_the_paired_bootstrap(drawn, tmp_path, capsys):
    cams, truths = drawn
    good, bad = (masks_at(cams, score, tmp_path / f"at{score}") for score in (0.5, 0.3))
    options = ["--against", bad, "--json", tmp_path / "out.json"]
    assert evaluate(good, "--gt", truths, *SHAPES, *options) == 0
    sides = [
        torch.stack(
            [
                confusion_matrix(read(path), read(folder / path.name), num_classes=4)
                for path in sorted(truths.iterdir())
            ]
        )
        for folder in (bad, good)
    ]
    expected = paired_gain(*sides)
    actual = json.loads((tmp_path / "out.json").read_text())["gain"]
    assert (actual["gain"], actual["low"], actual["high"]) == (
        expected.gain,
        expected.low,
        expected.high,
    )
    assert expected.gain > 0
    assert (actual["images"], actual["few_images"]) == (8, True)
    printed, warned = capsys.readouterr()
    assert "8 images: the interval and p are not reliable; use 40 or more" in warned
    assert f"against {bad}: mIoU {100 * expected.mean_iou_base:.2f}" in printed
    assert f"gain {100 * expected.gain:+.2f}, 95% interval " in printed


def test_cam_files_are_compared_each_at_their_own_best_score(drawn, tmp_path, capsys):
    cams, truths = drawn
    weaker = tmp_path / "weaker"
    weaker.mkdir()
    for path in cams.iterdir():
        content = np.load(path, allow_pickle=True).item()
        np.save(weaker / path.name, {key: value / 2 for key, value in content.items()})
    assert evaluate(cams, "--gt", truths, *SHAPES, "--against", weaker) == 0
    printed = capsys.readouterr().out
    assert printed.count("ORACLE") == 2
    assert "gain +0.00" in printed or "gain -0.0" in printed or "gain +0.0" in printed


def test_one_image_is_no_comparison(tiny, tmp_path, capsys):
    masks, truths = tiny
    (tmp_path / "list.txt").write_text("b\n")
    assert evaluate(masks, "--gt", truths, "--list", tmp_path / "list.txt", "--against", masks) == 1
    assert "the folders share 1 image; a comparison needs at least 2" in capsys.readouterr().err


def test_a_given_score_and_a_tuned_one_exclude_each_other(drawn):
    cams, truths = drawn
    items = pair_truth(cams, truths, cams=True)
    with pytest.raises(ValueError, match="so `tune` has no effect"):
        score_cams(items[:2], num_classes=4, background_score=0.4, tune=items[2:], workers=0)


def test_names_that_fit_nothing_are_reported(tiny, tmp_path):
    masks, _ = tiny
    other = save_all(tmp_path / "other", {"x": [[0]]})
    with pytest.raises(DataError, match="no name fits"):
        pair_truth(masks, other, partial=True)


# True masks of other values, files and names


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (lambda mask, path: save_mask(mask, path.with_suffix(".png")), []),
        (lambda mask, path: save_mask(mask, path.with_name(f"{path.name}_mask.png")), []),
        (lambda mask, path: np.save(path.with_suffix(".npy"), mask.astype(np.int64)), []),
        (lambda mask, path: Image.fromarray(mask).save(path.with_suffix(".tif")), []),
        (
            lambda mask, path: save_mask(np.where(mask == 255, 9, mask), path.with_suffix(".png")),
            ["--void", "9"],
        ),
        (
            lambda mask, path: save_mask(
                np.where(mask == 255, 255, mask * 50), path.with_suffix(".png")
            ),
            ["--mask-values", "50=1,100=2,150=3"],
        ),
    ],
)
def test_truth_in_another_form_gives_the_same_figures(drawn, tmp_path, write, options):
    cams, truths = drawn
    masks = masks_at(cams, 0.4, tmp_path / "masks")
    (tmp_path / "other").mkdir()
    for path in truths.iterdir():
        write(np.array(Image.open(path)), tmp_path / "other" / path.stem)
    figures = []
    for place, more in ((truths, []), (tmp_path / "other", options)):
        json_file = tmp_path / f"{place.name}.json"
        assert evaluate(masks, "--gt", place, *SHAPES, "--json", json_file, *more) == 0
        found = json.loads(json_file.read_text())
        figures.append((found["mean_iou"], found["classes"], found["images"]))
    assert figures[0] == figures[1]


def test_masks_of_0_and_255_are_scored_once_their_values_are_named(tmp_path):
    truth = np.array([[0, 255], [255, 0]], np.uint8)
    save_all(tmp_path / "masks", {"a": [[0, 1], [0, 0]]})
    save_all(tmp_path / "gt", {"a": truth})
    cells = ["--num-classes", "2"]
    options = [tmp_path / "masks", "--gt", tmp_path / "gt", *cells]
    assert evaluate(*options) == 1  # nothing can be measured
    json_file = tmp_path / "a.json"
    assert evaluate(*options, "--mask-values", "255=1", "--json", json_file) == 0
    by_name = {row["name"]: row["iou"] for row in json.loads(json_file.read_text())["classes"]}
    assert by_name == {"background": pytest.approx(2 / 3), "class 1": pytest.approx(1 / 2)}


def test_0_may_be_ignored_in_the_truth(tmp_path):
    save_all(tmp_path / "masks", {"a": [[1, 1], [1, 2]]})
    save_all(tmp_path / "gt", {"a": [[0, 1], [1, 2]]})
    options = [tmp_path / "masks", "--gt", tmp_path / "gt", "--num-classes", "3"]
    json_file = tmp_path / "a.json"
    assert evaluate(*options, "--zero", "void", "--json", json_file) == 0
    assert json.loads(json_file.read_text())["mean_iou"]["present"] == 1


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--void", "0,x"], "--void: 'x' is no whole number"),
        (["--zero", "voids"], "--zero voids: did you mean 'void'?"),
        (["--mask-values", "255"], "--mask-values 255: expected VALUE=CLASS, such as 255=1"),
    ],
)
def test_wrong_settings_of_masks_are_refused(drawn, tmp_path, option, words, capsys):
    cams, truths = drawn
    masks = masks_at(cams, 0.4, tmp_path / "masks")
    assert evaluate(masks, "--gt", truths, *SHAPES, *option) == 1
    assert words in capsys.readouterr().err
