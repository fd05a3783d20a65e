"""The class names of a model: those it states, and those that a user gives for it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from camkit.capture.scores import known_classes
from camkit.vocabulary import Vocabulary

_IMAGENET = 1000


def vocabulary_of(model: nn.Module) -> Vocabulary | None:
    """Return the class names of a model, or None if nothing tells them.

    They are those in ``config.id2label`` (transformers); else the 1000 of ImageNet for a classifier
    with 1000 outputs, in the order of timm and torchvision, and those of ImageNet-12k and 21k for
    models of timm. Give `camkit.wrap` a ``vocabulary`` for a model with 1000 other classes.
    """
    outputs = known_classes(model)
    labels: Any = getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(labels, Mapping) and len(labels) == outputs:
        if all(str(label) == f"LABEL_{index}" for index, label in labels.items()):
            return None  # placeholders of transformers
        if outputs != _IMAGENET or not str(labels.get(0, "")).startswith("tench"):
            return Vocabulary.of({index: str(label) for index, label in labels.items()})
    if outputs == _IMAGENET:
        return _imagenet()
    return _larger_imagenet(model) if outputs and hasattr(model, "pretrained_cfg") else None


def _larger_imagenet(model: nn.Module) -> Vocabulary | None:
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    return None if subset is None else Vocabulary(tuple(ImageNetInfo(subset).label_descriptions()))


def read_vocabulary(names: Any, model: nn.Module) -> Vocabulary:
    """Make a vocabulary of what a user gives for a model.

    Args:
        names: see `Vocabulary.of`. A list of fewer names than the model has outputs chooses among
            the names that the model has of its own: ``["cat", "dog"]`` for an ImageNet classifier.
        model: the classifier.

    Raises:
        TypeError: ``names`` has another form.
        ValueError: the number of names is not that of the model's outputs, or an output that
            ``names`` lists does not exist.
    """
    vocabulary = Vocabulary.of(names)
    outputs = known_classes(model)
    if outputs is None:
        return vocabulary
    if vocabulary.members is not None:
        largest = max(max(members) for members in vocabulary.members)
        if largest >= outputs:
            raise ValueError(f"the vocabulary names output {largest}, but the model has {outputs}")
        return vocabulary
    if len(vocabulary) == outputs:
        return vocabulary
    own = vocabulary_of(model)
    if own is None or not isinstance(names, Sequence):
        raise ValueError(
            f"the vocabulary has {len(vocabulary)} names, but the model has {outputs} outputs; "
            "name every output, or give a dict such as {'cat': 3} for some of them"
        )
    return own.subset(list(names))


def _imagenet() -> Vocabulary:
    from camkit.data.imagenet import imagenet_vocabulary  # `camkit.data` is loaded when needed

    return imagenet_vocabulary()
