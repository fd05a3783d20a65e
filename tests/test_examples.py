"""The examples run as a newcomer would run them, and do what they say."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import camkit
from camkit import bench
from camkit.data import open_dataset, write_shapes

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [
    *("--steps", "6", "--batch", "8", "--size", "48", "--patch", "12", "--dim", "64"),
    *("--depth", "1", "--eval", "4", "--eval-images", "4", "--device", "cpu"),
]
LONG = ["--steps", "30", "--lr", "2e-3", "--eval", "30"]

needs_doei = pytest.mark.skipif(
    not hasattr(camkit, "DOEI"), reason="this camkit has no DOEI to attach"
)
with_and_without = pytest.mark.parametrize("flag", ["", pytest.param("--doei", marks=needs_doei)])


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "train_class_tokens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(example, tmp_path_factory):
    """Train in a folder of that name and return the folder; equal runs are cached."""
    home = tmp_path_factory.mktemp("runs")
    write_shapes(home / "shapes", 32, size=(48, 48))
    done = set()

    def run_in(name, *settings):
        out = home / name
        settings = tuple(filter(None, settings))
        if (name, settings) not in done:
            where = ["--data", str(home / "shapes"), "--out", str(out)]
            example.train(example.read_arguments([*TINY, *where, *settings]))
        done.add((name, settings))
        return out

    return run_in


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def saved_by(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


@with_and_without
def test_training_makes_the_loss_fall(train, flag):
    losses = [entry["loss"] for entry in log_of(train(f"long{flag}", *LONG, flag))]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@needs_doei
def test_the_flag_is_the_only_difference_and_has_an_effect(train):
    plain, edited = train("run"), train("run--doei", "--doei")
    settings = [saved_by(out)["settings"] for out in (plain, edited)]
    assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {"doei"}
    assert saved_by(plain)["model"].keys() == saved_by(edited)["model"].keys()
    assert log_of(plain)[0]["loss"] != log_of(edited)[0]["loss"]  # from the first forward on


@with_and_without
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(train, flag):
    whole = train(f"run{flag}", flag)
    train(f"parts{flag}", "--stop-at", "4", flag)
    torch.manual_seed(99)  # another state in between
    parts = train(f"parts{flag}", "--resume", flag)
    assert log_of(parts) == log_of(whole)
    expected, resumed = saved_by(whole), saved_by(parts)
    for part in ("model", "optimizer", "rng"):
        torch.testing.assert_close(resumed[part], expected[part], rtol=0, atol=0)


def test_a_run_killed_after_its_checkpoint_logs_no_step_twice(train):
    with (train("cut", "--stop-at", "3") / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0}\n')  # trained, but never saved
    assert log_of(train("cut", "--resume")) == log_of(train("run"))


def test_other_settings_cannot_resume_from_a_checkpoint(train):
    train("run")
    with pytest.raises(SystemExit, match="made with other settings"):
        train("run", "--resume", "--batch", "4")


def test_an_rng_seed_determines_the_run(train):
    first, again, other = train("run"), train("again"), train("other", "--rng-seed", "1")
    assert log_of(first) == log_of(again)
    assert log_of(first)[0]["loss"] != log_of(other)[0]["loss"]


@with_and_without
def test_the_logged_figures_are_those_of_the_saved_checkpoint(example, train, flag):
    out = train(f"long{flag}", *LONG, flag)
    logged, data = log_of(out)[-1], open_dataset(out.parent / "shapes")
    tune, held_out = data.split("train")[:4], data.split("val")[:4]
    again = example.evaluate(example.load_model(out / "checkpoint.pt"), tune, held_out, fuse=False)
    assert {name: logged[name] for name in again} == again
    assert 0 < logged["map"] <= 1
    assert 0 < logged["miou"] <= 1


@with_and_without
def test_the_benchmark_finds_the_same_miou_in_the_checkpoint(example, train, flag):
    out = train(f"long{flag}", *LONG, flag)
    logged, data = log_of(out)[-1], open_dataset(out.parent / "shapes")
    report = bench.run(
        example.load_model(out / "checkpoint.pt"),
        data,
        vocabulary=camkit.Vocabulary(data.classes),
        variants=[
            bench.Variant(
                "seed",
                camkit.Method(
                    camkit.seeds.ClassAttentionSeed(), refine=(camkit.refiners.Normalize("minmax"),)
                ),
            )
        ],
        split="val",
        tune_split="train",
        photos=bench.PhotoSettings(size=(48, 48), multiple=12),
        limit=4,
    )
    (row,) = report.rows
    assert row.background_score == pytest.approx(logged["background_score"])
    assert row.mean_iou == pytest.approx(logged["miou"], abs=3e-4)  # a pixel or two


def test_map_of_a_ranking_worked_by_hand(example):
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.2, 0.6], [0.7, 0.3, 0.7]])
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    first = (1 / 1 + 2 / 3) / 2  # hits at ranks 1 and 3
    second = 1 / 3  # the hit comes last; the third class has none and does not count
    assert example.mean_average_precision(scores, labels) == pytest.approx((first + second) / 2)


def test_timm_weights_are_loaded_by_name_and_the_position_grid_is_resized(example, tmp_path):
    donor = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=4).eval()
    save_file(donor.state_dict(), tmp_path / "vit.safetensors")
    settings = ["--weights", str(tmp_path / "vit.safetensors"), "--size", "224", "--device", "cpu"]
    model = example.build(example.read_arguments(settings), classes=3).eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():  # with a single class token, our model is the donor
        model.cls_token.data, model.classes = donor.cls_token.data, 1
        model.pos_embed.data = model.pos_embed.data[:, 2:]
        seen = []
        with model.norm.register_forward_hook(lambda *call: seen.append(call[-1])):
            model(pixels)
        expected = donor.forward_features(pixels)[:, 1:]
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    small = example.build(example.read_arguments([*settings, "--size", "96"]), classes=3)
    assert small.pos_embed.shape == (1, 3 + 36, 192)
    torch.testing.assert_close(small.pos_embed[0, :3], donor.pos_embed[0, :1].expand(3, -1))


def run(name, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_the_training_example_accepts_all_of_its_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the default output folder is relative to the current folder
    write_shapes(tmp_path / "shapes", 8, size=(48, 48))
    short = [*TINY, "--steps", "1", "--data", "shapes", "--doei", "--fuse", "--amp"]
    run("train_class_tokens", *short, monkeypatch=monkeypatch)
    assert "miou" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "one_call": "cam.npy, manifest.json, mask.png, overlay.png in out/one_call",
        "compose_stages": "mIoU over background, circle, square, triangle",
        "own_refiner": "maps (1, 2, 96, 144)",
        "own_masks": "| refined |",
        "refine_cam_files": "8 files refined, 0 failed",
        "attach_in_training_loop": "step 30",
        "text_seeds": "gradient (1, 2, 96, 96)",
        "bulk_run": "0 done now, 6 before, 0 failed",
    }.items(),
)
def test_an_example_prints_what_its_page_promises(name, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch=monkeypatch)
    assert expected in capsys.readouterr().out


def test_refined_files_of_another_codebase_are_better_than_they_were(monkeypatch, capsys):
    run("refine_cam_files", monkeypatch=monkeypatch)
    before, after = (
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "mIoU" in line
    )
    assert after > before


def test_the_cells_of_the_tour_run_in_order(real_data, capsys):
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text("utf-8"))["cells"]
    world = {}
    for cell in cells:
        assert not cell.get("outputs")  # the site regenerates them
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), world)
    printed = capsys.readouterr().out
    overlap = float(re.search(r"IoU of both masks of the person: (\d\.\d+)", printed)[1])
    assert 0.7 < overlap < 1.0  # the CRF moves the border, not the person
