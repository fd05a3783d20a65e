"""Tiny promptable models of random weights, and segmenters whose answers are known."""

import cv2
import numpy as np
import pytest
import torch

SIDE = 64
_PROMPTS = {"hidden_size": 16, "image_size": SIDE, "mask_input_channels": 4}
_DECODER = {
    "hidden_size": 16,
    "mlp_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 16,
}
_LEVELS = [[16, 16], [8, 8], [4, 4]]


def _sam_vision():
    return {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
        "mlp_dim": 16,
        "initializer_range": 0.02,
    }


def _padding_images(transformers):
    size = {"height": SIDE, "width": SIDE}
    return transformers.SamImageProcessor(
        size={"longest_edge": SIDE},
        pad_size=size,
        mask_size={"longest_edge": SIDE},
        mask_pad_size=size,
    )


def sam(transformers):
    config = transformers.SamConfig(
        vision_config=_sam_vision(),
        prompt_encoder_config=_PROMPTS | {"patch_size": 4},
        mask_decoder_config=_DECODER,
    )
    images = _padding_images(transformers)
    return transformers.SamModel(config), transformers.SamProcessor(images)


def sam_hq(transformers):
    config = transformers.SamHQConfig(
        vision_config=_sam_vision(),
        prompt_encoder_config=_PROMPTS | {"patch_size": 4},
        mask_decoder_config=_DECODER | {"vit_dim": 16},
    )
    images = _padding_images(transformers)
    return transformers.SamHQModel(config), transformers.SamHQProcessor(images)


def _stretching_images(transformers):
    size = {"height": SIDE, "width": SIDE}
    return transformers.Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16})


def sam2(transformers):
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "num_attention_heads": 1,
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "global_attention_blocks": [3],
        "window_size_per_stage": [4, 2, 4, 2],
        "image_size": [SIDE, SIDE],
        "window_positional_embedding_background_size": [2, 2],
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "fpn_hidden_size": 16,
        "backbone_feature_sizes": _LEVELS,
    }
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config=_PROMPTS | {"patch_size": 16},
        mask_decoder_config=_DECODER,
    )
    images = _stretching_images(transformers)
    return transformers.Sam2Model(config), transformers.Sam2Processor(images)


def sam3(transformers):
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": SIDE,
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": 16,
        "backbone_feature_sizes": _LEVELS,
    }
    config = transformers.Sam3TrackerConfig(
        vision_config=vision,
        prompt_encoder_config=_PROMPTS | {"patch_size": 16},
        mask_decoder_config=_DECODER,
    )
    size = {"height": SIDE, "width": SIDE}
    images = transformers.Sam3ImageProcessor(size=size, mask_size={"height": 16, "width": 16})
    return transformers.Sam3TrackerModel(config), transformers.Sam3TrackerProcessor(images)


def edgetam(transformers):
    backbone = transformers.AutoConfig.for_model(
        "timm_wrapper",
        architecture="repvit_m0_9",
        model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    )
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [384, 192, 96, 48],
        "fpn_hidden_size": 16,
        "backbone_feature_sizes": _LEVELS,
    }
    try:
        config = transformers.EdgeTamConfig(
            vision_config=vision,
            prompt_encoder_config=_PROMPTS | {"patch_size": 16},
            mask_decoder_config=_DECODER,
        )
    except OSError:
        pytest.skip(f"transformers {transformers.__version__} asks the Hub to check EdgeTamConfig")
    images = _stretching_images(transformers)
    return transformers.EdgeTamModel(config), transformers.Sam2Processor(images)


MAKERS = {
    "SamModel": sam,
    "SamHQModel": sam_hq,
    "Sam2Model": sam2,
    "Sam3TrackerModel": sam3,
    "EdgeTamModel": edgetam,
}


def tiny_segmenter(name):
    """A model of transformers with random weights, in evaluation mode, and its processor."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model, processor = MAKERS[name](transformers)
    return model.eval(), processor


class Planted:
    """Draws the true segment under the first positive point, the whole picture and the point.

    Args:
        segments: label image, or a function that makes one of a picture.
    """

    def __init__(self, segments):
        self.segments = segments
        self.embedded, self.asked = 0, 0

    def __repr__(self):
        return "Planted()"

    def embed(self, picture):
        self.embedded += 1
        return self.segments(picture) if callable(self.segments) else self.segments

    def masks(self, embedding, prompts):
        self.asked += len(prompts)
        masks = np.zeros((len(prompts), 3, *embedding.shape), bool)
        for mask, prompt in zip(masks, prompts, strict=True):
            col, row = (int(place) for place in prompt.points[0])
            mask[0] = embedding == embedding[row, col]
            mask[1] = True
            mask[2, row, col] = True
        return masks, np.tile([0.9, 1.0, 0.8], (len(prompts), 1))


def by_colour(picture):
    """Segments of a picture: connected pixels of about the same colour, of 16 levels each."""
    levels = (picture // 64).astype(np.int64) @ np.array([16, 4, 1])
    segments, count = np.zeros(levels.shape, np.int64), 0
    for level in np.unique(levels):
        found, labels = cv2.connectedComponents((levels == level).astype(np.uint8))
        segments += np.where(labels > 0, labels + count, 0)
        count += found
    return segments
