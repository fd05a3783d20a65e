"""Readout: a linear read-out of patch tokens, fitted in closed form, kept as sums that add up."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from camkit import __version__
from camkit.errors import DataError
from camkit.manifest import unfinished
from camkit.printing import short_repr
from camkit.untrusted import bounded, read_json

Form: TypeAlias = Literal["auto", "object", "classes"]
"""One column for all objects, or one for each class; "auto" decides by the number of photos."""

MANY_PHOTOS = 100
"""From this many photos on, each class gets a column of its own, and image labels a classifier."""

_RIDGE, _IMAGE_RIDGE = 0.1, 1.0  # penalties, as shares of the mean variance of a feature
_BALANCE = 0.5  # a class of n patches weighs n ** (1 - 0.5)
_OWN_COLUMN = 200  # patches from which a class has a column of its own, if it has enough photos
_KNOWN = 50  # patches from which a class counts as seen
_SHARE = 0.7  # of its patches that must be read as object
_PHOTOS = 10  # from which a class has a column, and a classifier if as many lack the class
_FILE = "camkit_readout_1"
_PARTS = ("count", "total", "product")


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over feature vectors by group, float64; sums of two sets of photos add up.

    Attributes:
        count: number of vectors, ``(g,)``.
        total: their sum, ``(g, D)``.
        product: the sum of their outer products, ``(g, D, D)``.
    """

    count: Float[Tensor, " g"]
    total: Float[Tensor, "g D"]
    product: Float[Tensor, "g D D"]

    __repr__ = short_repr

    @classmethod
    def of(cls, vectors: Float[Tensor, "n D"]) -> "Moments":
        """Return the sums of one group."""
        vectors = vectors.double()
        count = torch.tensor([float(len(vectors))], dtype=torch.float64)
        return cls(count, vectors.sum(0, keepdim=True).cpu(), (vectors.mT @ vectors)[None].cpu())

    @classmethod
    def none(cls, groups: int, width: int) -> "Moments":
        """Return empty sums."""
        zeros = torch.zeros(groups, width, width, dtype=torch.float64)
        return cls(zeros[:, 0, 0].clone(), zeros[:, 0].clone(), zeros)

    @classmethod
    def joined_from(cls, parts: Sequence["Moments"]) -> "Moments":
        """Return the groups of all parts, one after the other."""
        names = ("count", "total", "product")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def __len__(self) -> int:
        return len(self.count)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.total + other.total, self.product + other.product
        )

    def spread_to(self, rows: Sequence[int], groups: int) -> "Moments":
        """Return sums of ``groups`` groups, in which group i of these is number ``rows[i]``."""
        wide = Moments.none(groups, self.total.shape[1])
        for name in ("count", "total", "product"):
            getattr(wide, name)[list(rows)] += getattr(self, name)
        return wide

    def joined(self, groups: Sequence[Sequence[int]]) -> "Moments":
        """Return the sums of groups of groups."""
        parts = [
            [getattr(self, name)[list(rows)].sum(0) for rows in groups]
            for name in ("count", "total", "product")
        ]
        return Moments(*(torch.stack(part) for part in parts))


@dataclass(frozen=True, eq=False)
class ImageMoments:
    """Sums over whole photos, for a classifier from image labels: float64.

    Attributes:
        vectors: of the pooled tokens of all photos, one group.
        labelled: sum of the pooled tokens of the photos of each class, ``(k, d)``.
        photos: number of photos of each class, ``(k,)``.
    """

    vectors: Moments
    labelled: Float[Tensor, "k d"]
    photos: Float[Tensor, " k"]

    __repr__ = short_repr

    @classmethod
    def of(cls, vector: Float[Tensor, " d"], classes: Sequence[int], known: int) -> "ImageMoments":
        """Return the sums of one photo."""
        vector = vector.double().cpu()
        present = torch.zeros(known, dtype=torch.float64)
        present[list(classes)] = 1.0
        return cls(Moments.of(vector[None]), present[:, None] * vector, present)

    @classmethod
    def none(cls, known: int, width: int) -> "ImageMoments":
        """Return empty sums."""
        zeros = torch.zeros(known, width, dtype=torch.float64)
        return cls(Moments.none(1, width), zeros, zeros[:, 0].clone())

    def __add__(self, other: "ImageMoments") -> "ImageMoments":
        return ImageMoments(
            self.vectors + other.vectors,
            self.labelled + other.labelled,
            self.photos + other.photos,
        )

    def spread_to(self, rows: Sequence[int], known: int) -> "ImageMoments":
        """Return the sums over ``known`` classes, in which class i of these is ``rows[i]``."""
        wide = ImageMoments.none(known, self.labelled.shape[1])
        wide.labelled[list(rows)] += self.labelled
        wide.photos[list(rows)] += self.photos
        return replace(wide, vectors=self.vectors)


