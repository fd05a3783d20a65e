"""watch(model): see the attention of the next forward without touching the model."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import NO_GRID, grid_of_aspect
from camkit.capture.facts import ModelFacts
from camkit.capture.host import Host, how_to_reveal
from camkit.capture.record import (
    Capture,
    WatchSpec,
)
from camkit.capture.recorder import AttentionRecord, Recorder, Recording
from camkit.capture.session import (
    Forward,
    ForwardSession,
)
from camkit.checks import as_blocks, check_function, check_model
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.ops.images import check_rgb
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
    other_tokens: Sequence[int] | None = None,
    grid: Grid | tuple[int, int] | None = None,
) -> "Watch":
    """See the attention of the forwards inside a ``with`` block.

    The host keeps its fused kernels, modes, flags and weights, and its hooks are removed at the end
    of the block. A compiled model runs uncompiled inside it. Forwards in other threads and asyncio
    tasks are neither seen nor changed; let the first watch of a model be over before they start,
    because it measures the roles of the tokens with changed copies of parameters.

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
        rgb: the pictures in [0, 1], for refiners that read colours.
        vocabulary: names of the classes, and which classifier outputs make up each.
        scores: returns ``(b, classes)`` scores of what the model returns, for hosts that return
            embeddings; CLIP's are ``lambda image: 100 * image @ text.T`` of normalised embeddings.
        modules: names of the attention modules, if camkit does not find them by their form.
        class_tokens: positions of the class tokens, in the order of the classes if there are
            several; needed if camkit does not find them by their names, or if other learnt tokens
            (CTI's background) are among them.
        other_tokens: positions of further tokens that are no patches.
        grid: rows and columns of patches, if no patch embedding shows them.

    Raises:
        UnsupportedModelError: the model holds no attention that camkit knows, or hides it.

    Example:
        >>> with camkit.watch(model, blocks=3) as seen:  # doctest: +SKIP
        ...     logits = model(pixels)
        >>> seen.capture.class_to_patch()  # doctest: +SKIP
    """
    check_model(model)
    spec = requires or WatchSpec()
    spec = replace(spec, gradients=spec.gradients or gradients)
    host = Host.of(model, **ModelFacts.of(modules, class_tokens, other_tokens, grid).arguments())
    return watch_host(
        host,
        spec,
        blocks=blocks,
        class_rows_only=class_rows_only,
        skip_unused_patches=skip_unused_patches,
        rgb=rgb,
        vocabulary=vocabulary,
        scores=scores,
    )


def watch_host(  # noqa: PLR0913 - as `watch`
    host: Host,
    spec: WatchSpec,
    *,
    blocks: int | Sequence[int] | None = None,
    class_rows_only: bool = False,
    skip_unused_patches: bool = False,
    rgb: RGB | None = None,
    vocabulary: Vocabulary | None = None,
    scores: Callable[[Any], Tensor] | None = None,
) -> "Watch":
    """See the attention of a host's forwards as `watch` does, with its errors."""
    check_function("scores", scores)
    if (spec.gradients or spec.within_blocks or spec.class_paths) and class_rows_only:
        raise ValueError("`class_rows_only` drops what `gradients` needs; choose one of them")
    if rgb is not None:
        check_rgb(rgb)
    blocks = as_blocks("blocks", blocks)
    if isinstance(blocks, int):
        if blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, got {blocks}")
        blocks = range(-blocks, 0)
    if blocks is not None and not list(blocks):
        raise ValueError("`blocks` must name at least one block, got none")
    selected = None if blocks is None else list(blocks)
    recorder = partial(
        Recorder,
        host,
        selected,
        spec,
        class_rows_only=class_rows_only,
        skip_unused_patches=skip_unused_patches,
        scores=scores,
    )
    return Watch(host, selected, recorder, rgb=rgb, vocabulary=vocabulary)


class Watch:
    """A model being watched; ``capture`` is its latest forward, ``passes`` the parts of it."""

    def __init__(
        self,
        host: Host,
        selected: list[int] | None,
        new_recorder: "Callable[[], Recorder]",
        *,
        rgb: RGB | None,
        vocabulary: Vocabulary | None,
    ) -> None:
        self._host = host
        self._selected = selected
        self._new_recorder = new_recorder
        self._rgb = rgb
        self._vocabulary = vocabulary
        self._recorder: Recorder | None = None
        self._stack = ExitStack()
        finalize(self, self._stack.close).atexit = False  # a forgotten watch leaves no hooks

    def __enter__(self) -> "Watch":
        self._recorder = self._new_recorder()
        session = ForwardSession(self._host, self._recorder)
        self._stack.callback(session.stop)
        if is_compiled(self._host.model):  # compiled code would run past hooks it has not met
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        session.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def capture(self) -> Capture:
        """What the latest forward showed.

        Raises:
            CaptureError: no forward ran, its tokens do not fit its grid, or it ran several passes:
                then choose one of ``passes``.
            UnsupportedModelError: its attention does not relate patches one to one.
        """
        passes = self._recorded()
        if len(passes) > 1:
            listed = "; ".join(f"passes[{i}]: {p.described()}" for i, p in enumerate(passes))
            raise CaptureError(
                f"the forward ran {len(passes)} passes through the blocks, and their maps do not "
                f"belong together; choose one of `seen.passes` ({listed})"
            )
        return self._captured(passes[0])

    @property
    def scored(self) -> Capture:
        """The only pass of the latest forward, or the only one whose class scores are known.

        Raises:
            CaptureError: as ``capture``, if the scores do not tell the passes apart.
            UnsupportedModelError: as ``capture``.
        """
        passes = self._recorded()
        known = [turn for turn in passes if turn.outputs is not None]
        return self._captured(known[0]) if len(passes) > 1 and len(known) == 1 else self.capture

    @property
    def passes(self) -> tuple[Capture, ...]:
        """One capture for each pass of the latest forward, in the order they began.

        Crops, flips, a teacher and chunks of a batch are passes of their own. Scores are known for
        the pass whose classifier made them.

        Raises:
            CaptureError: no forward ran, or the tokens of a pass do not fit its grid.
            UnsupportedModelError: the attention of a pass does not relate patches one to one.
        """
        return tuple(map(self._captured, self._recorded()))

    def _recorded(self) -> "list[Recording]":
        forward = None if self._recorder is None else self._recorder.forward
        passes = [] if forward is None else [turn for turn in forward.passes if turn.count]
        if not passes:
            raise CaptureError(self._why_nothing(forward))
        return passes

    def _captured(self, turn: "Recording") -> Capture:
        kept, count = list(turn.kept), turn.count
        if self._selected is not None:
            outside = [b for b in self._selected if not -count <= b < count]
            if outside:
                raise CaptureError(f"{count} attention blocks ran, but `blocks` asks for {outside}")
            selected = {b % count for b in self._selected}
            kept = [record for record in kept if record.index in selected]
        rgb = self._rgb
        if rgb is not None and turn.of_several and not turn.shows(rgb):
            rgb = None
        return Capture(
            blocks=tuple(record.attention for record in kept),
            names=tuple(record.name for record in kept),
            anatomy=turn.anatomy,
            grid=_checked_grid(turn, self._host.grid, kept),
            outputs=turn.outputs,
            tail=turn.known_tail(),
            pooling=tuple(turn.pooling),
            entering=tuple(turn.entering),
            leaving=tuple(turn.leaving),
            class_paths=tuple(turn.class_paths),
            samples=tuple(turn.samples),
            pixels=turn.images_given,
            class_query_only=turn.class_query_only,
            activation=turn.activation,
            why_no_scores=turn.why_no_scores,
            rgb=rgb,
            vocabulary=self._vocabulary,
        )

    def _why_nothing(self, forward: "Forward[Recording] | None") -> str:
        if forward is None or (forward.entrance is None and not forward.ran):
            return (
                "nothing captured yet; call the model inside the `with` block, in the thread or "
                "task that opened it. If you did, it was called past its own forward: watch the "
                "module that is called with the images, or name `class_tokens=` and `grid=`"
            )
        if not forward.ran:
            return (
                "the model ran but none of its attention modules did; name those that run with "
                f"`modules=` (found: {', '.join(list(self._host.attention)[:3])}, ...)"
            )
        return (
            f"{len(forward.ran)} attention modules ran but none called softmax, "
            "scaled_dot_product_attention or multi_head_attention_forward on (b, heads, t, t) "
            f"maps: {how_to_reveal(self._host.model)}"
        )


def _checked_grid(turn: Recording, named: Grid | None, kept: Sequence[AttentionRecord]) -> Grid:
    """Return the patch grid of a finished pass, or say why it cannot be read by patches."""
    why = next((record.why_unreadable for record in kept if record.why_unreadable), "")
    if why:
        raise UnsupportedModelError(why)
    lengths = sorted({record.attention.shape[2] for record in kept})
    if len(lengths) > 1:
        raise UnsupportedModelError(
            f"the watched blocks run on {', '.join(map(str, lengths))} tokens, and maps of one "
            "resolution do not fit another; keep blocks of one resolution with `blocks=`"
        )
    tokens, anatomy = lengths[0], turn.anatomy
    patches = len(anatomy.patches(tokens))
    grid = named or turn.grid
    if (grid is None or grid.size != patches) and turn.of_several and named is None:
        grid = grid_of_aspect(turn.size, patches)
    if grid is None:
        raise UnsupportedModelError(NO_GRID)
    if patches != grid.size:
        raise CaptureError(
            f"{tokens} tokens less {len(anatomy.special_tokens)} special ones leave {patches}, but "
            f"the patch grid is {grid.rows}x{grid.cols}; correct "
            "`class_tokens=`, `other_tokens=` or `grid=`"
        )
    return grid
