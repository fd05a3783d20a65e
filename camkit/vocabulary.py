"""Class names and the classifier outputs that belong to each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Vocabulary:
    """The user's class names, mapped to the outputs of a classifier.

    A name may list synonyms, separated by commas. ``members`` lists the outputs of each class;
    without it, name i is output i.

    >>> animals = Vocabulary(("cat", "dog"), members=((281, 282), (151,)))
    >>> animals.index("Dog")
    1
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.names or not all(name.strip() for name in self.names):
            raise ValueError("a vocabulary needs at least one name, and no name may be blank")
        if self.members is None:
            return
        if len(self.members) != len(self.names):
            raise ValueError(
                f"`members` must hold one entry for each of the {len(self.names)} names, "
                f"got {len(self.members)}"
            )
        for name, outputs in zip(self.names, self.members, strict=True):
            if not outputs or min(outputs) < 0 or len(set(outputs)) < len(outputs):
                raise ValueError(
                    f'`members` of "{name}" must be outputs from 0, at least one and none twice, '
                    f"got {outputs}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name_or_index: str | int) -> int:
        """Return the index of a class, given by index, name, or one of its synonyms in any case.

        A whole name takes precedence over another class's synonym.
        """
        if isinstance(name_or_index, int):
            if not 0 <= name_or_index < len(self):
                raise ValueError(
                    f"a class index must lie in 0 to {len(self) - 1}, got {name_or_index}"
                )
            return name_or_index
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

    def score(self, outputs: Float[Tensor, "... o"]) -> Float[Tensor, "... C"]:
        """Join the outputs of each class into one score.

        The score is the logsumexp over the members: the log of their summed softmax mass, up to
        the constant that all classes share. That is our choice; it lets many weak members count.
        Without ``members``, the outputs are the scores.
        """
        count = outputs.shape[-1]
        if self.members is None:
            if count != len(self):
                raise ValueError(
                    f"`outputs` must hold one score for each of the {len(self)} names, got "
                    f"{count}; give `members` where names and outputs differ"
                )
            return outputs
        largest = max(max(member) for member in self.members)
        if count <= largest:
            raise ValueError(
                f"`outputs` must hold at least {largest + 1} scores, as output {largest} is a "
                f"member, got {count}; use the classifier that the vocabulary was made for"
            )
        single = [place for place, member in enumerate(self.members) if len(member) == 1]
        joined = [place for place, member in enumerate(self.members) if len(member) > 1]
        parts = [  # a thousand classes of one output each are picked at once
            outputs[..., [self.members[place][0] for place in single]],
            *(outputs[..., list(self.members[i])].logsumexp(-1, keepdim=True) for i in joined),
        ]
        order = sorted(range(len(self)), key=[*single, *joined].__getitem__)
        return torch.cat(parts, dim=-1)[..., order]


def _plain(name: str) -> str:
    return name.strip().lower()


def _synonyms(name: str) -> list[str]:
    return [_plain(part) for part in name.split(",")]
