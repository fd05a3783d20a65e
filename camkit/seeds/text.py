"""Seeds from texts: class texts, the joint space of images and texts, patch similarity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.host import is_attention
from camkit.capture.parameters import device_of
from camkit.capture.record import Capture, WatchSpec
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.ops.scaling import scaled_to_range
from camkit.seeds.protocol import above_mean, check_classes, fold_maps, pick
from camkit.tensors import Cam, Classes, Tokens


@dataclass(frozen=True, eq=False)
class JointSpace:
    """The steps of a model from the tokens that leave its last block to the space of texts.

    Attributes:
        steps: applied in order to sequences of tokens: norm, pooling head if any, projection.
        pools: whether one of the steps pools a sequence to one embedding.
        outside: the projection, if the model applies it outside of its image tower (transformers'
            CLIP).
    """

    steps: tuple[Callable[[Tensor], Tensor], ...]
    pools: bool = False
    outside: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "JointSpace":
        """Find the steps of a CLIP or SigLIP of OpenAI, open_clip or transformers.

        Args:
            model: the whole model, or its image tower.

        Raises:
            UnsupportedModelError: the model has another form.
        """
        host: Any = model
        visual = getattr(host, "visual", host)
        tower = getattr(host, "vision_model", host)
        if _has(visual, "ln_post", "proj") and getattr(visual, "attn_pool", None) is None:
            return cls((visual.ln_post.forward, partial(torch.matmul, other=visual.proj)))
        if _has(visual, "trunk", "head") and hasattr(visual.trunk, "forward_head"):
            trunk = visual.trunk
            steps = (trunk.norm.forward, trunk.forward_head, visual.head.forward)
            return cls(steps, getattr(trunk, "attn_pool", None) is not None)
        if _has(host, "visual_projection") and _has(tower, "post_layernorm"):
            project = host.visual_projection.forward
            return cls((tower.post_layernorm.forward, project), outside=project)
        if _has(tower, "post_layernorm", "head") and hasattr(tower.head, "probe"):
            return cls((tower.post_layernorm.forward, tower.head.forward), pools=True)
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a CLIP or SigLIP of a known form; name the steps from "
            "its tokens to the space of texts: "
            "camkit.seeds.JointSpace((norm.forward, projection.forward))"
        )

    def embed(
        self, tokens: Tokens, *, gradients: bool = False, unit: bool = True
    ) -> Float[Tensor, "b t D"]:
        """Embed each token separately, scaled to unit length, also with a pooling head.

        ``unit=False`` leaves the length as it is.
        """
        with torch.set_grad_enabled(gradients):
            embedded = self._run(tokens.flatten(0, 1)[:, None])
            embedded = embedded.flatten(1).unflatten(0, tokens.shape[:2])
            return F.normalize(embedded, dim=-1) if unit else embedded

    def pooled(self, tokens: Tokens, *, gradients: bool = False) -> Float[Tensor, "b D"]:
        """Embed whole sequences with the pooling head, scaled to unit length."""
        with torch.set_grad_enabled(gradients):
            return F.normalize(self._run(tokens).flatten(1), dim=-1)

    def patches(self, capture: Capture) -> Float[Tensor, "b n D"]:
        """Embed the patches."""
        return self.embed(last_tokens(capture)[:, capture.patches])

    def images(self, capture: Capture) -> Float[Tensor, "b D"]:
        """Embed whole images as the model does: by the class token, or pooled."""
        tokens = last_tokens(capture)
        if self.pools:
            return self.pooled(tokens)
        if not capture.anatomy.class_tokens:
            raise CaptureError(
                "this model has neither a class token nor a pooling head, so its image embedding "
                "cannot be computed from its tokens"
            )
        return self.embed(tokens[:, list(capture.anatomy.class_tokens[:1])])[:, 0]

    def _run(self, tokens: Tensor) -> Tensor:
        for step in self.steps:
            tokens = step(tokens)
        return tokens


def last_tokens(capture: Capture) -> Tokens:
    """Return all tokens that leave the last block, before any norm.

    They are what the last norm receives, where that takes all tokens: a host may go on with other
    tokens than the last module returned (ClearCLIP), or compute the last block itself (NACLIP).

    Raises:
        CaptureError: no recorded module returns or receives them.
    """
    shape = (capture.images, capture.blocks[-1].shape[2])
    returned: list[Tensor] = []
    for call in capture.tail:
        is_block = any(map(is_attention, call.module.modules()))
        tokens = call.output if is_block else call.input
        if tokens.dim() == 3 and tokens.shape[:2] == shape:
            if not is_block:
                return tokens
            returned.append(tokens)
    if not returned:
        raise CaptureError(
            "the tokens that leave the last block were not recorded; no module behind the last "
            "attention returns or takes (b, t, d) tokens"
        )
    return returned[0]


def _has(module: Any, *names: str) -> bool:
    return all(getattr(module, name, None) is not None for name in names)


TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "there is a {} in the scene.")
"""Prompts whose embeddings are averaged, after those of CLIP (Radford et al. 2021)."""

BACKGROUND = (
    "ground", "grass", "tree", "sky", "water", "sea", "road", "street", "building", "wall", "house",
    "floor", "mountain", "cloud", "railway", "bridge",
)  # fmt: skip
"""Background texts: a list of our own, after the idea of CLIP-ES (Lin et al. 2023)."""


@dataclass(frozen=True, eq=False)
class TextClasses:
    """Embeddings of class names and of background texts, in the space of images and texts.

    Attributes:
        names: of the classes.
        embeddings: one row per class; scaled to unit length.
        background: one row per background text; None uses no background texts.
        space: the steps from the model's tokens to this space.
        scale: factor of the cosines, the model's logit scale.
        bias: added to the scaled cosines (SigLIP).
    """

    names: tuple[str, ...]
    embeddings: Float[Tensor, "C D"] = field(repr=False)
    background: Float[Tensor, "B D"] | None = field(default=None, repr=False)
    space: JointSpace | None = field(default=None, repr=False)
    scale: float = 100.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        if len(self.names) != len(self.embeddings) or not self.names:
            raise ValueError(
                f"`embeddings` must have one row for each of the {len(self.names)} names, got "
                f"{len(self.embeddings)}"
            )
        if not self.scale > 0.0:
            raise ValueError(f"`scale` must be positive, got {self.scale}")
        width = self.embeddings.shape[1]
        if self.background is not None and self.background.shape[1] != width:
            raise ValueError(
                f"`background` must be as wide as `embeddings`, {width}, got "
                f"{self.background.shape[1]}"
            )
        for name, rows in (("embeddings", self.embeddings), ("background", self.background)):
            if rows is not None:
                if not (rows.isfinite().all() and (rows.norm(dim=-1) > 0).all()):
                    raise ValueError(f"`{name}` must hold finite rows that are not zero")
                object.__setattr__(self, name, F.normalize(rows.detach(), dim=-1))

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_prompts(
        cls,
        model: nn.Module,
        names: Sequence[str],
        *,
        tokenize: Callable[[list[str]], Any],
        templates: Sequence[str] = TEMPLATES,
        background: Sequence[str] = BACKGROUND,
    ) -> "TextClasses":
        """Encode prompts with a model's own text tower.

        The embeddings of a class's prompts are scaled to unit length and averaged.

        Args:
            model: CLIP or SigLIP with both towers, of OpenAI, open_clip or transformers.
            names: of the classes; synonyms, separated by commas, are averaged too.
            tokenize: turns a list of prompts into the input of the text tower:
                ``open_clip.get_tokenizer(...)``, or a transformers tokenizer with
                ``padding=True, return_tensors="pt"`` (SigLIP: ``padding="max_length"``).
            templates: prompts with ``{}`` in the place of the name.
            background: texts for everything outside the classes; empty for none.

        Raises:
            UnsupportedModelError: the model has no text tower of a known form.
        """
        without = [template for template in templates if "{}" not in template]
        if without or not templates:
            raise ValueError(f"`templates` must hold {{}} in the place of the name, got {without}")
        if isinstance(names, str) or not names:
            raise ValueError(f"`names` must be a list of at least one name, got {names!r}")

        def embed(texts: Sequence[str]) -> Tensor:
            return torch.stack([_embed_name(model, text, templates, tokenize) for text in texts])

        logit_scale: Any = getattr(model, "logit_scale", None)
        logit_bias: Any = getattr(model, "logit_bias", None)
        return cls(
            tuple(names),
            embed(names),
            embed(background) if background else None,
            JointSpace.of(model),
            100.0 if logit_scale is None else float(logit_scale.detach().exp()),
            0.0 if logit_bias is None else float(logit_bias.detach()),
        )

    def scores(self, output: Any) -> Float[Tensor, "b C"]:
        """Score the classes from a model's output; for ``camkit.watch(scores=...)``."""
        embedding = _embedding_of(output)
        width = self.embeddings.shape[1]
        outside = None if self.space is None else self.space.outside
        if embedding.shape[-1] != width and outside is not None:
            embedding = outside(embedding)
        if embedding.shape[-1] != width:
            raise ValueError(
                f"the model returns embeddings of {embedding.shape[-1]} channels, but those of the "
                f"texts have {width}; use texts that were embedded by the same model"
            )
        return self.logits(F.normalize(embedding, dim=-1))

    def logits(self, embedded: Float[Tensor, "... D"]) -> Float[Tensor, "... C"]:
        """Return the model's scores of embeddings of unit length."""
        return self.scale * self.similarity(embedded) + self.bias

    def similarity(
        self, embedded: Float[Tensor, "... D"], *, background: bool = False
    ) -> Float[Tensor, "... C"]:
        """Return cosines with the classes, then, if ``background``, with the background texts."""
        rows = self.embeddings
        if background and self.background is not None:
            rows = torch.cat([rows, self.background])
        return embedded @ rows.to(embedded).mT

    def known_space(self) -> JointSpace:
        """Return ``space``, or raise ValueError if it is None."""
        if self.space is None:
            raise ValueError(
                "these TextClasses have no `space`, so tokens cannot be compared with them; pass "
                "`space=camkit.seeds.JointSpace.of(model)`"
            )
        return self.space


