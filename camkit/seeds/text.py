"""Seeds from words: text classes, the joint space of images and texts, similarity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.host import is_attention
from camkit.capture.record import Capture, WatchSpec
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds.protocol import check_classes, keep_asked, pick
from camkit.tensors import Cam, Classes, Tokens


@dataclass(frozen=True, eq=False)
class JointSpace:
    """What a model of images and texts does with the tokens that leave its last block.

    Attributes:
        steps: applied in order to sequences of tokens; norm, pooling head where there is one, and
            projection.
        pools: whether a pooling head is among them, so that whole sequences become one embedding.
        outside: the projection, where the model applies it outside of its image tower, whose
            output is then of another width (transformers' CLIP).
    """

    steps: tuple[Callable[[Tensor], Tensor], ...]
    pools: bool = False
    outside: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "JointSpace":
        """Read from CLIP or SigLIP as OpenAI, open_clip or transformers make them.

        Args:
            model: the whole model, or its image tower.

        Raises:
            UnsupportedModelError: its form is not known.
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
            f"{type(model).__name__} is no CLIP or SigLIP of a known form; say how its tokens are "
            "compared with texts: camkit.seeds.JointSpace((norm.forward, projection.forward))"
        )

    def embed(self, tokens: Tokens, *, gradients: bool = False) -> Float[Tensor, "b t D"]:
        """Embed every token alone, each as long as one; a pooling head sees one token at a time."""
        with torch.set_grad_enabled(gradients):
            found = self._run(tokens.flatten(0, 1)[:, None])
            return F.normalize(found.flatten(1).unflatten(0, tokens.shape[:2]), dim=-1)

    def pooled(self, tokens: Tokens, *, gradients: bool = False) -> Float[Tensor, "b D"]:
        """Embed whole sequences by the pooling head."""
        with torch.set_grad_enabled(gradients):
            return F.normalize(self._run(tokens).flatten(1), dim=-1)

    def patches(self, capture: Capture) -> Float[Tensor, "b n D"]:
        """Embeddings of the patches."""
        return self.embed(last_tokens(capture)[:, capture.patches])

    def images(self, capture: Capture) -> Float[Tensor, "b D"]:
        """Embeddings of whole images, as the host makes them: of its class token, or pooled."""
        tokens = last_tokens(capture)
        if self.pools:
            return self.pooled(tokens)
        if not capture.anatomy.class_tokens:
            raise CaptureError(
                "this host has neither a class token nor a pooling head, so its image embedding "
                "cannot be made of its tokens"
            )
        return self.embed(tokens[:, list(capture.anatomy.class_tokens[:1])])[:, 0]

    def _run(self, tokens: Tensor) -> Tensor:
        for step in self.steps:
            tokens = step(tokens)
        return tokens


def last_tokens(capture: Capture) -> Tokens:
    """All tokens as the last block left them, before any norm.

    Raises:
        CaptureError: no block that holds attention was seen to return them.
    """
    count = capture.blocks[-1].shape[2]
    for call in capture.tail:
        tokens = call.output
        if (
            tokens.dim() == 3
            and tokens.shape[:2] == (capture.images, count)
            and _is_block(call.module)
        ):
            return tokens
    raise CaptureError(
        "the tokens that leave the last block were not seen; its attention lies in no module that "
        "returns (b, t, d) tokens"
    )


def _is_block(module: nn.Module) -> bool:
    return any(is_attention(part) for part in module.modules())


def _has(module: Any, *names: str) -> bool:
    return all(getattr(module, name, None) is not None for name in names)


TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "there is a {} in the scene.")
"""Prompts whose embeddings are averaged, a handful like those of CLIP (Radford et al. 2021)."""

BACKGROUND = (
    "ground", "grass", "tree", "sky", "water", "sea", "road", "street", "building", "wall", "house",
    "floor", "mountain", "cloud", "railway", "bridge",
)  # fmt: skip
"""What stands behind things: a list of our own, as CLIP-ES (Lin et al. 2023) uses one."""


