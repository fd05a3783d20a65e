"""attach(model, edit): an edit stays on a model for as long as its user likes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, is_compiled
from camkit.capture.search import is_whole_block
from camkit.capture.stream import block_modules
from camkit.edit.block import EditedBlock
from camkit.edit.passage import Passage, Passages
from camkit.edit.protocol import Edit, KeyEdit
from camkit.edit.stream import BlockStream, StreamEdit
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.ops.colour import Normalisation
from camkit.tensors import RGB, Labels


def attach(
    model: nn.Module,
    edit: Edit | KeyEdit,
    *,
    blocks: int | Sequence[int] | None = None,
    modules: Iterable[str] | None = None,
    class_tokens: Sequence[int] | None = None,
    normalisation: Normalisation | None = None,
) -> "Handle":
    """Let ``edit`` change the chosen attention blocks in every forward from now on.

    The edit stays on until its handle is told to take it off, as torch's own hooks do; copies and
    pickles of the model are without it.

    Args:
        model: any Vision Transformer; its own code, kernels and weights stay as they are. Attach
            before `torch.compile`: compiled code made earlier runs past the edit, which is refused
            where the model shows that it is compiled.
        edit: called once per block and forward; gradients flow through it.
        blocks: which attention modules, in the order the model holds them and without pooling
            heads: None all, n the last n, or indices, negative from the end.
        modules: names of the attention modules, where they are not found by their form.
        class_tokens: positions of the class tokens, where they are not found by their names.
        normalisation: mean and standard deviation of the pixels, three numbers each, for edits that
            look at colours; None reads them off the values (`camkit.ops.colour.to_rgb`).

    Returns:
        A handle; ``remove()`` leaves the model as it was, ``enabled = False`` pauses the edit. It
        is also a context manager, and takes the batch's ``labels`` and ``rgb`` for edits that use
        them.

    Raises:
        UnsupportedModelError: the model holds no known attention, or is compiled already.
    """
    if is_compiled(model):
        raise UnsupportedModelError(
            "the model is compiled already, and compiled code runs past new hooks; attach the edit "
            "first and compile afterwards"
        )
    host = Host.of(model, modules=modules, class_tokens=class_tokens)
    return Handle(host, edit, blocks, normalisation)


class Handle:
    """An attached edit."""

    def __init__(
        self,
        host: Host,
        edit: Edit | KeyEdit,
        blocks: int | Sequence[int] | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        held = list(host.blocks().values())
        chosen = _chosen(held, blocks)
        whole = [name for name, m in host.attention.items() if m in chosen and is_whole_block(m)]
        if whole and not isinstance(edit, KeyEdit):
            raise UnsupportedModelError(
                f"{whole[0]} holds attention, MLP and residual in one, so what its attention adds "
                "cannot be edited; an edit of keys can"
            )
        self._host = host
        self._edit = edit
        self._all_run = blocks is not None
        self._hooks = Hooks()
        self._passages = Passages(host, normalisation)
        streams = _streams(host, chosen, edit)
        self._blocks = [
            EditedBlock(
                m,
                edit,
                self._passages,
                host,
                index=held.index(m),
                count=len(held),
                stream=streams.get(m),
                ends=(m is chosen[0], m is chosen[-1]),
            )
            for m in chosen
        ]
        self._passages.listen(self._hooks, self._on_end)
        for block in self._blocks:
            block.listen(self._hooks)

    @property
    def settings(self) -> dict[str, Any]:
        """The edit and the blocks it acts in, JSON-ready, to be kept beside a checkpoint.

        Weights trained under an edit mean little without it, and hooks are not saved with them.
        """
        modules = {module: name for name, module in self._host.attention.items()}
        return {"edit": repr(self._edit), "blocks": [modules[b.module] for b in self._blocks]}

    def __repr__(self) -> str:
        state = "" if self.enabled else ", paused"
        return f"Handle({self._edit!r} in {len(self._blocks)} blocks{state})"

    @contextmanager
    def told(self, *, labels: Labels | None = None, rgb: RGB | None = None) -> Iterator[None]:
        """Set labels and colours for the forwards inside the block, and what was set before after.

        Args:
            labels: classes present in each image, ``(b, C)``.
            rgb: the pictures in [0, 1].
        """
        before = self.labels, self.rgb
        self.labels, self.rgb = labels, rgb
        try:
            yield
        finally:
            self.labels, self.rgb = before

    @property
    def enabled(self) -> bool:
        """Whether the edit acts; set it to compare with and without inside one run."""
        return self._passages.enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._passages.enabled = enabled

    @property
    def labels(self) -> Labels | None:
        """Classes present in the images of the next forwards, ``(b, C)``; None says nothing."""
        return self._passages.labels

    @labels.setter
    def labels(self, labels: Labels | None) -> None:
        self._passages.labels = labels

    @property
    def rgb(self) -> RGB | None:
        """Pictures of the next forwards in [0, 1]; None brings the pixels back to colours."""
        return self._passages.rgb

    @rgb.setter
    def rgb(self, rgb: RGB | None) -> None:
        self._passages.rgb = rgb

    def remove(self) -> None:
        """Take the edit off; doing it twice is harmless."""
        self._hooks.remove()
        for block in self._blocks:
            block.remove()
        self._passages.forget()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _on_end(self, passage: Passage) -> None:
        """A forward that skipped what it should have edited is an error, not silence."""
        if not passage.ran:
            raise CaptureError(
                "the model ran but none of its attention modules did, so nothing was edited; name "
                f"those that run with `modules=` (hooked: {', '.join(self._host.attention)})"
            )
        idle = {block.module for block in self._blocks} - passage.ran
        if self._all_run and idle:
            names = [name for name, m in self._host.attention.items() if m in idle]
            raise CaptureError(
                f"`blocks` chose attention that this forward does not run ({', '.join(names)}); "
                "attach to the sub-module that runs, or name its attention with `modules=`"
            )


def _streams(
    host: Host, chosen: list[nn.Module], edit: Edit | KeyEdit
) -> dict[nn.Module, BlockStream]:
    """What follows the tokens between blocks, for edits that want to know them."""
    runs = isinstance(edit, StreamEdit)
    if not runs and not getattr(edit, "reads_stream", False):
        return {}
    within = block_modules(host.model, host.attention)
    found = {
        m: BlockStream(m, within[name])
        for name, m in host.attention.items()
        if m in chosen and name in within
    }
    held = list(host.blocks().values())
    places = [held.index(m) for m in chosen]
    if runs and places != list(range(places[0], places[-1] + 1)):
        raise ValueError(f"`blocks` must follow each other for {type(edit).__name__}, got {places}")
    if runs and len(found) < len(chosen):
        raise UnsupportedModelError(
            "the attention of this host lies in no block that takes and returns its tokens, so no "
            "second stream can go beside them"
        )
    return found


def _chosen(modules: list[nn.Module], blocks: int | Sequence[int] | None) -> list[nn.Module]:
    if blocks is None:
        return modules
    wanted = list(range(-blocks, 0)) if isinstance(blocks, int) else list(blocks)
    outside = [b for b in wanted if not -len(modules) <= b < len(modules)]
    if outside or not wanted:
        raise ValueError(
            f"`blocks` must name some of the {len(modules)} attention modules, got {blocks}"
        )
    return [modules[b] for b in sorted({b % len(modules) for b in wanted})]
