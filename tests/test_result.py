"""A result on disk: four files, complete or absent, and a manifest that can be trusted."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hosts import HandMade, shaken
from PIL import Image

from camkit import GradientSeed, Vocabulary, load_photo, wrap
from camkit.errors import DataError
from camkit.manifest import unfinished, weights_hash
from camkit.refiners import Normalize

FILES = ["cam.npy", "manifest.json", "mask.png", "overlay.png"]
NAMES = Vocabulary(("cat", "dog", "Pferd, Roß", "cow", "sheep"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    settings = {"depth": 2, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return shaken(timm.create_model("vit_tiny_patch16_224", num_classes=5, **settings))


@pytest.fixture
def photo(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a photo.png")
    return load_photo(tmp_path / "a photo.png", size=96)


@pytest.fixture
def result(model, photo):
    pipeline = wrap(model, refine=[Normalize()], background_score=0.2, vocabulary=NAMES)
    return pipeline(photo, classes=["Roß", "cat"])


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_four_files_are_written_and_no_other(result, tmp_path):
    folder = tmp_path / "new" / "größe 画"
    assert result.save(folder) == folder
    assert files_in(folder) == FILES


def test_the_mask_is_a_palette_png_of_ids(result, tmp_path):
    with Image.open(result.save(tmp_path / "out") / "mask.png") as image:
        assert image.mode == "P"
        ids = np.array(image)
    assert np.array_equal(ids, result.mask.numpy())
    assert set(np.unique(ids).tolist()) == {0, 1, 3}


def test_the_maps_are_float32_at_photo_size(result, tmp_path):
    maps = np.load(result.save(tmp_path / "out") / "cam.npy")
    assert (maps.dtype, maps.shape) == (np.float32, (2, 40, 70))
    assert np.array_equal(maps, result.cam[0].numpy())


def test_the_overlay_is_the_photo_where_nothing_is_marked(result, photo, tmp_path):
    with Image.open(result.save(tmp_path / "out") / "overlay.png") as image:
        painted = np.array(image.convert("RGB"))
    with Image.open(photo.path) as image:
        original = np.array(image)
    background = result.mask.numpy() == 0
    assert np.array_equal(painted[background], original[background])
    assert (painted[~background] != original[~background]).any()


def test_the_manifest_tells_settings_classes_and_versions(result, model, photo, tmp_path):
    text = (result.save(tmp_path / "out") / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert "Roß" in text
    assert manifest["photo"] == str(photo.path)
    assert (manifest["size"], manifest["model_size"]) == ([40, 70], [48, 96])
    assert manifest["classes"] == [{"index": 2, "name": "Pferd, Roß"}, {"index": 0, "name": "cat"}]
    assert manifest["legend"] == {"1": "cat", "3": "Pferd, Roß"}
    assert manifest["seed"] == repr(GradientSeed())
    assert manifest["refine"] == [repr(Normalize())]
    assert manifest["background_score"] == 0.2
    assert manifest["environment"]["torch"] == torch.__version__
    assert manifest["weights_sha256"] == weights_hash(model)
    with torch.no_grad():
        assert manifest["most_probable_output"] == int(model(photo.pixels).argmax())


def test_a_result_of_an_array_is_saved_too(result, photo, tmp_path):
    bare = replace(result, photo=replace(photo, path=None))
    assert files_in(bare.save(tmp_path / "out")) == FILES
    assert bare.manifest()["photo"] is None
    assert bare.picture().shape == (40, 70, 3)


def test_saving_again_replaces_what_stood_there(result, tmp_path):
    folder = result.save(tmp_path / "out")
    replace(result, mask=torch.zeros_like(result.mask)).save(folder)
    assert files_in(folder) == FILES
    with Image.open(folder / "mask.png") as image:
        assert not np.array(image).any()


def test_a_manifest_that_cannot_be_written_leaves_no_part_of_itself(result, tmp_path):
    broken = replace(result, settings={"mine": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(tmp_path / "out")
    assert files_in(tmp_path / "out") == ["cam.npy", "mask.png", "overlay.png"]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_way_leaves_no_partial_file(result, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(OSError, match=name):
        result.save(tmp_path / "out")
    left = files_in(tmp_path / "out")
    assert set(left) <= set(FILES)
    assert name == "manifest.json" or "manifest.json" not in left


def test_a_photo_that_is_gone_is_told_and_no_manifest_appears(result, photo, tmp_path):
    photo.path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        result.save(tmp_path / "out")
    assert "manifest.json" not in files_in(tmp_path / "out")


def test_a_block_that_raises_keeps_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(TypeError, match="must be str"), unfinished(path) as draft:
        draft.write_text("half of the n") + draft.write_text(3)
    assert files_in(tmp_path) == ["kept.txt"]
    assert path.read_text() == "old"


def test_nothing_stands_under_the_name_before_the_end(tmp_path):
    path = tmp_path / "new.txt"
    with unfinished(path) as draft:
        draft.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert files_in(tmp_path) == ["new.txt"]


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "画" * 83 + ".txt"])
def test_names_as_long_as_the_file_system_takes_are_written(tmp_path, name):
    with unfinished(tmp_path / name) as draft:
        draft.write_text("whole")
    assert (tmp_path / name).read_text() == "whole"


def test_equal_weights_have_equal_hashes_and_one_changed_weight_another():
    model = HandMade()
    twin = copy.deepcopy(model)
    before = weights_hash(model)
    assert weights_hash(twin) == before
    with torch.no_grad():
        twin.head.bias[3] += 1e-3
    assert weights_hash(twin) != before
    twin.load_state_dict(model.state_dict())
    assert weights_hash(twin) == before


def through_data(model):
    model.head.weight.data.mul_(2.0)  # as moving averages of old do


def through_no_grad(model):
    with torch.no_grad():
        model.blocks[0].qkv.weight.add_(1.0)


def by_replacing(model):
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)


def by_an_optimizer(model):
    model(torch.randn(1, 3, 16, 24)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def in_a_buffer(model):
    model.stem.running_mean.fill_(1.0)


@pytest.mark.parametrize(
    "write", [through_data, through_no_grad, by_replacing, by_an_optimizer, in_a_buffer]
)
def test_a_hash_taken_before_does_not_hide_a_write(write):
    model = HandMade(batch_norm=True).eval()
    before = weights_hash(model)
    write(model)
    after = weights_hash(model)
    assert after != before
    assert after == weights_hash(copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_precision_is_another_hash(dtype):
    model = HandMade()
    assert weights_hash(copy.deepcopy(model).to(dtype)) != weights_hash(model)