@dataclass(frozen=True, eq=False)
class TextClasses:
    """Embeddings of class names and of background, in the space of images and texts.

    Attributes:
        names: of the classes.
        embeddings: one row a class; scaled to length one.
        background: one row a background text; none says nothing.
        space: how tokens of the host get there.
        scale: what similarities are multiplied with, the host's logit scale.
        bias: what is added then (SigLIP).
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
        given = (("embeddings", self.embeddings), ("background", self.background))
        for name, rows in given:
            if rows is None:
                continue
            if rows.shape[1] != self.embeddings.shape[1]:
                raise ValueError(
                    f"`background` must be as wide as `embeddings`, "
                    f"{self.embeddings.shape[1]}, got {rows.shape[1]}"
                )
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

        The embeddings of a class's prompts are scaled to length one and averaged.

        Args:
            model: CLIP or SigLIP with both towers, as OpenAI, open_clip or transformers make it.
            names: of the classes; synonyms in one name, separated by commas, are averaged as well.
            tokenize: what the model's text tower takes, made of a list of prompts:
                ``open_clip.get_tokenizer(...)``, or a transformers tokenizer with
                ``padding=True, return_tensors="pt"`` (SigLIP: ``padding="max_length"``).
            templates: prompts with ``{}`` in the place of the name.
            background: texts for what is none of the classes; empty for none.

        Raises:
            UnsupportedModelError: the model has no text tower of a known form.
        """
        without = [template for template in templates if "{}" not in template]
        if without or not templates:
            raise ValueError(f"`templates` must hold {{}} in the place of the name, got {without}")
        if isinstance(names, str) or not names:
            raise ValueError(f"`names` must be a list of at least one name, got {names!r}")

        def rows(texts: Sequence[str]) -> Tensor:
            return torch.stack([_ensemble(model, text, templates, tokenize) for text in texts])

        host: Any = model
        logit_scale = getattr(host, "logit_scale", None)
        logit_bias = getattr(host, "logit_bias", None)
        return cls(
            tuple(names),
            rows(names),
            rows(background) if background else None,
            JointSpace.of(model),
            100.0 if logit_scale is None else float(logit_scale.detach().exp()),
            0.0 if logit_bias is None else float(logit_bias.detach()),
        )

    def scores(self, output: Any) -> Float[Tensor, "b C"]:
        """Scores of the classes from a host's image embedding; for ``camkit.watch(scores=...)``."""
        embedding = embedding_of(output)
        width = self.embeddings.shape[1]
        outside = None if self.space is None else self.space.outside
        if embedding.shape[-1] != width and outside is not None:
            embedding = outside(embedding)
        if embedding.shape[-1] != width:
            raise ValueError(
                f"the host returns embeddings {embedding.shape[-1]} wide, but those of the texts "
                f"have {width} channels; were they made by the same model?"
            )
        return self.logits(F.normalize(embedding, dim=-1))

    def logits(self, embedded: Float[Tensor, "... D"]) -> Float[Tensor, "... C"]:
        """The host's scores of embeddings of length one."""
        return self.scale * self.similarity(embedded) + self.bias

    def similarity(
        self, embedded: Float[Tensor, "... D"], *, background: bool = False
    ) -> Float[Tensor, "... C"]:
        """Cosines with the classes, then with the background texts if asked for."""
        rows = self.embeddings
        if background and self.background is not None:
            rows = torch.cat([rows, self.background])
        return embedded @ rows.to(embedded).mT

    def known_space(self) -> JointSpace:
        """The way from the host's tokens to the texts.

        Raises:
            ValueError: it was not given.
        """
        if self.space is None:
            raise ValueError(
                "these TextClasses do not know how tokens are compared with them; give them "
                "`space=camkit.seeds.JointSpace.of(model)`"
            )
        return self.space


