"""Photos in a folder for each class, as torchvision's ImageFolder and many data sets keep them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from camkit.bulk.items import Failure, Item
from camkit.bulk.sources import Source
from camkit.data.names import composed


@dataclass(frozen=True, eq=False)
class LabelledByFolder:
    """The images of another source, each with the class that its folder is called after.

    The class of the key ``train/cat/1`` is cat. An image in no folder is a failure.

    Attributes:
        source: of the images.
    """

    source: Source

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the folders, sorted."""
        keys = (entry.key for entry in self.source if isinstance(entry, Item))
        return tuple(sorted({name for key in keys if (name := _folder(key))}))

    def __iter__(self) -> Iterator[Item | Failure]:
        index = {name: position for position, name in enumerate(self.classes)}
        for entry in self.source:
            if isinstance(entry, Failure):
                yield entry
            elif _folder(entry.key) in index:
                yield replace(entry, classes=(index[_folder(entry.key)],))
            else:
                reason = "lies in no folder that names its class; move it into one"
                yield Failure(entry.key, "list", reason)

    def __str__(self) -> str:
        return str(self.source)


def _folder(key: str) -> str:
    return composed(key.rpartition("/")[0].rpartition("/")[2])
