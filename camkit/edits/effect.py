"""How far an edit moves the class scores of its host, found once at the first edited forward."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import image_batch
from camkit.capture.hooks import Hook
from camkit.capture.modes import measurement
from camkit.capture.scores import candidates
from camkit.capture.session import Forward
from camkit.torch_internals import is_compiled

FAR = 0.7
"""Correlation below which scores count as moved far. Of two pretrained ViTs, edits that keep mAP
within 3 points lie at 0.88 and above, those that ruin it below 0.3 (benchmarks/doei_scores.py)."""

_IMAGES = 4  # of the batch, that are looked at
_CLASSES = 10  # at least: the correlation of a few numbers says little
_KNOWN: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()


def warn_if_scores_move_far(
    forward: Forward[Any],
    output: Any,
    scores: Callable[[Any], Tensor] | None,
    *,
    edit: object,
    blocks: Sequence[str],
) -> None:
    """Run the first images once more without any edit, and warn if the scores differ too much.

    It is done once for each model, edit and choice of blocks, at the first forward in evaluation
    mode, without a graph. A host that cannot be run again, that carries hooks of the user, or that
    returns no scores of ten classes or more, is left alone.

    Args:
        forward: the edited forward that has ended, with its arguments.
        output: what it returned.
        scores: computes the class scores from an output, if the user gave it.
        edit: the edit.
        blocks: names of the attention modules it acts in.
    """
    entrance = forward.entrance
    if entrance is None or is_compiled(entrance):
        return
    known, key = _KNOWN.setdefault(entrance, set()), f"{edit!r} in {', '.join(blocks)}"
    if key in known or _is_training_or_hooked(entrance):
        return
    known.add(key)
    found = _correlation(entrance, forward, output, scores)
    if found is not None and found < FAR:
        warnings.warn(
            f"{type(edit).__name__} in {len(blocks)} blocks moves the class scores of this model "
            f"far: they correlate by {found:.2f} with those of the model alone, and predictions "
            f"change below {FAR}. Weights that were not trained with the edit need a smaller one: "
            "fewer blocks (`blocks=3`) or less strength (`handle.strength`), and training a ramp "
            "from 0",
            stacklevel=2,
        )


def _is_training_or_hooked(model: nn.Module) -> bool:
    """Whether a second forward would differ by itself, or would be seen by hooks of the user."""
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if module.training or any(not isinstance(hook, Hook) for hook in hooks):
            return True
    return False


def _correlation(
    entrance: nn.Module,
    forward: Forward[Any],
    output: Any,
    scores: Callable[[Any], Tensor] | None,
) -> float | None:
    """Correlate the scores with those without edits, averaged over a few images."""
    pixels, after = image_batch(forward.args, forward.kwargs), _scores(output, scores)
    if pixels is None or after is None or after.shape[1] < _CLASSES:
        return None
    args = [_first(value, len(pixels)) for value in forward.args]
    kwargs = {name: _first(value, len(pixels)) for name, value in forward.kwargs.items()}
    try:
        with measurement(pixels.device), torch.no_grad():
            plain = entrance(*args, **kwargs)
        before = _scores(plain, scores)
    except Exception:  # noqa: BLE001 - whatever the host raises: it need not run a second time
        return None
    after = after[:_IMAGES].detach()
    if before is None or before.shape != after.shape:
        return None
    before, after = (x.float() - x.float().mean(1, keepdim=True) for x in (before, after))
    if not (before.any(1) & after.any(1)).all():  # a new classifier of zeros tells nothing
        return None
    found = torch.cosine_similarity(before, after, dim=1).mean()
    return float(found) if found.isfinite() else None


def _scores(output: Any, scores: Callable[[Any], Tensor] | None) -> Tensor | None:
    found = candidates(output) if scores is None else [scores(output)]
    return found[0] if found else None


def _first(value: Any, images: int) -> Any:
    per_image = isinstance(value, Tensor) and value.dim() > 0 and len(value) == images
    return value[:_IMAGES] if per_image else value