def embedding_of(output: Any) -> Tensor:
    """The embedding in what a tower returns: a tensor, the first of a tuple, or a field."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in ("image_embeds", "pooler_output", "image_features"):
            if isinstance(output.get(name), Tensor):
                return output[name]
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UnsupportedModelError(
        f"no embedding was found in a {type(output).__name__}; expected a tensor, a tuple that "
        "begins with one, or an object with image_embeds or pooler_output"
    )


def _ensemble(
    model: nn.Module,
    name: str,
    templates: Sequence[str],
    tokenize: Callable[[list[str]], Any],
) -> Float[Tensor, " D"]:
    synonyms = [part.strip() for part in name.split(",") if part.strip()]
    if not synonyms:
        raise ValueError("a class name must not be blank")
    prompts = [template.format(word) for word in synonyms for template in templates]
    tokens = tokenize(prompts)
    host: Any = model
    device = next(model.parameters()).device
    with torch.no_grad():
        if isinstance(tokens, Mapping) and hasattr(host, "get_text_features"):
            told = {key: value.to(device) for key, value in tokens.items()}
            found = embedding_of(host.get_text_features(**told))
        elif isinstance(tokens, Tensor) and hasattr(host, "get_text_features"):
            found = embedding_of(host.get_text_features(tokens.to(device)))
        elif isinstance(tokens, Tensor) and hasattr(host, "encode_text"):
            found = embedding_of(host.encode_text(tokens.to(device)))
        else:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no text tower that takes a "
                f"{type(tokens).__name__} (encode_text, get_text_features); embed the prompts "
                "yourself and give camkit.seeds.TextClasses(names, embeddings)"
            )
    return F.normalize(found.float(), dim=-1).mean(0)


@dataclass(frozen=True)
class TextSimilaritySeed:
    """How alike the embeddings of patches are to those of class texts, for CLIP and its kin.

    A patch goes the way of the class token: last norm and projection; where a head pools (SigLIP),
    it is run on the patch alone. Attach `camkit.edits.StaticCalibration` for maps of good
    quality: CLIP's
    patches look like their opposite without (Li et al. 2023).

    Attributes:
        text: the classes.
        reading: "similarity" is the cosine. "softmax" is each class's share among all classes and
            background texts at the host's scale, as CLIP-ES (Lin et al. 2023) scores images; for
            patches it is ours. "surgery" removes what a patch has in common with all texts, after
            CLIP Surgery (Li et al. 2023): every class's cosine is weighted by how sure the image
            embedding is of it (softmax of twice the cosine, over its mean), and the mean over all
            texts is taken away; background texts count among them, which is ours.

    What exceeds the image's mean patch is evidence, except for "softmax", whose zero is natural;
    that is ours.
    """

    text: TextClasses
    reading: Literal["similarity", "softmax", "surgery"] = "surgery"

    requires: ClassVar[WatchSpec] = WatchSpec()

    def __post_init__(self) -> None:
        if self.reading not in ("similarity", "softmax", "surgery"):
            raise ValueError(
                '`reading` must be "similarity", "softmax" or "surgery", got ' + repr(self.reading)
            )
        if self.reading == "surgery" and len(self.text) == 1 and self.text.background is None:
            raise ValueError(
                '`reading="surgery"` compares texts and needs at least two; add background texts, '
                'or use "similarity"'
            )

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(capture, classes, len(self.text))
        maps = pick(self.scores(capture), classes)
        if self.reading != "softmax":
            maps = (maps - maps.mean(-1, keepdim=True)).clamp_min(0.0)
        return keep_asked(capture.grid.fold(maps), classes)

    def scores(self, capture: Capture) -> Float[Tensor, "b n C"]:
        """What every patch has to do with every class, signed."""
        space = self.text.known_space()
        likeness = self.text.similarity(space.patches(capture), background=True)
        if self.reading == "softmax":
            likeness = (self.text.scale * likeness).softmax(-1)
        if self.reading == "surgery":
            whole = self.text.similarity(space.images(capture), background=True)
            sure = (2.0 * whole).softmax(-1)
            likeness = likeness * (sure / sure.mean(-1, keepdim=True))[:, None]
            likeness = likeness - likeness.mean(-1, keepdim=True)
        return likeness[..., : len(self.text)]
