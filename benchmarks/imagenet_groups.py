"""Group the outputs of ImageNet by WordNet: print `camkit.data.imagenet.OBJECTS_IN_IMAGENET`.

Reads ``data.noun`` of WordNet 3.0 (on Debian: ``apt-get install wordnet-base``). An output belongs
to a group if its synset lies below one of the group's synsets; the VOC classes come first, and what
they hold belongs to no other group. The choice of synsets is ours: things that a photo shows as one
object, whatever the kind.

    python benchmarks/imagenet_groups.py /usr/share/wordnet/data.noun
"""

import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

from timm.data.imagenet_info import ImageNetInfo

from camkit.data.imagenet import VOC_IN_IMAGENET

GROUPS = {
    "fish": ("02512053",),
    "salamander": ("01629276",),
    "frog": ("01639765",),
    "turtle": ("01662784",),
    "lizard": ("01674464",),
    "crocodilian": ("01696633",),
    "snake": ("01726692",),
    "spider": ("01772222",),
    "crab": ("01976957",),
    "lobster": ("01982650",),
    "beetle": ("02164464",),
    "butterfly": ("02274259",),
    "whale": ("02062744",),
    "wolf": ("02114100",),
    "wild dog": ("02115335",),
    "fox": ("02118333",),
    "wildcat": ("02124623",),
    "big cat": ("02127808",),
    "bear": ("02131653",),
    "mustelid": ("02441326",),
    "rabbit": ("02323902",),
    "pig": ("02395003",),
    "antelope": ("02419796",),
    "ape": ("02470899",),
    "monkey": ("02484322",),
    "lemur": ("02496913",),
    "elephant": ("02503517",),
    "fungus": ("12992868", "07734744"),
    "personal computer": ("03918480",),
    "keyboard": ("03614007",),
    "clock": ("03046257",),
    "guitar": ("03467517",),
    "piano": ("03928116",),
    "brass instrument": ("02891788",),
    "firearm": ("03343853",),
    "ship": ("04530566",),
    "truck": ("04490091",),
    "cart": ("02970849",),
    "bag": ("02773037",),
    "basket": ("02801938",),
    "bowl": ("02880940",),
    "ball": ("02778669",),
    "dumbbell or barbell": ("04571292",),
    "telephone": ("04401088",),
    "camera": ("02942699",),
    "pen": ("03906997",),
    "pan": ("03880531",),
    "baby bed": ("02766320",),
    "cabinet": ("02933112",),
    "swimsuit": ("04371563",),
    "necktie": ("03815615",),
    "sweater": ("04370048",),
    "coat": ("03057021",),
    "skirt": ("04230808",),
    "hat": ("03497657",),
    "helmet": ("03513137",),
    "body armor": ("02862048",),
    "shoe": ("03380867",),
    "shop": ("04202417",),
    "building": ("02913152", "03259505"),
    "bridge": ("02898711",),
    "fence": ("03327234",),
    "sandwich": ("07695965",),
    "bread": ("07679356",),
    "squash": ("07715561",),
    "lock": ("03682487",),
    "mountain": ("09359803",),
    "shore": ("09433442",),
}
"""Names, and the synsets of each by their offset in WordNet 3.0."""


def hypernyms(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the synsets above each noun synset, by offset."""
    above = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        words = line.partition("|")[0].split()
        start = 4 + 2 * int(words[3], 16)
        pointers = words[start + 1 : start + 1 + 4 * int(words[start])]
        above[words[0]] = tuple(
            pointers[place + 1]
            for place in range(0, len(pointers), 4)
            if pointers[place] in ("@", "@i")
        )
    return above


def main() -> None:
    above = hypernyms(Path(sys.argv[1]))

    @cache
    def ancestors(offset: str) -> frozenset[str]:
        return frozenset({offset}).union(*(ancestors(each) for each in above[offset]))

    wordnet_ids = ImageNetInfo("imagenet-1k").label_names()
    taken = {output for members in VOC_IN_IMAGENET.values() for output in members}
    for name, synsets in GROUPS.items():
        members = [
            output
            for output, wordnet_id in enumerate(wordnet_ids)
            if output not in taken and not ancestors(wordnet_id[1:]).isdisjoint(synsets)
        ]
        taken |= set(members)
        print(f'    "{name}": ({_ranges(members)},),')


def _ranges(members: list[int]) -> str:
    """Write numbers as a tuple's inside, runs of more than two as ranges."""
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(members)) if b != a + 1), len(members)]
    runs = [members[a:b] for a, b in pairwise(breaks)]
    return ", ".join(
        f"*range({run[0]}, {run[-1] + 1})" if len(run) > 2 else ", ".join(map(str, run))
        for run in runs
    )


if __name__ == "__main__":
    main()
