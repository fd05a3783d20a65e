"""The command line: what it writes, what it says, and how it ends."""

import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.torch_version import TorchVersion

import camkit
from camkit.cli import COMMANDS, command_module, main
from camkit.cli.models import open_model
from camkit.data import write_shapes
from camkit.pipeline import Pipeline

NAME = "vit_tiny_patch16_224"
SMALL = ["--size", "64"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random weights for two real classifiers: 20 VOC classes and ImageNet's 1000."""
    folder = tmp_path_factory.mktemp("data") / "weights"
    folder.mkdir()
    for tag, outputs in (("test", 20), ("imagenet", 1000), ("three", 3)):
        torch.manual_seed(outputs)
        state = timm.create_model(NAME, num_classes=outputs).state_dict()
        save_file(
            {key: value.half() for key, value in state.items()},
            folder / f"{NAME}.{tag}.fp16.safetensors",
        )
    return folder


@pytest.fixture(autouse=True)
def data(weights, monkeypatch, tmp_path):
    monkeypatch.setenv("CAMKIT_DATA", str(weights.parent))
    monkeypatch.chdir(tmp_path)  # default outputs land here

    def no_network(*_, **options):
        if options.get("pretrained"):
            raise OSError("no network in tests")
        return create(*_, **options)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", no_network)
    return weights.parent


def photo(path, size=(40, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(len(str(path))).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(colours).save(path)
    return str(path)


def cam(*arguments, tag="test"):
    return main(["cam", *arguments, "--model", f"{NAME}.{tag}", *SMALL])


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("camkit: ")
    assert error.count("\n") == 1
    return error


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"  camkit {command}" in capsys.readouterr().out.partition("examples:")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cma"], "no command is called 'cma'; did you mean 'cam'? See `camkit --help`"),
        (["cam"], "required: IMAGE; see `camkit cam --help`"),
        (["cam", "a.jpg", "--sise", "3"], "has no option --sise; did you mean --size?"),
        (["bench", "x", "--limit", "few"], "--limit: invalid int value: 'few'"),
        (["run", "x", "--out", "y", "--cams", "nzp"], "choose from 'none', 'both', 'psa'"),
        (["doctor", "a", "b"], "b: more arguments than camkit doctor takes"),
        (["data", "chekc", "x"], "invalid choice: 'chekc'"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert words in one_line(capsys)


def test_without_arguments_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2
    assert "Segment photos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("--help", "Segment photos"), ("--version", camkit.__version__), ("paint", "no command")],
)
def test_help_and_version_do_without_torch(arguments, words):
    """In a fresh process; they take 0.1 seconds then, and importing torch takes seconds."""
    code = "import sys, camkit.cli as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert words in done.stdout + done.stderr
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(command):
    assert command_module(command).__doc__.splitlines()[0] == COMMANDS[command]


def test_cam_writes_a_folder_for_each_photo(tmp_path, capsys):
    first, second = photo(tmp_path / "a b.png"), photo(tmp_path / "größe.jpg")
    assert cam(first, second, "--classes", "cat,dog", "--out", "made") == 0
    for stem in ("a b", "größe"):
        folder = tmp_path / "made" / stem
        assert sorted(path.name for path in folder.iterdir()) == [
            "cam.npy",
            "manifest.json",
            "mask.png",
            "overlay.png",
        ]
        assert np.load(folder / "cam.npy").shape == (2, 40, 60)
        assert [item["name"] for item in manifest(folder)["classes"]] == ["cat", "dog"]
    assert capsys.readouterr().out.count(": cat, dog\n") == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_corrupt_photo_does_not_stop_the_others(tmp_path, capsys, place):
    paths = [photo(tmp_path / f"good{number}.png") for number in range(2)]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    paths.insert(place, str(broken))
    assert cam(*paths, "--classes", "cat", "--out", "made") == 1
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["good0", "good1"]
    error = capsys.readouterr().err
    assert "broken.png cannot be read as an image" in error
    assert "1 of 3 photos failed" in error


def test_a_folder_is_led_to_the_command_for_folders(tmp_path, capsys):
    photo(tmp_path / "my photos" / "a.png")
    words = ["--classes", "cat", "--refine", "blur:2", "--refine", "crf"]
    assert cam("my photos", *words) == 1
    _, command = one_line(capsys).split(" is a folder; for all photos in it: ")
    assert command.strip() == (
        "camkit run 'my photos' --classes cat --out masks --refine blur:2 --refine crf "
        f"--model {NAME}.test --size 64"
    )
    assert main([*shlex.split(command)[1:], "--workers", "0"]) == 0
    assert (tmp_path / "masks" / "masks" / "a.png").is_file()


def test_a_misspelt_photo_is_told_before_the_model_is_opened(tmp_path, capsys):
    photo(tmp_path / "cat.jpg")
    assert cam("cat.jgp", tag="nothing") == 1
    assert one_line(capsys) == "camkit: cat.jgp does not exist; did you mean cat.jpg?\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("bench shaeps", "shaeps is not a folder; did you mean shapes?"),
        ("bench --config nmes.txt", "nmes.txt: No such file or directory; did you mean names.txt?"),
        ("bench --config shapes", "shapes: Is a directory"),
        ("data check names.txt", "names.txt is not a folder; name the folder that holds"),
        ("data check empty", "is no known data set: expected labelmap.txt"),
        ("data check shapes --split vla", "must be a split of the data set, got 'vla'; did you"),
        ("refine empty --images shapes --refine blur --out r", "empty holds no CAM files"),
        ("refine names.txt --images shapes --refine blur --out r", "names.txt is not a folder"),
        ("refine cams --images shaeps --refine blur --out r", "did you mean shapes?"),
        ("refine cams --images shapes --refine bulr --out r", "did you mean 'blur'?"),
        ("mask cams --out r --workers -2", "`workers` must be at least 0, got -2"),
        ("mask cams --out r --list empty.txt", "empty.txt is empty; expected one name"),
        ("eval empty --gt shapes", "empty holds no masks (.png) directly within it"),
        ("eval names.txt --gt shapes", "names.txt is not a folder; give the folder of the masks"),
        ("eval shapes/SegmentationClass --gt shaeps", "did you mean shapes?"),
        ("demo --photos 0", "--photos and --images must be at least 1"),
        ("doctor demo --size 31", "cannot be run on images of shape (1, 3, 31, 31)"),
        pytest.param(
            "build-kernels --arch 7",
            "must be 80 or newer, got 7",
            marks=pytest.mark.skipif(
                TorchVersion(torch.__version__) < TorchVersion("2.10"), reason="needs torch 2.10"
            ),
        ),
    ],
)
def test_wrong_files_and_values_are_told_in_one_line(tmp_path, capsys, words, expected):
    write_shapes(tmp_path / "shapes", 8)
    photo(tmp_path / "a.png")
    for name in ("empty", "cams"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "cams" / "a.npy", np.zeros((1, 2, 2), np.float32))
    (tmp_path / "names.txt").write_text("cat\n")
    (tmp_path / "empty.txt").touch()
    model = ["--model", f"{NAME}.test"] if words.startswith("cam") else []
    assert main([*words.split(), *model]) == 1
    assert expected in one_line(capsys)


def test_photos_of_one_name_get_folders_of_their_own(tmp_path):
    paths = [tmp_path / "p" / "x.png", tmp_path / "q" / "x.png", tmp_path / "x-2.png"]
    sizes = [(40, 60), (60, 40), (50, 50)]
    named = [photo(path, size) for path, size in zip(paths, sizes, strict=True)]
    assert cam(*named, "--classes", "cat", "--out", "made") == 0
    made = {manifest(folder)["photo"]: folder.name for folder in (tmp_path / "made").iterdir()}
    assert made == {named[0]: "x", named[1]: "x-2", named[2]: "x-2-2"}


def test_without_classes_the_first_guess_is_taken(tmp_path):
    assert cam(photo(tmp_path / "a.png")) == 0
    found = manifest(tmp_path / "out" / "cam" / "a")
    assert [item["index"] for item in found["classes"]] == [found["most_probable_output"]]


@pytest.mark.parametrize(
    ("tag", "asked", "names"),
    [
        ("test", "Cat, DOG", ["cat", "dog"]),
        ("test", "0,19", ["aeroplane", "tvmonitor"]),
        ("imagenet", "tabby", ["tabby, tabby cat"]),
        ("imagenet", "junco, snowbird", ["junco, snowbird"]),
        ("imagenet", "cat", ["cat"]),
        ("three", "output 2", ["output 2"]),
    ],
)
def test_classes_are_found_by_name_synonym_group_and_index(tmp_path, tag, asked, names):
    assert cam(photo(tmp_path / "a.png"), "--classes", asked, "--out", "made", tag=tag) == 0
    assert [item["name"] for item in manifest(tmp_path / "made" / "a")["classes"]] == names


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("hrose", 'no class is called "hrose"; did you mean "horse"'),
        ("20", "a class index must lie in 0 to 19, got 20"),
        ("cat,cat", "are the same class"),
        (" , ", "name at least one class, got none"),
    ],
)
def test_classes_that_do_not_exist_are_told_before_any_photo_is_read(
    tmp_path, capsys, asked, words
):
    assert cam(photo(tmp_path / "a.png"), "--classes", asked, "--out", "made") == 1
    assert words in one_line(capsys)
    assert not (tmp_path / "made").exists()


