"""Photos in every form, prepared as the model expects them."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from helpers import state_of
from PIL import Image
from torch import nn

import camkit
from camkit.data import draw_shapes
from camkit.errors import CamkitError, DataError
from camkit.inputs import photo_settings, to_photo
from camkit.photo import PhotoSettings

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def vit(**options):
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    name = options.pop("name", "vit_tiny_patch16_224")
    return timm.create_model(name, **(small | {"dynamic_img_size": True} | options)).eval()


@pytest.fixture(scope="module")
def refined():
    torch.manual_seed(0)
    return camkit.wrap(vit(), photos=PhotoSettings(size=64))


@pytest.fixture(scope="module")
def picture():
    return draw_shapes(1, size=(48, 64))[0][0]


def forms(picture, folder):
    path = folder / "picture.png"
    image = Image.fromarray(picture)
    image.save(path)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    return {
        "text": str(path),
        "path": path,
        "PIL": image,
        "palette": image.convert("RGBA"),
        "array": picture,
        "16 bits": picture.astype(np.uint16) * 257,
        "floats": picture / 255,
        "tensor": tensor,
        "float tensor": tensor / 255,
        "bytes": path.read_bytes(),
        "file": io.BytesIO(path.read_bytes()),
    }


def test_every_form_of_a_picture_is_the_same_photo(refined, picture, tmp_path):
    expected = camkit.photo_from_array(picture, size=64)
    for name, form in forms(picture, tmp_path).items():
        photo = to_photo(form, refined.photos)
        assert torch.equal(photo.pixels, expected.pixels), name
        assert photo.size == (48, 64), name
        assert np.array_equal(refined(photo, classes=[1]).picture(), picture), name


def test_a_list_gives_the_results_of_its_photos_in_order(refined, picture, tmp_path):
    tall = np.ascontiguousarray(picture.transpose(1, 0, 2))
    mixed = [picture, tall, picture[:, ::-1], Image.fromarray(tall), picture]
    asked = [[1], [0, 2], [2], [1], [0]]
    for result, form, classes in zip(refined(mixed, classes=asked), mixed, asked, strict=True):
        alone = refined(form, classes=classes)
        assert result.classes == tuple(classes)
        assert result.cam.shape == alone.cam.shape
        assert torch.allclose(result.cam, alone.cam, atol=1e-4)
        assert (result.mask != alone.mask).float().mean() < 0.01
    assert refined([]) == []


def test_photos_of_one_size_share_forwards(picture):
    model, batches = vit(), []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    pipeline = camkit.wrap(model, seed=camkit.GradientSeed(), photos={"mean": 0.5, "std": 0.5})
    pipeline(picture)
    batches.clear()
    tall = picture.transpose(1, 0, 2)
    pipeline([picture, tall, picture, picture], classes=1)
    assert sorted(batches) == [1, 3]
    batches.clear()
    assert len(pipeline(np.stack([picture] * 10))) == 10
    assert batches == [8, 2]


def test_a_wrong_request_for_a_list_fails_before_any_photo_is_read(refined):
    with pytest.raises(ValueError, match=r"one list for each of 2 images.*\[\[1, 2\]\] \* 2"):
        refined(["none.jpg", "none.jpg"], classes=[1])
    with pytest.raises(DataError, match=r"none\.jpg does not exist"):
        refined(["none.jpg", "none.jpg"], classes=[[1], [2]])


def test_normalised_pixels_are_used_as_they_are(refined, picture):
    photo = camkit.photo_from_array(picture, size=64)
    found = to_photo(photo.pixels[0], refined.photos)
    assert torch.equal(found.pixels, photo.pixels)
    assert torch.allclose(found.rgb, photo.rgb, atol=1 / 255)
    batch = refined(photo.pixels, classes=[[1]])
    assert torch.equal(batch[0].cam, refined(photo, classes=[1]).cam)
    other = PhotoSettings(64, *IMAGENET)  # these pixels were not normalised with ImageNet's values
    with pytest.raises(ValueError, match=r"colours in \[0, 1\], or 3 channels normalised with"):
        to_photo(photo.pixels[0] * 4, other)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (5, TypeError, "a photo must be a path, a PIL image, .* got int"),
        ({"image": 1}, TypeError, "got dict"),
        ("https://example.com/cat.jpg", ValueError, "is an address; download the photo first"),
        (b"no image", DataError, "the image cannot be read as an image"),
        (
            torch.zeros(2, 3, 4, 5, 6),
            ValueError,
            r"shape \(channels, H, W\), got \(2, 3, 4, 5, 6\)",
        ),
        (torch.full((3, 8, 8), float("nan")), ValueError, "a float tensor must hold colours"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, None),
    ],
)
def test_what_is_no_photo_is_refused(refined, value, error, words, no_shape_checks):
    if words is None:  # the first three channels serve as colours
        assert to_photo(value, refined.photos).pixels.shape == (1, 3, 64, 64)
        return
    with pytest.raises(error, match=words):
        refined(value)


def test_a_model_of_timm_states_what_it_expects():
    assert photo_settings(vit()) == PhotoSettings(384, (0.5,) * 3, (0.5,) * 3, 16, 3)
    fixed = vit(dynamic_img_size=False)
    assert photo_settings(fixed).size == (224, 224)
    assert photo_settings(vit(dynamic_img_size=False, img_size=(64, 96))).size == (64, 96)
    clip = photo_settings(vit(name="vit_base_patch16_clip_224.openai"))
    assert (clip.mean, clip.std) == CLIP
    dino = photo_settings(vit(name="vit_small_patch14_dinov2.lvd142m"), size=518)
    assert (dino.mean, dino.std, dino.multiple, dino.size) == (*IMAGENET, 14, 518)


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_segment_pictures(channels, picture):
    torch.manual_seed(0)
    model = vit(in_chans=channels)
    before = state_of(model)
    refined = camkit.wrap(model)
    settings = refined.photos
    assert (settings.channels, settings.mean) == (channels, (0.5,) * channels)
    alpha = np.full((*picture.shape[:2], 1), 255, np.uint8)
    result = refined(np.concatenate([picture, alpha], axis=2), classes=[1])
    assert result.photo.pixels.shape[1] == channels
    assert result.mask.shape == picture.shape[:2]
    assert state_of(model) == before
    grey = refined(picture[:, :, 0] if channels == 1 else Image.fromarray(picture), classes=[1])
    assert grey.picture().shape == picture.shape


def test_a_grey_model_of_three_numbers_takes_their_mean():
    model = vit(name="vit_base_patch16_clip_224.openai", in_chans=1)
    assert photo_settings(model).mean == pytest.approx([sum(CLIP[0]) / 3])
    four = vit(name="vit_base_patch16_clip_224.openai", in_chans=4)
    with pytest.raises(CamkitError, match="takes 4 channels, but its mean and std have 3 numbers"):
        photo_settings(four)


class Plain(nn.Module):
    """A user's own model, which states nothing."""

    def __init__(self):
        super().__init__()
        self.inner = vit()

    def forward(self, pixels):
        return self.inner(pixels)