def _embedding_of(output: Any) -> Tensor:
    """Find the embedding in a tower's output: a tensor, the first of a tuple, or a field."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in ("image_embeds", "pooler_output", "image_features"):
            if isinstance(output.get(name), Tensor):
                return output[name]
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UnsupportedModelError(
        f"expected an embedding, got a {type(output).__name__}; return a tensor, a tuple that "
        "begins with one, or an object with image_embeds or pooler_output"
    )


def _embed_name(
    model: Any, name: str, templates: Sequence[str], tokenize: Callable[[list[str]], Any]
) -> Float[Tensor, " D"]:
    """Average the embeddings of all prompts of a name."""
    synonyms = [part.strip() for part in name.split(",") if part.strip()]
    if not synonyms:
        raise ValueError("a class name must not be blank")
    prompts = [template.format(word) for word in synonyms for template in templates]
    tokens = tokenize(prompts)
    device = device_of(model)
    with torch.no_grad():
        if isinstance(tokens, Mapping) and hasattr(model, "get_text_features"):
            inputs = {key: value.to(device) for key, value in tokens.items()}
            output = model.get_text_features(**inputs)
        elif isinstance(tokens, Tensor) and hasattr(model, "get_text_features"):
            output = model.get_text_features(tokens.to(device))
        elif isinstance(tokens, Tensor) and hasattr(model, "encode_text"):
            output = model.encode_text(tokens.to(device))
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no text tower that takes a "
                f"{type(tokens).__name__} (encode_text, get_text_features); embed the prompts "
                "yourself and give camkit.seeds.TextClasses(names, embeddings)"
            )
    return F.normalize(_embedding_of(output).float(), dim=-1).mean(0)


@dataclass(frozen=True)
class TextSimilaritySeed:
    """Similarity of patch embeddings to class texts, for CLIP and similar models.

    A patch passes the same steps as the class token: last norm and projection; a pooling head
    (SigLIP) is run on the patch alone. Ours: scores below the image's mean become zero, except for
    "softmax", which has a natural zero. Attach `camkit.edits.StaticCalibration` for good maps:
    without it, CLIP's patches resemble the opposite of what they show (Li et al. 2023).

    Attributes:
        text: the classes.
        variant: "similarity" is the cosine. "softmax" is each class's share among all classes and
            background texts at the model's scale, as CLIP-ES (Lin et al. 2023) scores images; for
            patches it is ours. "surgery", after CLIP Surgery (Li et al. 2023), removes what a patch
            has in common with all texts: each cosine is weighted by the confidence of the image
            embedding in that class (softmax of twice the cosine, over its mean), and the mean over
            all texts is subtracted. Counting background texts among them is ours. "excel" is the
            code of ExCEL (Yang et al. 2025): surgery on embeddings whose channels, not tokens, have
            unit length over the image; each map is then stretched to [0, 1] over all tokens, the
            class token included, and nothing is cut.
    """

    text: TextClasses
    variant: Literal["similarity", "softmax", "surgery", "excel"] = "surgery"

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        if self.variant not in ("similarity", "softmax", "surgery", "excel"):
            raise ValueError(
                '`variant` must be "similarity", "softmax", "surgery" or "excel", got '
                f"{self.variant!r}"
            )
        surgery = self.variant in ("surgery", "excel")
        if surgery and len(self.text) == 1 and self.text.background is None:
            raise ValueError(
                f'`variant="{self.variant}"` compares texts and needs at least two, got 1; add '
                'background texts, or use "similarity"'
            )
        if self.variant == "excel" and self.text.known_space().pools:
            raise ValueError(
                '`variant="excel"` compares patches with the class token, which a model that pools '
                'by attention (SigLIP) lacks; use "surgery"'
            )

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(classes, capture.images, len(self.text))
        maps = pick(self.scores(capture), classes)
        natural_zero = self.variant in ("softmax", "excel")
        return fold_maps(capture, maps if natural_zero else above_mean(maps), classes)

    def scores(self, capture: Capture) -> Float[Tensor, "b n C"]:
        """Return the score of every class at every patch; signed, except for "softmax", "excel"."""
        space = self.text.known_space()
        if self.variant == "excel":
            return self._stretched(capture, space)
        likeness = self.text.similarity(space.patches(capture), background=True)
        if self.variant == "softmax":
            likeness = (self.text.scale * likeness).softmax(-1)
        if self.variant == "surgery":
            whole = self.text.similarity(space.images(capture), background=True)
            likeness = _without_common(likeness, whole)
        return likeness[..., : len(self.text)]

    def _stretched(self, capture: Capture, space: JointSpace) -> Float[Tensor, "b n C"]:
        """Return ExCEL's maps."""
        place = capture.anatomy.class_tokens
        if len(place) != 1:
            raise CaptureError(
                f'`variant="excel"` needs one class token, but this model has {len(place)}; use '
                '"surgery"'
            )
        tokens = space.embed(last_tokens(capture), unit=False)
        likeness = self.text.similarity(F.normalize(tokens, dim=1), background=True)
        scores = _without_common(likeness, likeness[:, place[0]])
        return scaled_to_range(scores, (1,))[:, capture.patches, : len(self.text)]


def _without_common(
    likeness: Float[Tensor, "b n T"], whole: Float[Tensor, "b T"]
) -> Float[Tensor, "b n T"]:
    """Weigh texts by the confidence of the whole image in them, and subtract their mean."""
    confidence = (2.0 * whole).softmax(-1)
    likeness = likeness * (confidence / confidence.mean(-1, keepdim=True))[:, None]
    return likeness - likeness.mean(-1, keepdim=True)
