"""Promptable segmenters: prompts land where they were asked, and models stay as they were."""

import copy
import pickle
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny_segmenters import MAKERS, SIDE, Planted, tiny_segmenter

from camkit import CamkitError
from camkit.capture import Capture
from camkit.refiners import PromptedRefine
from camkit.segmenters import (
    CallableSegmenter,
    PretrainedSegmenter,
    Prompt,
    as_segmenter,
)
from camkit.segmenters.embeddings import EmbeddingCache

SIZES = {"wide": (40, 100), "tall": (90, 30), "odd": (57, 41), "square": (64, 64), "tiny": (7, 9)}
every_model = pytest.mark.parametrize("name", MAKERS)
every_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def picture(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def prompt(*points, box=None, mask=None, positive=None):
    places = np.array(points, float).reshape(-1, 2)
    box = None if box is None else tuple(box)
    return Prompt(places, np.array(positive or [True] * len(places), bool), box, mask)


def rectangle(size, box, inside=5.0, outside=-5.0):
    x0, y0, x1, y1 = box
    mask = np.full(size, outside, np.float32)
    mask[y0 : y1 + 1, x0 : x1 + 1] = inside
    return mask


class Recorded:
    """What a module is called with, and what it answers instead of its own answer, if anything."""

    def __init__(self, module, answer=None):
        self.given, self.answer = {}, answer
        self._handles = [
            module.register_forward_pre_hook(self._keep, with_kwargs=True),
            module.register_forward_hook(self._replace),
        ]

    def _keep(self, _, args, kwargs):
        self.given = dict(enumerate(args)) | kwargs

    def _replace(self, _module, _args, output):
        return None if self.answer is None else self.answer(output)

    def remove(self):
        for handle in self._handles:
            handle.remove()


def center(mask):
    """Mean column and row of the pixels of a mask, in units of its size."""
    rows, cols = np.nonzero(mask)
    return np.array([(cols.mean() + 0.5) / mask.shape[1], (rows.mean() + 0.5) / mask.shape[0]])


# -- transformers


@every_size
@every_model
def test_points_and_boxes_reach_the_model_where_its_processor_puts_them(name, size):
    model, processor = tiny_segmenter(name)
    rows, cols = size
    points, box = [[0, 0], [cols - 1, rows // 2]], [1, 2, cols - 2, rows - 1]
    segmenter, seen = as_segmenter((model, processor)), Recorded(model.prompt_encoder)
    segmenter.masks(segmenter.embed(picture(size)), [prompt(*points, box=box)])
    wanted = processor(
        images=picture(size), input_points=[[points]], input_boxes=[[box]], return_tensors="pt"
    )
    torch.testing.assert_close(seen.given["input_points"], wanted["input_points"].float())
    torch.testing.assert_close(seen.given["input_boxes"], wanted["input_boxes"].float())


@every_size
@every_model
def test_points_map_back_to_the_pixels_asked(name, size):
    """The long side fills the input, or both sides do; nothing is shifted."""
    model, processor = tiny_segmenter(name)
    rows, cols = size
    segmenter, seen = as_segmenter((model, processor)), Recorded(model.prompt_encoder)
    asked = np.array([[cols // 3, rows - 1], [cols - 1, 0]], float)
    segmenter.masks(segmenter.embed(picture(size)), [prompt(*asked)])
    pads = name in ("SamModel", "SamHQModel")
    scales = np.array([SIDE / max(size)] * 2 if pads else [SIDE / cols, SIDE / rows])
    found = seen.given["input_points"][0, 0].numpy() / scales
    np.testing.assert_allclose(found, asked, atol=0.5 / SIDE * max(size))  # sides are rounded


@every_size
@every_model
def test_mask_prompts_lie_on_the_grid_where_the_picture_does(name, size):
    model, processor = tiny_segmenter(name)
    rows, cols = size
    box = (cols // 2, rows // 4, cols - 1, rows // 2)  # off the middle, so turns are seen
    segmenter, seen = as_segmenter((model, processor)), Recorded(model.prompt_encoder)
    embedding = segmenter.embed(picture(size))
    segmenter.masks(embedding, [prompt(box=box, mask=rectangle(size, box))])
    grid = seen.given["input_masks"][0, 0].numpy()
    pads = name in ("SamModel", "SamHQModel")
    assert grid.shape == ((64, 64) if pads else (16, 16))
    long = max(size)
    share = np.array([cols / long, rows / long]) if pads else np.ones(2)
    wanted = center(rectangle(size, box) > 0) * share
    np.testing.assert_allclose(center(grid > 0), wanted, atol=1.5 / min(len(grid), *size))
    np.testing.assert_allclose(grid[[0, -1], [0, 0]], -5, rtol=1e-6)  # so does the padding


@every_size
@every_model
def test_masks_come_back_where_the_decoder_drew_them(name, size):
    model, processor = tiny_segmenter(name)
    rows, cols = size
    box = (cols // 2, rows // 4, cols - 1, rows // 2)
    segmenter, seen = as_segmenter((model, processor)), Recorded(model.prompt_encoder)
    embedding = segmenter.embed(picture(size))
    segmenter.masks(embedding, [prompt(box=box, mask=rectangle(size, box))])
    drawn = seen.given["input_masks"]  # the mask of the prompt, drawn by the decoder

    def answer(output):
        low = torch.nn.functional.interpolate(drawn, output[0].shape[-2:], mode="bilinear")
        return (low[:, None].expand_as(output[0]), *output[1:])

    seen.remove()
    replaced = Recorded(model.mask_decoder, answer)
    masks, _ = segmenter.masks(embedding, [prompt(box=box)])
    replaced.remove()
    assert masks.shape == (1, 3, *size)
    assert masks.dtype == bool
    tolerance = 0.5 / 4 + 1 / min(size)  # the grid of the smallest model has 16 cells
    np.testing.assert_allclose(
        center(masks[0, 0]), center(rectangle(size, box) > 0), atol=tolerance
    )


@every_model
def test_prompts_of_several_forms_are_answered_in_their_order(name):
    """Each as if it were asked alone: with points, boxes, masks, or several of them."""
    segmenter, size = as_segmenter(tiny_segmenter(name)), (40, 57)
    box = (3, 2, 30, 20)
    prompts = [
        prompt([5, 6]),
        prompt([5, 6], [7, 8], positive=[True, False]),
        prompt(box=box),
        prompt([5, 6], box=box),
        prompt([9, 30]),
        prompt([5, 6], box=box, mask=rectangle(size, box)),
    ]
    embedding = segmenter.embed(picture(size))
    together, ious = segmenter.masks(embedding, prompts * 3)  # more than a batch of points
    for place, each in enumerate(prompts * 3):
        alone, iou = segmenter.masks(embedding, [each])
        np.testing.assert_allclose(ious[place], iou[0], rtol=1e-4, atol=1e-6)
        assert (together[place] != alone[0]).mean() < 1e-3
    assert len({mask.tobytes() for mask in together}) == len(prompts)


@every_model
def test_answers_are_those_of_the_model_called_by_hand(name):
    model, processor = tiny_segmenter(name)
    size, points, box = (40, 57), [[5, 6], [20, 9]], [3, 2, 30, 20]
    inputs = processor(
        images=picture(size),
        input_points=[[points]],
        input_labels=[[[1, 0]]],
        input_boxes=[[box]],
        return_tensors="pt",
    )
    with torch.no_grad():
        floats = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        sizes = {k: floats.pop(k) for k in list(floats) if k.endswith("sizes")}
        output = model(**floats)
    wanted = processor.image_processor.post_process_masks(
        output.pred_masks[0][None],
        *(value.tolist() for value in sizes.values()),
        **({"pad_size": {"height": SIDE, "width": SIDE}} if len(sizes) == 2 else {}),
    )[0][0]
    segmenter = as_segmenter((model, processor))
    asked = prompt(*points, box=box, positive=[True, False])
    masks, ious = segmenter.masks(segmenter.embed(picture(size)), [asked])
    np.testing.assert_allclose(ious[0], output.iou_scores[0, 0].numpy(), rtol=1e-4, atol=1e-6)
    assert (masks[0] != wanted.numpy()).mean() < 1e-3


@every_model
def test_an_embedding_has_features_of_the_picture_alone(name):
    segmenter = as_segmenter(tiny_segmenter(name))
    features = segmenter.features(segmenter.embed(picture((16, 64))))
    rows, cols = features.shape[1:]
    assert (rows, cols) == ((4, 16) if "HQ" in name or name == "SamModel" else (4, 4))


def test_a_model_of_half_precision_is_asked_in_its_own():
    model, processor = tiny_segmenter("SamModel")
    segmenter = as_segmenter((model.bfloat16(), processor))
    box = (3, 2, 30, 20)
    asked = prompt([5, 6], box=box, mask=rectangle((40, 57), box))
    masks, ious = segmenter.masks(segmenter.embed(picture((40, 57))), [asked])
    assert masks.shape == (1, 3, 40, 57)
    assert ious.dtype == np.float32


# -- borrowed


def state_of(model):
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [(p.requires_grad, p.grad) for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "bits": [value.clone() for value in model.state_dict().values()],
        "random": torch.random.get_rng_state(),
    }


def assert_same(before, after):
    assert before["modes"] == after["modes"]
    assert before["flags"] == after["flags"]
    assert before["hooks"] == after["hooks"]
    assert all(torch.equal(*pair) for pair in zip(before["bits"], after["bits"], strict=True))
    assert torch.equal(before["random"], after["random"])


@pytest.mark.parametrize("fails", [False, True], ids=["answers", "raises"])
@every_model
def test_a_borrowed_model_is_left_as_it_was(name, fails):
    model, processor = tiny_segmenter(name)
    model.train()
    model.mask_decoder.eval()
    next(model.parameters()).requires_grad_(False)
    modes = []

    def hook(module, args, kwargs):
        modes.append((module.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("stopped")

    model.vision_encoder.register_forward_pre_hook(hook, with_kwargs=True)
    segmenter, before = as_segmenter((model, processor)), state_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="stopped"):
            segmenter.embed(picture((40, 57)))
    else:
        segmenter.masks(segmenter.embed(picture((40, 57))), [prompt([3, 4])])
    assert modes == [(False, False)]
    assert_same(before, state_of(model))
    assert torch.is_grad_enabled()


def test_a_model_moved_out_of_inference_mode_still_answers():
    segmenter = as_segmenter(tiny_segmenter("SamModel"))
    with torch.inference_mode():
        inside = segmenter.masks(segmenter.embed(picture((40, 57))), [prompt([3, 4])])
    outside = segmenter.masks(segmenter.embed(picture((40, 57))), [prompt([3, 4])])
    assert np.array_equal(inside[0], outside[0])


# -- the predictors of the original packages


def sam_predictor():
    package = pytest.importorskip("segment_anything")
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    torch.manual_seed(0)
    sam = Sam(
        image_encoder=ImageEncoderViT(
            depth=2,
            embed_dim=16,
            img_size=SIDE,
            num_heads=2,
            patch_size=4,
            out_chans=16,
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=16,
            image_embedding_size=(16, 16),
            input_image_size=(SIDE,) * 2,
            mask_in_chans=4,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=16, num_heads=2),
            transformer_dim=16,
            iou_head_hidden_dim=16,
        ),
    )
    return package.SamPredictor(sam.eval())


def sam2_predictor():
    for package in ("sam2", "hydra"):
        if find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hydra's own
        return _sam2_predictor()


def _sam2_predictor():
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.utils import instantiate
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    GlobalHydra.instance().clear()
    with initialize_config_module("sam2", version_base="1.2"):
        config = compose("configs/sam2.1/sam2.1_hiera_t.yaml")
    torch.manual_seed(0)
    return SAM2ImagePredictor(instantiate(config.model, _recursive_=True).eval())


@every_size
def test_a_sam_predictor_is_asked_as_it_asks_itself_to_the_bit(size):
    predictor = sam_predictor()
    rows, cols = size
    points, labels = np.array([[0, 1], [cols - 1, rows // 2]]), np.array([1, 0])
    box = (1, 1, cols - 2, rows - 1)
    segmenter = as_segmenter(predictor)
    embedding = segmenter.embed(picture(size))
    asked = prompt(*points, box=box, positive=[True, False])
    masks, ious = segmenter.masks(embedding, [asked])
    predictor.set_image(picture(size))
    wanted, wanted_ious, low = predictor.predict(points, labels, np.array(box))
    assert np.array_equal(masks[0], wanted)
    assert np.array_equal(ious[0], wanted_ious)
    grid = embedding.frame.on_grid(torch.from_numpy(rectangle(size, box))[None], low.shape[-2:])
    with_mask = prompt(*points, box=box, positive=[True, False], mask=rectangle(size, box))
    masks, ious = segmenter.masks(embedding, [with_mask])
    wanted, wanted_ious, _ = predictor.predict(points, labels, np.array(box), grid[0].numpy())
    assert np.array_equal(masks[0], wanted)
    assert np.array_equal(ious[0], wanted_ious)


def test_sam_of_transformers_and_of_its_authors_get_the_same_input():
    """Pixels, points, boxes and masks; only the resizing of the picture rounds differently."""
    predictor, size, box = sam_predictor(), (40, 57), (3, 2, 30, 20)
    theirs, ours = as_segmenter(predictor), as_segmenter(tiny_segmenter("SamModel"))
    frames = [each.embed(picture(size)).frame for each in (theirs, ours)]
    assert frames[0] == frames[1]
    asked = [prompt([5, 6], box=box, mask=rectangle(size, box))]
    seen = Recorded(predictor.model.prompt_encoder), Recorded(ours.model.prompt_encoder)
    for segmenter in (theirs, ours):
        segmenter.masks(segmenter.embed(picture(size)), asked)
    torch.testing.assert_close(seen[0].given["points"][0], seen[1].given["input_points"][:, 0])
    torch.testing.assert_close(seen[0].given["boxes"], seen[1].given["input_boxes"][:, 0])
    torch.testing.assert_close(seen[0].given["masks"], seen[1].given["input_masks"])


@pytest.mark.parametrize("make", [sam_predictor, sam2_predictor])
def test_a_predictor_keeps_its_own_picture_also_after_an_error(make):
    predictor = make()
    predictor.set_image(picture((40, 57), seed=1))
    decoder = "mask_decoder" if make is sam_predictor else "sam_mask_decoder"
    calls = []

    def third_fails(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stopped")

    getattr(predictor.model, decoder).register_forward_hook(third_fails)
    before, model = dict(vars(predictor)), state_of(predictor.model)
    segmenter = as_segmenter(predictor)
    embedding = segmenter.embed(picture((30, 31)))
    segmenter.masks(embedding, [prompt([3, 4]), prompt([5, 6], box=(1, 2, 9, 9)), prompt([1, 1])])
    with pytest.raises(RuntimeError, match="stopped"):
        segmenter.masks(embedding, [prompt([3, 4])])
    after = vars(predictor)
    assert before.keys() == after.keys()
    assert all(after[key] is value for key, value in before.items())
    assert_same(model, state_of(predictor.model))


def test_a_sam2_predictor_is_asked_as_it_asks_itself_to_the_bit():
    predictor, size, box = sam2_predictor(), (40, 57), (3, 2, 30, 20)
    points, labels = np.array([[0, 1], [56, 20]]), np.array([1, 0])
    segmenter = as_segmenter(predictor)
    embedding = segmenter.embed(picture(size))
    asked = prompt(*points, box=box, positive=[True, False], mask=rectangle(size, box))
    masks, ious = segmenter.masks(embedding, [asked, asked])
    alone, alone_ious = segmenter.masks(embedding, [asked])
    assert segmenter.features(embedding).shape == (256, 64, 64)
    predictor.set_image(picture(size))
    grid = embedding.frame.on_grid(torch.from_numpy(rectangle(size, box))[None], (256, 256))
    wanted, wanted_ious, _ = predictor.predict(points, labels, np.array(box), grid[0].numpy())
    assert np.array_equal(alone[0], wanted > 0)
    assert np.array_equal(alone_ious[0], wanted_ious)
    np.testing.assert_allclose(ious[1], wanted_ious, rtol=1e-4)
    assert (masks[1] != (wanted > 0)).mean() < 1e-3


# -- recognised by what they are


def test_a_function_and_an_object_with_the_methods_are_segmenters():
    planted = Planted(np.zeros((4, 5), int))
    assert as_segmenter(planted) is planted

    def ask(picture, prompts):
        return planted.masks(planted.embed(picture), prompts)

    segmenter = as_segmenter(ask)
    assert isinstance(segmenter, CallableSegmenter)
    assert "0x" not in repr(segmenter)
    masks, _ = segmenter.masks(segmenter.embed(picture((4, 5))), [prompt([1, 2])])
    assert masks[0, 0].all()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.nn.Linear(2, 2), r"must be one of SamModel, .* got Linear\(\.\.\.\)"),
        ("facebook/sam-vit-base", 'PretrainedSegmenter\\("facebook/sam-vit-base"\\) opens'),
        (Planted, "must be an object, got the class Planted"),
        (None, "got None"),
        ((3, torch.nn.Linear(2, 2)), r"got a tuple of int, Linear; camkit.segmenters.Pretrained"),
    ],
    ids=["module", "name", "class", "none", "pair"],
)
def test_other_objects_are_refused(value, words):
    with pytest.raises(TypeError, match=words):
        as_segmenter(value)


def test_a_model_without_its_processor_says_how_to_give_it():
    model, _ = tiny_segmenter("SamModel")
    with pytest.raises(CamkitError, match=r"give it as well: PromptedRefine\(\(model, processor\)"):
        as_segmenter(model)
    with pytest.raises(TypeError, match="must be the processor of SamModel, got 'sam'"):
        as_segmenter((model, "sam"))


@pytest.mark.usefixtures("no_shape_checks")
def test_a_prompt_without_its_labels_is_refused():
    with pytest.raises(ValueError, match="an entry for each of 1 points, got 2"):
        prompt([1, 2], positive=[True, False])


def test_a_mask_prompt_needs_a_point_or_a_box():
    with pytest.raises(ValueError, match="needs a point or a box, got neither"):
        prompt(mask=np.zeros((4, 5), np.float32))


# -- opened by name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for name in ("SamModel", "Sam2Model"):
        model, processor = tiny_segmenter(name)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", ["SamModel", "Sam2Model"])
def test_a_saved_segmenter_is_opened_by_its_folder_once_in_each_process(saved, name):
    opener = PretrainedSegmenter(str(saved / name), device="cpu")
    model, processor = tiny_segmenter(name)
    asked, size = [prompt([3, 4], box=(1, 2, 30, 20))], (40, 57)
    given = as_segmenter((model, processor))
    wanted = given.masks(given.embed(picture(size)), asked)
    found = opener.masks(opener.embed(picture(size)), asked)
    assert np.array_equal(found[0], wanted[0])
    assert opener.opened is opener.opened
    assert opener.identity() == given.identity()
    sent = pickle.loads(pickle.dumps(opener))
    assert "opened" not in vars(sent)
    assert sent == opener
    assert sent.identity() == opener.identity()
    assert copy.deepcopy(opener) is opener


def test_a_processor_beside_the_weights_is_found(saved):
    transformers = pytest.importorskip("transformers")
    model = transformers.SamModel.from_pretrained(saved / "SamModel")
    segmenter = as_segmenter(model)
    assert segmenter.embed(picture((16, 64))).frame.resized == (16, 64)


def test_the_identity_changes_with_the_weights():
    model, processor = tiny_segmenter("SamModel")
    segmenter = as_segmenter((model, processor))
    identity, version = segmenter.identity(), segmenter.version()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert segmenter.identity() != identity
    assert segmenter.version() != version


def test_embeddings_are_made_again_for_a_model_in_another_type():
    model, processor = tiny_segmenter("SamModel")
    refine = PromptedRefine([model, processor], min_agreement=0.0)
    cam, capture = torch.rand(1, 1, 5, 7), Capture.of_picture(torch.rand(1, 3, 40, 57))
    refine(cam, capture)
    model.bfloat16()
    refined = refine(cam, capture)
    assert torch.equal(refined, PromptedRefine((model, processor), min_agreement=0.0)(cam, capture))


def test_a_name_that_cannot_be_opened_is_an_error(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(CamkitError, match="cannot be opened as a promptable segmenter"):
        PretrainedSegmenter(str(tmp_path / "none"), online=False).identity()


def test_weights_that_miss_are_an_error(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, processor = tiny_segmenter("SamModel")
    state = {k: v for k, v in model.state_dict().items() if "iou" not in k}
    transformers.SamModel.save_pretrained(model, tmp_path, state_dict=state)
    processor.save_pretrained(tmp_path)
    with pytest.raises(CamkitError, match="not a trained segmenter: weights such as mask_decoder"):
        PretrainedSegmenter(str(tmp_path)).identity()


# -- the cache


def test_a_cache_keeps_the_photos_used_last():
    cache, made = EmbeddingCache(2), []

    def embed(photo):
        made.append(photo[0, 0, 0])
        return len(made)

    photos = [np.full((2, 2, 3), value, np.uint8) for value in range(3)]
    first = [cache.get(photos[place], 0, embed) for place in (0, 1, 0)]
    assert first == [1, 2, 1]
    cache.get(photos[2], 0, embed)  # 1 was used longest ago
    assert cache.get(photos[0], 0, embed) == 1
    assert cache.get(photos[1], 0, embed) == 4
    assert len(cache) == 2
    assert cache.get(photos[1], 1, embed) == 5  # other weights
    assert len(pickle.loads(pickle.dumps(cache))) == 0


def test_a_cache_of_none_keeps_none():
    cache, made = EmbeddingCache(0), iter([1, 2])
    assert [cache.get(picture((2, 2)), 0, lambda _: next(made)) for _ in range(2)] == [1, 2]
    assert len(cache) == 0
