"""watch(model): see the attention of the next forward without touching the model."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from camkit.capture.host import Host, way_out
from camkit.capture.record import Capture, WatchSpec
from camkit.capture.session import Recorder, Selection, checked_grid
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.tensors import RGB
from camkit.torch_internals import is_compiled
from camkit.vocabulary import Vocabulary


def watch(  # noqa: PLR0913 - each says one thing about the model or the record
    model: nn.Module,
    *,
    blocks: int | Sequence[int] | None = None,
    requires: WatchSpec | None = None,
    gradients: bool = False,
    class_rows_only: bool = False,
    skip_unused_patches: bool = False,
    rgb: RGB | None = None,
    vocabulary: Vocabulary | None = None,
    scores: Callable[[Any], Tensor] | None = None,
    modules: Iterable[str] | None = None,
    class_tokens: Sequence[int] | None = None,
    grid: Grid | tuple[int, int] | None = None,
) -> "Watch":
    """See the attention of the forwards inside a ``with`` block.

    The host keeps its fused kernels, modes, flags and weights; hooks are there only inside the
    block. A compiled model runs uncompiled inside it.

    Args:
        model: any Vision Transformer; call it inside the block as you always do.
        blocks: attention blocks to keep, in the order they run: None all, n the last n, or indices.
        requires: what seeds and refiners will read, ``seed.requires | refiner.requires``; None is
            attention alone.
        gradients: the same as ``requires=WatchSpec(gradients=True)``, for gradient seeds. Works in
            no_grad and on frozen models: the graph then begins at the first watched block.
        class_rows_only: keep the rows of the class tokens and nothing else, for large batches: then
            memory hardly grows, and `ClassAttentionSeed` works but no refiner that reads attention.
        skip_unused_patches: compute the last block for the class token only, if ``requires`` says
            that nothing reads the patches behind it and a trial on the model finds its scores
            exact. The model's other outputs are then unknown.
        rgb: the pictures in [0, 1], for refiners that look at colours.
        vocabulary: names of the classes, and which classifier outputs make up each.
        scores: makes ``(b, classes)`` scores of what the model returns, for hosts that return
            embeddings; CLIP's are ``lambda image: 100 * image @ text.T`` of normalised embeddings.
        modules: names of the attention modules, where they are not found by their form.
        class_tokens: positions of the class tokens, where they are not found by their names.
        grid: rows and columns of patches, where no patch embedding shows them.

    Raises:
        UnsupportedModelError: the model holds no attention that camkit knows, or hides it.

    Example:
        >>> with camkit.watch(model, blocks=3) as seen:  # doctest: +SKIP
        ...     logits = model(pixels)
        >>> seen.capture.class_to_patch()  # doctest: +SKIP
    """
    spec = requires or WatchSpec()
    spec = replace(spec, gradients=spec.gradients or gradients)
    if (spec.gradients or spec.within_blocks or spec.class_paths) and class_rows_only:
        raise ValueError("`class_rows_only` drops what `gradients` needs; choose one of them")
    host = Host.of(model, modules=modules, class_tokens=class_tokens, grid=grid)
    return Watch(
        host,
        Selection(blocks),
        rgb=rgb,
        vocabulary=vocabulary,
        requires=spec,
        class_rows_only=class_rows_only,
        skip_unused_patches=skip_unused_patches,
        scores=scores,
    )


class Watch:
    """A model being watched; ``capture`` is its latest forward."""

    def __init__(  # noqa: PLR0913 - as `watch`
        self,
        host: Host,
        keep: Selection,
        *,
        rgb: RGB | None,
        vocabulary: Vocabulary | None,
        requires: WatchSpec,
        class_rows_only: bool,
        skip_unused_patches: bool,
        scores: Callable[[Any], Tensor] | None,
    ) -> None:
        self._host = host
        self._keep = keep
        self._rgb = rgb
        self._vocabulary = vocabulary
        self._requires = requires
        self._class_rows_only = class_rows_only
        self._skip_unused_patches = skip_unused_patches
        self._scores = scores
        self._recorder: Recorder | None = None
        self._stack = ExitStack()
        finalize(self, self._stack.close).atexit = False  # a forgotten watch leaves no hooks

    def __enter__(self) -> "Watch":
        self._recorder = Recorder(
            self._host,
            self._keep,
            requires=self._requires,
            class_rows_only=self._class_rows_only,
            skip_unused_patches=self._skip_unused_patches,
            scores=self._scores,
        )
        self._stack.callback(self._recorder.stop)
        if is_compiled(self._host.model):  # compiled code would run past hooks it has not met
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._recorder.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def capture(self) -> Capture:
        """What the latest forward showed.

        Raises:
            CaptureError: no forward ran, or its tokens do not fit its grid.
            UnsupportedModelError: its attention is of a kind that patches cannot be read from.
        """
        if self._recorder is None or self._recorder.forward.calls == 0:
            raise CaptureError(self._why_nothing())
        forward = self._recorder.forward
        kept = self._keep.pick(forward.kept, forward.calls)
        anatomy, grid = checked_grid(forward, self._host.grid, kept)
        return Capture(
            blocks=tuple(call.attention for call in kept),
            names=tuple(call.name for call in kept),
            anatomy=anatomy,
            grid=grid,
            outputs=forward.outputs,
            tail=forward.known_tail(),
            pooling=tuple(forward.pooling),
            entering=tuple(forward.entering),
            leaving=tuple(forward.leaving),
            class_paths=tuple(forward.class_paths),
            samples=tuple(forward.samples),
            class_query_only=forward.class_query_only,
            rgb=self._rgb,
            vocabulary=self._vocabulary,
        )

    def _why_nothing(self) -> str:
        recorder = self._recorder
        if recorder is None or (not recorder.entered and not recorder.forward.modules):
            return (
                "nothing captured yet; call the model inside the `with` block. If you did, it was "
                "called past its own forward: watch the module that is called with the images, or "
                "name `class_tokens=` and `grid=`"
            )
        if not recorder.forward.modules:
            return (
                "the model ran but none of its attention modules did; name those that run with "
                f"`modules=` (found: {', '.join(list(self._host.attention)[:3])}, ...)"
            )
        return (
            f"{recorder.forward.modules} attention modules ran but none called softmax, "
            "scaled_dot_product_attention or multi_head_attention_forward on (b, heads, t, t) "
            f"maps: {way_out(self._host.model)}"
        )