def test_the_background_score_reaches_the_manifest(tmp_path, capsys):
    path = photo(tmp_path / "a.png")
    assert cam(path, "--classes", "cat", "--background-score", "0.25", "--out", "made") == 0
    assert manifest(tmp_path / "made" / "a")["background_score"] == 0.25
    capsys.readouterr()
    assert cam(path, "--classes", "cat", "--background-score", "7") == 1
    assert "must lie in [0, 1], got 7.0" in one_line(capsys)


def test_an_output_folder_that_is_a_file_is_told(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert cam(photo(tmp_path / "a.png"), "--classes", "cat", "--out", "taken") == 1
    assert "taken" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_interrupt_keeps_finished_results(tmp_path, capsys, monkeypatch):
    paths = [photo(tmp_path / f"{number}.png") for number in range(3)]
    real = Pipeline.__call__

    def segment(pipeline, photo, **options):
        if photo.path.name == "1.png":
            raise KeyboardInterrupt
        return real(pipeline, photo, **options)

    monkeypatch.setattr(Pipeline, "__call__", segment)
    assert cam(*paths, "--classes", "cat", "--out", "made") == 130  # as shells count SIGINT
    assert "camkit: interrupted; finished results are kept\n" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["0"]
    assert manifest(tmp_path / "made" / "0")["size"] == [40, 60]


def shapes(folder, *, classes, count=8):
    """Drawn images whose classes bear other names."""
    write_shapes(folder, count)
    path = folder / "labels.json"
    text = path.read_text()
    for old, new in zip(("circle", "square", "triangle"), classes, strict=True):
        text = text.replace(f'"{old}"', f'"{new}"')
    path.write_text(text)
    return str(folder)


def bench(*arguments):
    return main(["bench", *arguments, "--model", f"{NAME}.test", "--no-cache", *SMALL])


def test_bench_prints_a_table_of_the_classes_asked_and_writes_it(tmp_path, capsys):
    folder = shapes(tmp_path / "animals", classes=("cat", "dog", "horse"))
    assert bench(folder, "--classes", "horse, cat", "--out", "results/first.json") == 0
    table = capsys.readouterr().out
    assert "mIoU in % over background, horse, cat\n" in table
    assert (tmp_path / "results" / "first.md").read_text() == table.removesuffix("\n")
    data = json.loads((tmp_path / "results" / "first.json").read_text())
    assert (data["tune_images"], data["images"], len(data["rows"])) == (6, 2, 16)


def test_bench_ends_with_1_when_images_were_left_out_or_it_cannot_write(tmp_path, capsys):
    folder = shapes(tmp_path / "animals", classes=("cat", "dog", "horse"))
    (tmp_path / "animals" / "JPEGImages" / "shapes_0001.jpg").write_bytes(b"no image")
    (tmp_path / "taken").write_text("mine")
    assert bench(folder, "--limit", "2") == 1
    assert "1 image could not be used:" in capsys.readouterr().out
    assert bench(folder, "--limit", "2", "--out", "taken/results.json") == 1
    printed = capsys.readouterr()
    assert "mIoU in % over background, cat, dog, horse" in printed.out
    assert "| gradient |" in printed.out
    assert printed.err.splitlines()[-1].startswith("camkit: taken")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tune-split", "val"], "is an oracle; name another split"),
        (["--tune-split", "dev"], "must be a split of the data set, got 'dev'"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--classes", "horze"], 'no class is called "horze"; did you mean "horse"'),
        (["--classes", "sheep"], "no class of the data set is called sheep"),
    ],
)
def test_bench_refuses_what_cannot_be_measured(tmp_path, capsys, arguments, words):
    folder = shapes(tmp_path / "animals", classes=("cat", "dog", "horse"))
    assert bench(folder, *arguments) == 1
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_bench_names_the_class_that_the_model_does_not_know(tmp_path, capsys):
    write_shapes(tmp_path / "shapes", 8)
    assert bench(str(tmp_path / "shapes")) == 1
    assert 'no class is called "circle"' in capsys.readouterr().err