@dataclass(frozen=True)
class Origin:
    """What a read-out was fitted on; it must be the same wherever it is used or added.

    Attributes:
        model: the class of the model.
        weights: hash of the weights (`camkit.manifest.values_hash`); empty to take any.
        method: the settings of the first maps (`camkit.Method.settings`), as JSON.
    """

    model: str
    weights: str
    method: str

    def why_not(self, other: "Origin") -> str | None:
        """Return how another origin differs; None if it fits."""
        for name in ("model", "weights", "method"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its and not (name == "weights" and "" in (mine, its)):
                what = "hash of the weights" if name == "weights" else name
                return f"the {what} differs: {mine} in the fit, {its} here"
        return None


@dataclass(frozen=True, eq=False)
class Linear:
    """Scores that are linear in a feature vector.

    Attributes:
        weight: ``(D, c)``.
        bias: ``(c,)``.
    """

    weight: Float[Tensor, "D c"]
    bias: Float[Tensor, " c"]

    __repr__ = short_repr

    def __call__(self, vectors: Float[Tensor, "... D"]) -> Float[Tensor, "... c"]:
        return vectors @ self.weight.to(vectors) + self.bias.to(vectors)


@dataclass(frozen=True, eq=False)
class Readout:
    """Tells objects from background by the tokens of a patch, learnt over a folder of photos.

    `camkit.fit` makes it from photos with image-level labels, without masks. The patches that the
    first maps are sure of, as object or as background, are the examples of a ridge regression with
    a closed form, which needs only sums: the sums of two sets of photos add up (``a + b``).

    The recipe is ours; docs/fitting.md tells what it was chosen on, and its neighbours.

    Attributes:
        classes: names of the classes of the photos.
        patches: sums over the patches that the first maps are sure of: of the background, then of
            each class.
        images: sums over the pooled tokens of whole photos, for a classifier from image labels.
        photos: number of photos.
        origin: the model and the first maps.
        form: "object" reads all objects by one column, which a few photos suffice for; "classes"
            reads each class by a column of its own, and adds a classifier fitted on the image
            labels to the first maps. "auto" takes "classes" from `MANY_PHOTOS` on.
        made_with: version of camkit.
    """

    classes: tuple[str, ...]
    patches: Moments
    images: ImageMoments
    photos: int
    origin: Origin
    form: Form = "auto"
    made_with: str = field(default=__version__)

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"`form` must be one of {get_args(Form)}, got {self.form!r}")
        groups = len(self.classes) + 1
        if len(self.patches) != groups or len(self.images.photos) != groups - 1:
            raise ValueError(
                f"the sums must be those of the background and {groups - 1} classes, got "
                f"{len(self.patches)} groups of patches and {len(self.images.photos)} of photos"
            )

    def __add__(self, other: "Readout") -> "Readout":
        """Return the read-out of both sets of photos; classes are joined by name.

        A photo of one set counts as a photo without the classes that only the other set has.

        Raises:
            ValueError: they belong to different models, weights or first maps, or differ in form.
        """
        if not isinstance(other, Readout):
            return NotImplemented
        reason = self.origin.why_not(other.origin)
        if reason is None and self.form != other.form:
            reason = f"the form differs: {self.form} and {other.form}"
        if reason is not None:
            raise ValueError(f"read-outs of different origin do not add up: {reason}")
        names = (*self.classes, *(name for name in other.classes if name not in self.classes))
        parts = []
        for each in (self, other):
            rows = [names.index(name) for name in each.classes]
            groups = [0, *(row + 1 for row in rows)]
            spread = each.patches.spread_to(groups, len(names) + 1)
            parts.append((spread, each.images.spread_to(rows, len(names))))
        (patches, images), (more_patches, more_images) = parts
        origin = self.origin if self.origin.weights else other.origin
        return replace(
            self,
            classes=names,
            patches=patches + more_patches,
            images=images + more_images,
            photos=self.photos + other.photos,
            origin=origin,
        )

    def __radd__(self, other: object) -> "Readout":
        """Let ``sum(readouts)`` start from 0."""
        return self if other == 0 else NotImplemented

    @property
    def by_class(self) -> bool:
        """Whether classes are read by columns of their own."""
        return self.form == "classes" or (self.form == "auto" and self.photos >= MANY_PHOTOS)

    @cached_property
    def _columns(self) -> tuple[tuple[int, ...], ...]:
        """Return the classes of each column: classes of few patches or photos share one."""
        everything = tuple(range(len(self.classes)))
        if not self.by_class:
            return (everything,)
        count = self.patches.count[1:]
        photos = self.images.photos
        enough = {i for i in everything if count[i] >= _OWN_COLUMN and photos[i] >= _PHOTOS}
        own = tuple((each,) for each in everything if each in enough)
        rest = tuple(each for each in everything if count[each] > 0 and each not in enough)
        return (*own, rest) if rest else own

    @cached_property
    def _margins(self) -> Linear:
        """Solve the ridge regression: the score of each column less that of the background."""
        groups = [(0,), *([each + 1 for each in column] for column in self._columns)]
        scores = _solve(self.patches.joined(groups))
        weight, bias = scores.weight, scores.bias
        return Linear(weight[:, 1:] - weight[:, :1], bias[1:] - bias[:1])

    @cached_property
    def _column_of(self) -> dict[str, int]:
        return {
            self.classes[each]: place
            for place, column in enumerate(self._columns)
            for each in column
        }

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of each class's own patches that are read as object; 0 for classes too rare.

        It follows from the sums alone, if margins are normally distributed within a class.
        """
        shares = {}
        for row, name in enumerate(self.classes, start=1):
            count = float(self.patches.count[row])
            if count < _KNOWN or name not in self._column_of or not self.patches.count[0]:
                shares[name] = 0.0
                continue
            column = self._column_of[name]
            weight, bias = self._margins.weight[:, column], self._margins.bias[column]
            mean = self.patches.total[row] / count
            spread = self.patches.product[row] / count - torch.outer(mean, mean)
            deviation = float((weight @ spread @ weight).clamp_min(1e-12).sqrt())
            shares[name] = _normal_share(float(mean @ weight + bias) / deviation)
        return shares

    def knows(self, name: str) -> bool:
        """Whether maps of a class may be read: classes that the fit never saw look like background.

        A class is known if enough of its patches were seen (50) and 70 % of them are read as
        object. These limits are ours.
        """
        return self.shares.get(name, 0.0) >= _SHARE

    def margins(
        self, tokens: Float[Tensor, "b n D"], names: Sequence[Sequence[str]]
    ) -> Float[Tensor, "b k n"]:
        """Return how much more a patch looks like a class than like background.

        Args:
            tokens: final tokens of the patches.
            names: of the k classes of each image, all known (`knows`); others get zeros.

        Raises:
            ValueError: the tokens have another width.
        """
        width = self.patches.total.shape[1]
        if tokens.shape[-1] != width:
            raise ValueError(
                f"this read-out was fitted on tokens of {width} channels, this model has "
                f"{tokens.shape[-1]}; fit it again for this model"
            )
        slots = max((len(row) for row in names), default=0)
        margins = tokens.new_zeros(len(tokens), slots, tokens.shape[1])
        if self.patches.count[0]:
            scores = self._margins(tokens)
            for image, row in enumerate(names):
                for slot, name in enumerate(row):
                    if self.knows(name):
                        margins[image, slot] = scores[image, :, self._column_of[name]]
        return margins

    @cached_property
    def _image_scores(self) -> Linear:
        return _solve_images(self.images)

    def has_classifier(self, name: str) -> bool:
        """Whether the classifier from image labels knows a class: 10 photos with it, 10 without."""
        if not self.by_class or name not in self.classes:
            return False
        photos = float(self.images.photos[self.classes.index(name)])
        return _PHOTOS <= photos <= float(self.images.vectors.count[0]) - _PHOTOS

    def class_scores(
        self, tokens: Float[Tensor, "b n D"], names: Sequence[Sequence[str]]
    ) -> Float[Tensor, "b k n"]:
        """Score patches by the classifier from image labels; zeros where it knows no class."""
        slots = max((len(row) for row in names), default=0)
        scores = tokens.new_zeros(len(tokens), slots, tokens.shape[1])
        if not self.by_class:
            return scores
        every = self._image_scores(tokens)
        for image, row in enumerate(names):
            for slot, name in enumerate(row):
                if self.has_classifier(name):
                    scores[image, slot] = every[image, :, self.classes.index(name)]
        return scores

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, which appears complete or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "classes": self.classes,
            "photos": self.photos,
            "form": self.form,
            "made_with": self.made_with,
            "origin": vars(self.origin),
        }
        text = {_FILE: json.dumps(facts, ensure_ascii=False)}
        with unfinished(path) as draft:
            save_file(self._tensors(), draft, metadata=text)
        return path

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "patches.count": self.patches.count,
            "patches.total": self.patches.total,
            "patches.product": self.patches.product,
            "images.count": self.images.vectors.count,
            "images.total": self.images.vectors.total,
            "images.product": self.images.vectors.product,
            "images.labelled": self.images.labelled,
            "images.photos": self.images.photos,
        }

    @classmethod
    def load(cls, path: str | Path) -> "Readout":
        """Read a file of `save`; nothing in it is run.

        Raises:
            DataError: the file cannot be read, or holds no read-out.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with bounded(path):
                with safe_open(str(path), framework="pt") as file:
                    facts = read_json((file.metadata() or {})[_FILE], path)
                    held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                patches = Moments(*(held[f"patches.{part}"] for part in _PARTS))
                vectors = Moments(*(held[f"images.{part}"] for part in _PARTS))
                images = ImageMoments(vectors, held["images.labelled"], held["images.photos"])
                readout = cls(
                    tuple(facts["classes"]),
                    patches,
                    images,
                    int(facts["photos"]),
                    Origin(**facts["origin"]),
                    facts["form"],
                    str(facts["made_with"]),
                )
                readout._check()
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as a read-out ({error})") from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} holds no read-out ({error!r}); expected a file that Readout.save or "
                "`camkit fit` wrote"
            ) from error
        return readout

    def _check(self) -> None:
        """Raise ValueError for sums that do not belong together."""
        known, width = len(self.classes), self.patches.total.shape[-1]
        shapes = {
            "patches.count": (known + 1,),
            "patches.total": (known + 1, width),
            "patches.product": (known + 1, width, width),
            "images.count": (1,),
            "images.total": (1, width),
            "images.product": (1, width, width),
            "images.labelled": (known, width),
            "images.photos": (known,),
        }
        for name, tensor in self._tensors().items():
            if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float64:
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} is not finite")

    @cached_property
    def digest(self) -> str:
        """Hash of the sums and of everything else: read-outs with the same digest read the same."""
        digest = hashlib.sha256(json.dumps([self.classes, self.photos, self.form]).encode())
        for tensor in self._tensors().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        form = "classes" if self.by_class else "object"
        known = sum(self.knows(name) for name in self.classes)
        return (
            f"Readout({self.photos} photos, {known} of {len(self.classes)} classes known, "
            f"form={form}, {self.digest})"
        )


