"""Class names, the classifier outputs that belong to each class, and its value in masks."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_DISCOUNT = 0.1  # of large groups in first guesses


@dataclass(frozen=True)
class Vocabulary:
    """The user's class names, mapped to the outputs of a classifier.

    Attributes:
        names: one for each class; a name may list synonyms, separated by commas.
        members: the outputs of each class; None if name i is output i.
        values: the value of each class in masks, from 1, none twice; None if it is index + 1.
        candidates: indices of the classes that a first guess chooses from, for images without
            labels; None if it chooses from all.

    >>> animals = Vocabulary(("cat", "dog"), members=((281, 282), (151,)))
    >>> animals.index("Dog")
    1
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...] | None = None
    values: tuple[int, ...] | None = None
    candidates: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise TypeError(f"`names` must be a list of names, got the text {self.names!r}")
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or not all(name.strip() for name in self.names):
            raise ValueError("a vocabulary needs at least one name, and no name may be blank")
        for field, entries in (("members", self.members), ("values", self.values)):
            if entries is not None and len(entries) != len(self.names):
                raise ValueError(
                    f"`{field}` must hold one entry for each of the {len(self.names)} names, "
                    f"got {len(entries)}"
                )
        self._check_members()
        if min(self.values or (1,)) < 1 or len(set(self.values or ())) < len(self.values or ()):
            raise ValueError("`values` must be mask values from 1, none twice")
        if not set(self.candidates or (0,)) <= set(range(len(self.names))):
            raise ValueError(f"`candidates` must be indices from 0 to {len(self.names) - 1}")

    def _check_members(self) -> None:
        for name, outputs in zip(self.names, self.members or (), strict=False):
            if not outputs or min(outputs) < 0 or len(set(outputs)) < len(outputs):
                raise ValueError(
                    f'`members` of "{name}" must be outputs from 0, at least one and none twice, '
                    f"got {outputs}"
                )

    @classmethod
    def of(cls, names: Any) -> "Vocabulary":
        """Make a vocabulary from the forms that users hold.

        Args:
            names: a vocabulary; a list of names, the first that of output 0; a dict of the name of
                each output (``{0: "cat", 1: "dog"}``, as ``config.id2label`` of transformers); or a
                dict of the output or outputs of each name (``{"cat": [281, 282], "dog": 151}``).

        Raises:
            TypeError: ``names`` has another form.
            ValueError: a name is blank, or an output comes twice.

        >>> Vocabulary.of({"cat": [281, 282], "dog": 151}).members
        ((281, 282), (151,))
        """
        if isinstance(names, cls):
            return names
        if isinstance(names, Mapping):
            return cls._of_dict(names)
        if isinstance(names, Sequence) and not isinstance(names, str):
            wrong = [name for name in names if not isinstance(name, str)]
            if not wrong:
                return cls(tuple(names))
            raise TypeError(f"a list of names must hold texts, got {wrong[0]!r} among them")
        raise TypeError(
            'a vocabulary must be a list of names such as ["cat", "dog"], a dict, or a '
            f"camkit.Vocabulary, got {names!r}"
        )

    @classmethod
    def _of_dict(cls, names: Mapping[Any, Any]) -> "Vocabulary":
        if all(isinstance(name, str) for name in names.values()):  # the name of each output
            try:
                by_output = {int(output): name for output, name in names.items()}
            except (TypeError, ValueError) as error:
                raise TypeError(
                    "a dict of names must have outputs as keys, such as {0: 'cat'}, or hold the "
                    f"outputs of each name, such as {{'cat': [281, 282]}}; got {error}"
                ) from error
            outputs = sorted(by_output)
            members = None if outputs == list(range(len(outputs))) else tuple((o,) for o in outputs)
            return cls(tuple(by_output[output] for output in outputs), members)
        try:
            groups = {
                str(name): (int(held),) if isinstance(held, Integral) else tuple(map(int, held))
                for name, held in names.items()
            }
        except (TypeError, ValueError) as error:
            raise TypeError(
                "a dict of classes must hold the output or outputs of each name, such as "
                f"{{'cat': [281, 282], 'dog': 151}}; got {error}"
            ) from error
        return cls(tuple(groups), tuple(groups.values()))

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name_or_index: str | int) -> int:
        """Return the index of a class, given by index, name, or one of its synonyms in any case.

        A whole name takes precedence over another class's synonym.
        """
        if not isinstance(name_or_index, str):
            index = operator.index(name_or_index)  # also those of numpy
            if not 0 <= index < len(self):
                raise ValueError(f"a class index must lie in 0 to {len(self) - 1}, got {index}")
            return index
        wanted = _plain(name_or_index)
        matches = [i for i, name in enumerate(self.names) if _plain(name) == wanted]
        matches = matches or [i for i, name in enumerate(self.names) if wanted in _synonyms(name)]
        if len(matches) > 1:
            listed = ", ".join(f'{i} "{self.names[i]}"' for i in matches)
            raise ValueError(
                f'"{name_or_index}" names {len(matches)} classes: {listed}; use an index'
            )
        if matches:
            return matches[0]
        known = {word: None for name in self.names for word in (_plain(name), *_synonyms(name))}
        close = get_close_matches(wanted, known, n=3)
        hint = f"there are {len(self)}, such as {', '.join(self.names[:3])}"
        if close:
            hint = "did you mean " + " or ".join(f'"{word}"' for word in close) + "?"
        raise ValueError(f'no class is called "{name_or_index}"; {hint}')

    def resolve(self, items: Sequence[str | int]) -> tuple[int, ...]:
        """Return the indices of several classes, in the given order.

        No class may come twice, not even under two names.
        """
        if not items:
            raise ValueError("name at least one class, got none")
        indices = tuple(self.index(item) for item in items)
        for position, index in enumerate(indices):
            if index in indices[:position]:
                earlier = items[indices.index(index)]
                raise ValueError(
                    f"{earlier!r} and {items[position]!r} are the same class, {index} "
                    f'"{self.names[index]}"; name each class once'
                )
        return indices

    def subset(self, items: Sequence[str | int]) -> "Vocabulary":
        """Keep some classes of the same classifier, under the given names, in the given order."""
        indices = self.resolve(items)
        names = tuple(
            item if isinstance(item, str) else self.names[index]
            for item, index in zip(items, indices, strict=True)
        )
        members = self.members or tuple((index,) for index in range(len(self)))
        return Vocabulary(names, tuple(members[index] for index in indices))

    def value(self, index: int) -> int:
        """Return the value of a class in masks."""
        return index + 1 if self.values is None else self.values[index]

    def guesses(self) -> "Vocabulary":
        """Keep the classes that first guesses choose from, and their values in masks."""
        if self.candidates is None:
            return self
        kept = self.subset(self.candidates)
        return replace(kept, values=tuple(self.value(index) for index in self.candidates))

    def for_guesses(self, scores: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Return the scores that first guesses compare.

        Classes that are no candidates get minus infinity. The probability of a group of n outputs
        is divided by n ** 0.1, because large groups win too often: the exponent is our choice, made
        on photos of animals (benchmarks/first_guesses.py).
        """
        if self.candidates is None:
            return scores
        discounts = torch.full((len(self),), torch.inf)
        for index in self.candidates:
            outputs = 1 if self.members is None else len(self.members[index])
            discounts[index] = _DISCOUNT * math.log(outputs)
        return scores - discounts.to(scores)

    def score(self, outputs: Float[Tensor, "... o"]) -> Float[Tensor, "... C"]:
        """Join the outputs of each class into one score.

        The score is the logsumexp over the members: the log of their summed softmax mass, up to
        the constant that all classes share. That is our choice; it lets many weak members count.
        Without ``members``, the outputs are the scores.
        """
        self.check_outputs(outputs.shape[-1])
        if self.members is None:
            return outputs
        by_size: dict[int, list[int]] = {}
        for place, member in enumerate(self.members):
            by_size.setdefault(len(member), []).append(place)
        parts = []
        for size, places in by_size.items():  # classes of as many outputs are joined at once
            held = outputs[..., [output for place in places for output in self.members[place]]]
            parts.append(held if size == 1 else held.unflatten(-1, (-1, size)).logsumexp(-1))
        order = [place for places in by_size.values() for place in places]
        return torch.cat(parts, dim=-1)[..., sorted(range(len(order)), key=order.__getitem__)]

    def members_of(self, index: int) -> tuple[int, ...]:
        """Return the outputs of a class."""
        return (index,) if self.members is None else self.members[index]

    @cached_property
    def _largest(self) -> int:
        return max(max(member) for member in self.members or ((-1,),))

    def check_outputs(self, count: int) -> None:
        """Check that a classifier of this many outputs suits the vocabulary.

        Raises:
            ValueError: it does not.
        """
        if self.members is None:
            if count != len(self):
                raise ValueError(
                    f"`outputs` must hold one score for each of the {len(self)} names, got "
                    f"{count}; give `members` where names and outputs differ, and for a model that "
                    "returns embeddings (CLIP) use camkit.seeds.TextClasses instead"
                )
            return
        if count <= self._largest:
            largest = self._largest
            raise ValueError(
                f"`outputs` must hold at least {largest + 1} scores, as output {largest} is a "
                f"member, got {count}; use the classifier that the vocabulary was made for"
            )


def _plain(name: str) -> str:
    return name.strip().lower()


def _synonyms(name: str) -> list[str]:
    return [_plain(part) for part in name.split(",")]


def read_classes(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """Read ``cat,dog``, ``281,282``, or one ImageNet name that contains commas."""
    if text.strip().lower() in {name.lower() for name in vocabulary.names}:
        return vocabulary.resolve([text])
    items = [item.strip() for item in text.split(",") if item.strip()]
    return vocabulary.resolve([int(item) if item.isdigit() else item for item in items])
