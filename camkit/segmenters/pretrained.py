"""A segmenter of transformers by its name: picklable, and opened once in each process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from camkit.errors import CamkitError, nearby, require
from camkit.segmenters.hugging_face import TransformersSegmenter
from camkit.segmenters.protocol import Answers, Prompt


@dataclass(frozen=True)
class PretrainedSegmenter:
    """A promptable model with its trained weights, opened when it is first used.

    Sent to another process, it is opened there again, so that each process has one copy on its own
    device. Needs transformers (the extra ``sam``).

    Attributes:
        name: a folder that ``save_pretrained`` wrote for model and processor, or a name on the hub,
            such as ``facebook/sam-vit-base`` or ``facebook/sam2.1-hiera-tiny``.
        device: of the model; None uses a GPU if there is one.
        folder: where a relative folder starts.
        online: whether the hub may be asked.
    """

    name: str
    device: str | None = field(default=None, repr=False, compare=False)
    folder: Path = field(default_factory=Path.cwd, repr=False, compare=False)
    online: bool = field(default=True, repr=False, compare=False)

    def __reduce__(self) -> tuple[type, tuple[str, str | None, Path, bool]]:
        return PretrainedSegmenter, (self.name, self.device, self.folder, self.online)

    def __deepcopy__(self, memo: object) -> "PretrainedSegmenter":
        return self  # a value; a copy would open the model again

    @cached_property
    def opened(self) -> TransformersSegmenter:
        """The segmenter.

        Raises:
            CamkitError: transformers is missing, or cannot open the model.
        """
        model, processor = _open(self.name, self.folder, online=self.online)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return TransformersSegmenter(model.to(device).eval(), processor)
        except (RuntimeError, AssertionError) as error:  # no such device, or out of memory
            reason = str(error).strip().splitlines()[0]
            raise CamkitError(f"{self.name} cannot be moved to {device}: {reason}") from error

    def identity(self) -> str:
        """Return the class of the model and the hash of its weights."""
        return self.opened.identity()

    def version(self) -> object:
        """Return what changes when weights are written to."""
        return self.opened.version()

    def features(self, embedding: Any) -> Float[Tensor, "d h w"]:
        """Return the embedding of the picture alone, without padding."""
        return self.opened.features(embedding)

    def embed(self, picture: UInt8[np.ndarray, "H W 3"]) -> Any:
        return self.opened.embed(picture)

    def masks(self, embedding: Any, prompts: Sequence[Prompt]) -> Answers:
        return self.opened.masks(embedding, prompts)


def _open(name: str, folder: Path, *, online: bool) -> tuple[Any, Any]:
    require("transformers", f"the segmenter {name} needs", "sam")
    from transformers import AutoModelForMaskGeneration, AutoProcessor
    from transformers.utils import logging

    local = (folder / name).is_dir()
    place = str(folder / name) if local else name
    offline = local or not online
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForMaskGeneration.from_pretrained(
            place, output_loading_info=True, local_files_only=offline
        )
        processor = AutoProcessor.from_pretrained(place, local_files_only=offline)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CamkitError(
            f"{name} cannot be opened as a promptable segmenter of transformers: {reason}"
            f"{'' if local else nearby(folder / name)}"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise CamkitError(
            f"{name} is not a trained segmenter: weights such as {missing} are missing"
        )
    return model, processor
