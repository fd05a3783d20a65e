"""The forwards that pass through an edited model, told apart by thread."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import local
from typing import Any

import torch
from torch import nn

from camkit.capture.anatomy import Anatomy, image_batch, measuring
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host
from camkit.edit.site import Picture
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.ops.colour import Normalisation
from camkit.tensors import RGB, Labels


@dataclass(eq=False)
class Passage:
    """One forward.

    Attributes:
        anatomy: roles of its tokens.
        picture: its images.
        labels: classes present in them, where the user gave them.
        images: how many; None where the model was never entered.
        ran: edited modules that have run.
        side: a second stream of tokens, where an edit runs one.
    """

    anatomy: Anatomy
    picture: Picture = field(default_factory=Picture)
    labels: Labels | None = None
    images: int | None = None
    ran: set[nn.Module] = field(default_factory=set)
    side: torch.Tensor | None = None


_DOUBT = (
    "several forwards with gradients came before the backward of a checkpointed model, so the "
    "images of the block that is computed again are not known; call backward after each forward, "
    "and run what needs no gradient under torch.no_grad"
)


class _Here(local):
    """What this thread is in."""

    entrance: nn.Module | None = None
    passage: Passage | None = None


class Passages:
    """Notices when a host is entered and left.

    Attributes:
        enabled: whether edits act.
        rgb: colours of the next forwards, in [0, 1]; none takes them from the pixels.
        labels: classes present in the images of the next forwards.
    """

    def __init__(self, host: Host, normalisation: Normalisation | None) -> None:
        self.enabled = True
        self.rgb: RGB | None = None
        self.labels: Labels | None = None
        self._host = host
        self._normalisation = normalisation
        self._here = _Here()
        self._latest: Passage | None = None
        self._since = 0
        self._on_end: Callable[[Passage], None] | None = None

    def listen(self, hooks: Hooks, on_end: Callable[[Passage], None]) -> None:
        """Put hooks on; ``on_end`` is called when a forward has run to its end."""
        self._on_end = on_end
        for entrance in self._host.entrances:
            hooks.before(entrance, self._before)
            hooks.after(entrance, self._after)
        for embedding in self._host.embeddings:
            hooks.after(embedding, self._after_embedding)

    def forget(self) -> None:
        """Let go of the images and of whoever listens."""
        self._here.entrance, self._here.passage, self._latest = None, None, None
        self._on_end = None

    @property
    def active(self) -> bool:
        """Whether edits act on what runs now."""
        return self.enabled and not measuring()

    @property
    def inside(self) -> bool:
        """Whether a forward is under way in this thread; a block that is replayed is in none."""
        return self._here.passage is not None

    def current(self) -> Passage:
        """The forward that is under way in this thread.

        Outside of one, a checkpointed block is being computed again for its gradient, perhaps in a
        thread of the autograd engine: then it is the latest forward that had a graph.

        Raises:
            CaptureError: blocks run outside of the model, and their tokens are not known.
        """
        if self._here.passage is not None:
            return self._here.passage
        if self._latest is not None:
            if self._since > 1:
                self._latest.picture.doubt = _DOUBT
                if self._latest.labels is not None:
                    raise CaptureError(_DOUBT)
            self._since = 0
            return self._latest
        if self._host.class_tokens is not None:
            return Passage(Anatomy(class_tokens=self._host.class_tokens))
        raise CaptureError(
            "an edited block ran outside the forward of its model; attach to the module that you "
            "call, or name `class_tokens=`"
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = self._here
        images = image_batch(args, kwargs)
        nested = here.entrance not in (None, module)
        if nested or not self.active or images is None:
            return
        self._host.check_in_place()
        for name, given in (("rgb", self.rgb), ("labels", self.labels)):
            if given is not None and len(given) != len(images):
                raise ValueError(
                    f"`handle.{name}` must have one row for each of the {len(images)} images, got "
                    f"{len(given)}; set it before every forward, or to None"
                )
        passage = Passage(
            anatomy=self._host.anatomy(module, args, kwargs),
            picture=Picture(images.detach(), self.rgb, self._normalisation, self._host.grid),
            labels=self.labels,
            images=len(images),
        )
        here.entrance, here.passage = module, passage
        if torch.is_grad_enabled():
            self._since = 1 if self._latest is None else self._since + 1
            self._latest = passage

    def _after(self, module: nn.Module, *call: Any) -> None:
        here = self._here
        if measuring() or module is not here.entrance:
            return
        passage, here.entrance, here.passage = here.passage, None, None
        raised = call[-1] is None
        if self.enabled and not raised and passage is not None and self._on_end is not None:
            self._on_end(passage)

    def _after_embedding(self, *call: Any) -> None:
        passage, cut = self._here.passage, call[-1]
        if passage is not None and not measuring() and isinstance(cut, torch.Tensor):
            passage.picture.grid = self._host.grid or Grid(*cut.shape[-2:])
