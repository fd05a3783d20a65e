"""Measure which models camkit can read and edit; writes docs/models.md.

    python benchmarks/models.py

Builds every model of the tests' zoo, every re-created research fork and every refused model in a
tiny version with random weights, and runs `camkit.diagnose` on it.
"""

import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from host_tables import END, START, details, found as found_in_hosts
from torch import nn

import camkit

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "timm", "transformers", "open_clip_torch", "torchvision")
HEAD = """# Which models work

`python benchmarks/models.py` generates this page: it builds a tiny version of each model with
random weights and runs `camkit.diagnose` on it. The tests compare the captured attention of each
model with its own un-fused maps, and edits with the same change made by hand. {versions}.

To check your own model, run `camkit doctor TIMM_NAME`, `camkit doctor mymodule:build`,
`camkit doctor hf:FOLDER`, or `print(camkit.diagnose(model, images))`.

- **path**: how camkit reads attention. *sdpa*: from the q and k of the fused kernel, which stays
  on. *softmax*: the model computes its attention map itself. *mha*: `multi_head_attention_forward`,
  which is opaque, so camkit computes the same operations explicitly, bit for bit.
- **tokens**: positions of class, distillation and register tokens in the sequence.
- **scores**: the layer that computes the class scores. *given*: the model returns none, so you pass
  `scores=` (for CLIP, the similarity of image and text).
- **seeds**: G `GradientSeed`, R `RelevanceSeed`, A `ClassAttentionSeed`, W `ClassWeightSeed`.
- **edit**: largest change of an output under an edit that should change nothing.
"""
HOSTS = f"""## Research codebases

`python benchmarks/hosts.py --repos FOLDER` runs these repositories at the commits named: small
models of their own classes with random weights, read, diagnosed, wrapped, and trained for a step
under `DOEI`; their maps and files are compared with camkit's, and numbers are largest differences.
[Plug camkit into your codebase](plug_in.md) has the lines to add.

{START}

{{table}}

{END}
"""
COLUMNS = ("model", "path", "tokens", "pooling", "scores", "seeds", "edit")
SEEDS = {
    "GradientSeed": "G",
    "RelevanceSeed": "R",
    "ClassAttentionSeed": "A",
    "ClassWeightSeed": "W",
}
Run = Callable[[nn.Module], object]


def readable() -> Iterator[tuple[str, camkit.diagnosis.Diagnosis]]:
    from forks import FORKS
    from zoo import ZOO

    for name, entry in ZOO.items():
        torch.manual_seed(0)
        pixels = torch.randn(2, 3, *entry.shape)
        yield name, camkit.diagnose(entry.build().eval(), calling(entry.call, pixels))
    for name, fork in FORKS.items():
        torch.manual_seed(0)
        model, pixels = fork.build()
        run = calling(fork.call, pixels)
        yield f"{name} (re-created)", camkit.diagnose(model.eval(), run, **fork.options)


def refused() -> Iterator[tuple[str, camkit.diagnosis.Diagnosis]]:
    from test_zoo import REFUSED

    for name, (build, _) in REFUSED.items():
        torch.manual_seed(0)
        yield name, camkit.diagnose(build().eval(), torch.randn(2, 3, 64, 64))


def calling(call: Callable, pixels: torch.Tensor) -> Run:
    return lambda model: call(model, pixels)


def row(name: str, found: camkit.diagnosis.Diagnosis) -> tuple[str, ...]:
    if found.refusal is not None:
        raise SystemExit(f"{name} was expected to work, but: {found.refusal}")
    roles = found.anatomy
    tokens = [
        f"{word} {', '.join(map(str, positions))}"
        for word, positions in (
            ("class", roles.class_tokens),
            ("dist", roles.distillation_tokens),
            ("reg", roles.register_tokens),
            ("other", roles.other_tokens),
        )
        if positions
    ]
    paths = {"scaled_dot": "sdpa", "softmax": "softmax", "multi_head": "mha"}
    seen = [short for start, short in paths.items() if start in found.path]
    return (
        name,
        ", ".join(seen),
        "; ".join(tokens) or "patches only",
        str(found.pooling or ""),
        "given" if found.rule.startswith("none") else found.rule.partition(",")[0],
        "".join(letter for seed, letter in SEEDS.items() if found.seeds[seed] is None),
        "keys only" if found.edit_drift is None else f"{found.edit_drift:.0e}",
    )


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest  # noqa: F401 - lets timm run beside a torch without GPU

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    works = table(COLUMNS, [row(name, found) for name, found in readable()])
    reasons = [(name, found.refusal or "") for name, found in refused()]
    if not all(reason for _, reason in reasons):
        raise SystemExit(f"these were expected to be refused: {reasons}")
    text = "\n".join(
        (
            HEAD.format(versions=versions),
            f"## Read and edited\n\n{works}\n",
            HOSTS.format(table=details(found_in_hosts())),
            f"## Refused, with the reason\n\n{table(('model', 'reason'), reasons)}",
        )
    )
    (ROOT / "docs" / "models.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