def test_a_model_that_states_nothing_is_asked_for(picture):
    refined = camkit.wrap(Plain())
    with pytest.raises(CamkitError, match=r"Plain does not state .*photos=\{'mean': \(0.485"):
        refined(picture)
    photo = camkit.photo_from_array(picture, size=64)
    assert refined(photo, classes=[1]).mask.shape == (48, 64)  # a photo is ready as it is
    given = camkit.wrap(Plain(), photos={"mean": IMAGENET[0], "std": IMAGENET[1], "size": 64})
    assert given.photos == PhotoSettings(64, *IMAGENET)
    assert given(picture, classes=[1]).mask.shape == (48, 64)


def test_mean_and_std_are_read_off_processors_and_transforms():
    transforms = pytest.importorskip("torchvision.transforms")
    processor = SimpleNamespace(image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 1], do_normalize=True)
    raw = SimpleNamespace(image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 1], do_normalize=False)
    steps = [transforms.Resize(9), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    timms = timm.data.create_transform((3, 224, 224), mean=CLIP[0], std=CLIP[1])
    model = Plain()
    assert photo_settings(model, processor).mean == (0.1, 0.2, 0.3)
    assert photo_settings(model, raw) == PhotoSettings(384, (0.0,) * 3, (1.0,) * 3)
    assert photo_settings(model, transforms.Compose(steps)).std == IMAGENET[1]
    assert photo_settings(model, timms).mean == pytest.approx(CLIP[0])
    assert photo_settings(model, transforms.Compose([transforms.ToTensor()])).mean == (0.0,) * 3
    with pytest.raises(TypeError, match=r"has \['average'\]; it may hold mean, std and size"):
        photo_settings(model, {"average": 0.5})


def test_torchvision_and_transformers_keep_their_fixed_size(picture, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    small = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 3}
    tower = torchvision.models.VisionTransformer(64, 16, **small).eval()
    assert photo_settings(tower) == PhotoSettings((64, 64), *IMAGENET)
    assert camkit.wrap(tower)(picture, classes=[1]).mask.shape == (48, 64)

    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=64,
        id2label={0: "cat", 1: "dog", 2: "cow"},
    )
    model = transformers.ViTForImageClassification(config).eval()
    with pytest.raises(CamkitError, match="does not state how its photos are normalised"):
        photo_settings(model)
    model.save_pretrained(tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    size = {"height": 64, "width": 64}
    processor = transformers.ViTImageProcessor(image_mean=mean, image_std=std, size=size)
    processor.save_pretrained(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    settings = photo_settings(model)
    assert settings == PhotoSettings((64, 64), tuple(mean), tuple(std))
    refined = camkit.wrap(model, scores=None)
    result = refined(picture, classes=["dog"])
    assert (result.names, result.legend) == (("dog",), {2: "dog"})


def test_a_tower_of_open_clip_states_what_it_expects():
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(16, vision, text).eval()
    open_clip.set_model_preprocess_cfg(model, {"mean": CLIP[0], "std": CLIP[1], "size": 64})
    for tower in (model, model.visual):
        settings = photo_settings(tower)
        assert (settings.mean, settings.std, settings.size) == (*CLIP, (64, 64))
