"""Processes that torchrun starts: which share of the images is theirs, and which GPU."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from camkit.bulk.plan import Share
from camkit.errors import CamkitError


@dataclass(frozen=True)
class Rank:
    """One of the processes that work on the same source.

    Attributes:
        share: its part of the chunks.
        local: its number on this machine.
        neighbours: how many processes this machine has.
    """

    share: Share = field(default_factory=Share)
    local: int = 0
    neighbours: int = 1

    @property
    def device(self) -> str | None:
        """The GPU of this process; None where torch sees none."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{self.local % count}" if count else None


def rank_of(environment: Mapping[str, str] | None = None) -> Rank:
    """Read the variables that torchrun sets; without them a process is alone.

    Args:
        environment: None takes that of this process.

    Raises:
        CamkitError: only some of them are set, or they are no numbers.
    """
    given = os.environ if environment is None else environment
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Rank()
    try:
        share = Share(int(given["RANK"]), int(given["WORLD_SIZE"]))
        local = int(given.get("LOCAL_RANK", "0"))
        return Rank(share, local, max(1, int(given.get("LOCAL_WORLD_SIZE", "1"))))
    except (KeyError, ValueError) as error:
        raise CamkitError(
            f"RANK and WORLD_SIZE must both be numbers, as torchrun sets them ({error}); unset "
            "both to run one process"
        ) from error