def test_bench_says_what_a_folder_should_hold(tmp_path, capsys):
    assert bench(str(tmp_path)) == 1
    assert "is no known data set: expected labelmap.txt" in one_line(capsys)


def test_doctor_tells_what_it_sees(capsys):
    assert main(["doctor", NAME, "--size", "64"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {key.strip(): value.strip() for key, value in rows.items()}
    assert found["class tokens"] == "0"
    assert found["register tokens"] == "none"
    assert found["tokens"] == "17, of which 4x4 patches; (b, t, d), batch first"
    assert found["attention"] == "12 blocks of 3 heads (blocks.0.attn, ...)"
    assert found["path"].startswith("scaled_dot_product_attention")
    assert found["class scores"] == "linear classifier"
    assert found["GradientSeed"] == "works"
    assert found["begin with"] == "camkit.wrap(model)(photo, classes=[...])"


def test_doctor_tells_why_a_model_is_refused(capsys):
    assert main(["doctor", "pvt_v2_b0", "--size", "64"]) == 1
    assert "spatially reduced attention" in capsys.readouterr().out


def test_doctor_takes_a_model_of_ones_own(tmp_path, capsys):
    (tmp_path / "mine_to_watch.py").write_text(
        "import timm\n"
        "def build():\n"
        "    return timm.create_model('vit_tiny_patch16_224', depth=2, img_size=32)\n"
    )
    assert main(["doctor", "mine_to_watch:build", "--size", "32"]) == 0
    assert "2 blocks of 3 heads" in capsys.readouterr().out


def test_doctor_takes_the_roles_of_tokens(tmp_path, capsys):
    (tmp_path / "mine_with_a_background.py").write_text(
        "import timm, torch\n"
        "class Model(timm.models.VisionTransformer):\n"
        "    def __init__(self):\n"
        "        sizes = {'embed_dim': 48, 'num_heads': 3, 'depth': 2, 'img_size': 32}\n"
        "        super().__init__(**sizes, class_token=False, global_pool='avg')\n"
        "        self.several = torch.nn.Module()\n"
        "        self.several.cls_token = torch.nn.Parameter(torch.randn(1, 4, 48))\n"
        "    def _pos_embed(self, x):\n"
        "        tokens = self.several.cls_token.expand(len(x), -1, -1)\n"
        "        return torch.cat([tokens, super()._pos_embed(x)], 1)\n"
        "    def forward(self, pixels):\n"
        "        return self.forward_features(pixels)[:, 1:4].mean(-1)\n"
    )
    place = ["doctor", "mine_with_a_background:Model", "--size", "32"]
    assert main(place) == 0
    assert "no: the model has 4 class tokens, at 0 to 3" in capsys.readouterr().out
    assert main([*place, "--class-tokens", "1-3", "--other-tokens", "0"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {key.strip(): value.strip() for key, value in rows.items()}
    assert (found["class tokens"], found["other tokens"]) == ("1, 2, 3", "0")
    assert found["ClassAttentionSeed"] == "works"
    with pytest.raises(SystemExit):
        main([*place, "--class-tokens", "one"])
    assert "expected positions such as 0,5-8, got 'one'" in capsys.readouterr().err


def test_doctor_calls_a_model_as_its_builder_says(tmp_path, capsys):
    (tmp_path / "mine_with_a_call.py").write_text(
        "import timm\n"
        "class Model(timm.models.VisionTransformer):\n"
        "    def forward(self, pixels, scale):\n"
        "        return super().forward(pixels * scale)\n"
        "def build():\n"
        "    model = Model(embed_dim=48, num_heads=3, depth=2, img_size=32)\n"
        "    return model, lambda model, pixels: model(pixels, 2.0)\n"
    )
    assert main(["doctor", "mine_with_a_call:build", "--size", "32"]) == 0
    out = capsys.readouterr().out
    assert "camkit.wrap(model, call=call)(photo, classes=[...])" in out
    (reasons,) = (line for line in out.splitlines() if line.startswith("presets not used"))
    assert "attention blocks or more, not 2" in reasons


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere_at_all:build", "No module named 'nowhere_at_all'; expected module:name"),
        ("json:laod", "module 'json' has no attribute 'laod'; did you mean load?"),
        ("json:JSONDecoder", "gave JSONDecoder, expected a torch.nn.Module, or (model, call)"),
        ("json:__all__", "gave list, expected a torch.nn.Module"),
    ],
)
def test_doctor_says_what_it_expected_where_a_model_should_be(place, words, capsys):
    assert main(["doctor", place]) == 1
    said, error = capsys.readouterr().err.splitlines()
    assert said.startswith(f"importing {place} from ")
    assert error.startswith("camkit: ")
    assert words in error


@pytest.mark.filterwarnings("ignore::camkit.refiners.FlatMapWarning")  # random weights
def test_demo_paints_a_sheet_and_writes_its_table(monkeypatch, tmp_path, capsys, weights):
    (tmp_path / "data").mkdir()
    shutil.copytree(weights, tmp_path / "data" / "weights")
    folder = tmp_path / "data" / "voc12_animals"
    shapes(folder, classes=("cat", "dog", "horse"))
    labels = json.loads((folder / "labels.json").read_text())
    labels["classes"] += ["cow", "sheep", "person"]
    (folder / "labels.json").write_text(json.dumps(labels))
    monkeypatch.setenv("CAMKIT_DATA", str(tmp_path / "data"))
    assert main(["demo", "--model", f"{NAME}.test", *SMALL, "--photos", "2"]) == 0
    out = tmp_path / "out" / "demo"
    assert "| refined |" in (out / "table.md").read_text()
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 5 * 260
    assert "wrote out/demo/sheet.png" in capsys.readouterr().out


def test_without_local_weights_and_hub_the_error_says_where_to_put_them(capsys, tmp_path):
    name = "vit_small_patch16_224.augreg_in21k_ft_in1k"  # nothing in camkit stands in for it
    assert main(["cam", photo(tmp_path / "a.png"), "--model", name]) == 1
    asked, error = capsys.readouterr().err.splitlines()
    assert "asking timm's hub" in asked
    assert "nor from timm's hub (ConnectionError)" in error
    assert f"weights/{name}.safetensors" in error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_tny_patch16_224", 'timm has no model "vit_tny_patch16_224"'),
        (f"{NAME}.nonsense", f'no weights are called "{NAME}.nonsense"'),
    ],
)
def test_models_that_do_not_exist_are_told_without_asking_the_hub(capsys, tmp_path, name, words):
    assert main(["cam", photo(tmp_path / "a.png"), "--model", name]) == 1
    assert words in one_line(capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("broken", "cannot be read as weights"),
        ("of another model", f"does not fit {NAME}: missing cls_token, pos_embed"),
    ],
)
def test_weights_that_do_not_fit_are_told_by_their_file(
    monkeypatch, tmp_path, capsys, content, words
):
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / f"{NAME}.mine.safetensors"
    if content == "broken":
        path.write_bytes(b"no tensors")
    else:
        save_file({"head.weight": torch.zeros(5, 7)}, path)
    monkeypatch.setenv("CAMKIT_DATA", str(tmp_path))
    picture = photo(tmp_path / "a.png")
    assert main(["cam", picture, "--model", f"{NAME}.mine", "--classes", "0"]) == 1
    error = one_line(capsys)
    assert str(path) in error
    assert words in error


