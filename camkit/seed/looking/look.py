"""Look: one watched forward of a model, edited or not, as often as wanted."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camkit.capture.record import Capture
from camkit.capture.search import find_patch_embeddings
from camkit.capture.watcher import watch
from camkit.edit.handle import attach
from camkit.edit.protocol import Edit, KeyEdit
from camkit.seed.needs import needs
from camkit.seed.protocol import Seed
from camkit.tensors import RGB, Pixels
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Look:
    """Runs a model under one edit and keeps what it showed.

    Attributes:
        model: borrowed, in evaluation mode.
        seeds: what will be read from the captures; what they need is watched.
        edit: changes attention blocks during the forward, and only then.
        edit_blocks: which, as in `camkit.attach`.
        vocabulary: joins classifier outputs.
        scores: makes ``(b, classes)`` scores of what the model returns, as in `camkit.watch`.
        class_query: evaluate the last block for the class query only, where all seeds are content
            with that; with an edit it is never done. Who reads patch embeddings has none then.
    """

    model: nn.Module
    seeds: tuple[Seed, ...] = ()
    edit: Edit | KeyEdit | None = None
    edit_blocks: int | tuple[int, ...] | None = None
    vocabulary: Vocabulary | None = None
    scores: Callable[[Any], Tensor] | None = None
    class_query: bool = False

    def __call__(self, pixels: Pixels, rgb: RGB | None = None) -> Capture:
        """Look at a batch.

        Args:
            pixels: normalised images of one size.
            rgb: the same pictures in [0, 1], for edits and refiners that look at colours.
        """
        seen = watch(
            self.model,
            rgb=rgb,
            vocabulary=self.vocabulary,
            scores=self.scores,
            **needs(*self.seeds, class_query=self.class_query and self.edit is None),
        )
        with torch.no_grad(), ExitStack() as edited, seen:
            if self.edit is not None:
                handle = attach(self.model, self.edit, blocks=self.edit_blocks)
                edited.enter_context(handle).rgb = rgb
            try:
                self.model(pixels.clone() if pixels.is_inference() else pixels)
            except Exception as error:
                rows, cols = pixels.shape[-2:]
                error.add_note(
                    f"camkit was showing the model a view of {rows}x{cols} pixels; a host of one "
                    "fixed size takes no other (timm: create it with dynamic_img_size=True)"
                )
                raise
        return seen.capture

    @property
    def patch(self) -> tuple[int, int] | None:
        """Rows and columns of a patch in pixels; None where no patch embedding shows them."""
        embedding = next(iter(find_patch_embeddings(self.model).values()), None)
        return None if embedding is None else (embedding.stride[0], embedding.stride[-1])


def check_size(model: nn.Module, pixels: Pixels) -> None:
    """Refuse pictures that cannot be cut into the model's patches.

    Raises:
        ValueError: a side is no multiple of a patch's.
    """
    patch = Look(model).patch
    height, width = pixels.shape[-2:]
    if patch and (height % patch[0] or width % patch[1]):
        raise ValueError(
            f"an image of {height}x{width} cannot be cut into patches of {patch[0]}x{patch[1]}; "
            f"use camkit.load_photo(path, multiple={patch[0]})"
        )