def _solve(moments: Moments) -> Linear:
    """Fit a ridge regression of the groups' indicators, balanced between groups."""
    count = moments.count
    weight = count.clamp_min(1.0) ** -_BALANCE
    weight = weight / weight.mean()
    total = (weight * count).sum()
    mean = (weight[:, None] * moments.total).sum(0) / total
    target = weight * count / total
    gram = torch.einsum("g,gij->ij", weight, moments.product) - total * torch.outer(mean, mean)
    cross = (weight[:, None] * moments.total).mT - total * torch.outer(mean, target)
    solved = torch.linalg.solve(_with_ridge(gram, _RIDGE), cross)
    return Linear(solved, target - mean @ solved)


def _solve_images(images: ImageMoments) -> Linear:
    """Fit a ridge regression of the image labels."""
    count = images.vectors.count[0].clamp_min(1.0)
    mean, target = images.vectors.total[0] / count, images.photos / count
    gram = images.vectors.product[0] - count * torch.outer(mean, mean)
    cross = images.labelled.mT - count * torch.outer(mean, target)
    solved = torch.linalg.solve(_with_ridge(gram, _IMAGE_RIDGE), cross)
    return Linear(solved, target - mean @ solved)


def _with_ridge(gram: Float[Tensor, "D D"], share: float) -> Float[Tensor, "D D"]:
    penalty = (share * gram.diagonal().mean()).clamp_min(1e-12)
    return gram + penalty * torch.eye(len(gram), dtype=gram.dtype)


def _normal_share(deviations: float) -> float:
    """Return the share of a normal distribution that lies above minus ``deviations``."""
    return 0.5 * (1.0 + math.erf(deviations / math.sqrt(2.0)))