def test_local_weights_are_loaded_exactly(weights):
    opened = open_model(f"{NAME}.three", size=64)
    torch.manual_seed(3)
    expected = timm.create_model(NAME, num_classes=3).state_dict()
    for key, value in opened.model.state_dict().items():
        assert torch.equal(value, expected[key].half().float()), key
    assert not opened.model.training
    assert opened.source == str(weights / f"{NAME}.three.fp16.safetensors")


def test_a_method_in_words_is_used(tmp_path):
    words = ("--seed", "gradcam:variant=layercam", "--edit", "scale:1.5", "--refine", "blur:2+crf")
    assert cam(photo(tmp_path / "a.png"), "--classes", "cat", "--out", "made", *words) == 0
    found = manifest(tmp_path / "made" / "a")
    assert "GradCAMSeed(variant='layercam'" in found["seed"]
    assert (found["edit"], found["edit_blocks"]) == ("ScaleOutput(factor=1.5)", 3)
    assert found["refine"][0] == "Blur(width=2.0)"
    assert found["background_score"] == 0.5  # a CRF returns probabilities


def test_a_dotted_path_names_a_class_and_a_wrong_one_is_told(tmp_path, capsys):
    path = photo(tmp_path / "a.png")
    seed = "camkit.contrib.LogitLensSeed:1"
    assert cam(path, "--classes", "cat", "--out", "made", "--seed", seed) == 0
    assert manifest(tmp_path / "made" / "a")["seed"].startswith("LogitLensSeed(layer=1")
    assert cam(path, "--classes", "cat", "--seed", "camkit.contrib.Nothing") == 1
    assert "camkit.contrib.Nothing: cannot import this seed" in one_line(capsys)


def test_info_tells_what_a_bug_report_needs(capsys, monkeypatch, tmp_path):
    """The home folder is not named; the states are those of the environment set here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "compiled"))
    monkeypatch.setenv("CAMKIT_NATIVE", "0")
    monkeypatch.setenv("CAMKIT_KERNEL", "0")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["camkit"].startswith(f"{camkit.__version__}, ")
    assert found["versions"]["torch"] == torch.__version__
    used = found["used"]
    assert used["dense CRF on the CPU"] == "plain torch: switched off by CAMKIT_NATIVE=0"
    assert used["attention on CUDA"].startswith("plain torch: switched off by CAMKIT_KERNEL=0")
    assert found["caches"]["compiled code"] == "~/compiled, not there yet"
    assert found["environment"]["CAMKIT_CACHE"] == "~/compiled"
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert str(tmp_path) not in text
    for title, rows in found.items():
        assert f"{title}:\n" in text
        assert all(value in text for value in rows.values())
