"""What builders share: pictures, labels, parameters with something in them, and file checks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import camkit
from camkit.data import read_cam, write_cam

CLASSES = 20  # of VOC
PRESENT = (2, 7)
"""Classes in the picture of the file checks."""


def pictures(rows: int, cols: int, *, images: int = 2, seed: int = 0) -> Tensor:
    """Return normalised random images."""
    return torch.randn(images, 3, rows, cols, generator=torch.Generator().manual_seed(seed))


def labels(images: int = 2) -> Tensor:
    """Return image labels: each image has two of the classes."""
    found = torch.zeros(images, CLASSES)
    for image in range(images):
        found[image, [(3 * image + 2) % CLASSES, (3 * image + 7) % CLASSES]] = 1.0
    return found


def stirred(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Replace parameters that start at zero, such as class tokens, by small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def every_class(images: int = 2, known: int = CLASSES) -> Tensor:
    """Return a request for all classes of each image."""
    return torch.arange(known).expand(images, known)


def maps_and_truth(rows: int = 12, cols: int = 17) -> tuple[Tensor, np.ndarray]:
    """Return maps in [0, 1] of the `PRESENT` classes, and a true mask with an ignored corner."""
    generator = torch.Generator().manual_seed(3)
    cam = torch.rand(len(PRESENT), rows, cols, generator=generator)
    cam = cam / cam.amax((1, 2), keepdim=True)
    truth = torch.randint(0, 3, (rows, cols), generator=generator)
    values = torch.tensor([0, *(index + 1 for index in PRESENT)])
    mask = values[truth].to(torch.uint8).numpy()
    mask[:2, :2] = 255
    return cam, mask


def miou(cam: Tensor, truth: np.ndarray, threshold: float, definition: str) -> float:
    """Return camkit's mean IoU of maps of the `PRESENT` classes, in percent."""
    predicted = camkit.to_mask(
        cam[None], torch.tensor([list(PRESENT)]), background_score=threshold
    )[0]
    confusion = camkit.score.confusion_matrix(
        torch.from_numpy(truth), predicted, num_classes=CLASSES + 1
    )
    return 100.0 * float(camkit.score.mean_iou(confusion, definition=definition))


def read_back(path: Path, expected: dict[int, np.ndarray]) -> float:
    """Return the largest difference between a file of theirs as camkit reads it and its maps."""
    file = read_cam(path)
    if list(file.classes) != list(expected):
        raise ValueError(f"classes {file.classes} read, {list(expected)} written")
    return max(
        float(np.abs(np.asarray(cam) - expected[index]).max())
        for index, cam in zip(file.classes, file.cam, strict=True)
    )


def scored_by_them(
    folder: Path, form: Any, score: Callable[[Path, Path, list[str]], float], definition: str,
    threshold: float = 0.45,
) -> float:  # fmt: skip
    """Return how far their evaluator's mean IoU of camkit's file is from camkit's own.

    Args:
        folder: an empty folder.
        form: layout of `camkit.data.write_cam`.
        score: their evaluator, given the folders of maps and true masks, and the list of names;
            returns percent.
        definition: theirs, as camkit calls it.
        threshold: of the background.
    """
    cam, truth = maps_and_truth()
    (folder / "maps").mkdir()
    (folder / "truth").mkdir()
    write_cam(folder / "maps" / "a.npy", PRESENT, cam, form=form)
    Image.fromarray(truth).save(folder / "truth" / "a.png")
    theirs = score(folder / "maps", folder / "truth", ["a"])
    return abs(theirs - miou(cam, truth, threshold, definition))


def min_max(maps: Tensor, *, epsilon: float = 1e-7) -> Tensor:
    """Scale each map to [0, 1]."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + epsilon)


def logits_file(folder: Path, name: str) -> dict[str, float]:
    """Write scores of a segmentation network under ``name`` and let camkit read them.

    Args:
        folder: an empty folder.
        name: the entry that their script writes, `(1, classes + 1, rows, cols)` before softmax.
    """
    logits = torch.randn(1, CLASSES + 1, 6, 8, generator=torch.Generator().manual_seed(4))
    np.save(folder / "logits.npy", {name: logits.numpy()})  # type: ignore[arg-type]
    expected = dict(enumerate(logits.softmax(1)[0, 1:].numpy()))
    return {f"their {name} read by camkit": read_back(folder / "logits.npy", expected)}
