"""The space that images and texts share, and the way from a host's tokens into it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.record import Capture
from camkit.capture.search import is_attention
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.tensors import Tokens


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
            "compared with texts: camkit.JointSpace((norm.forward, projection.forward))"
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
