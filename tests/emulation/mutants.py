"""Mistakes to make in the kernels, each with the sentence that says what is lost.

All are compiled into one library and chosen by number when it runs: ``NOW(n)`` is true for one.
"""

import shutil

from camkit.native.kernels import SOURCES

MUTANTS = {
    "keys are used before they have landed": (
        "attention.cuh",
        "    wait_copies<0>();\n    __syncthreads();  // keys are",
        "    if (!NOW) wait_copies<0>();\n    __syncthreads();  // keys are",
    ),
    "values are used before they have landed": (
        "attention.cuh",
        "    wait_copies<0>();\n    __syncthreads();  // values and",
        "    if (!NOW) wait_copies<0>();\n    __syncthreads();  // values and",
    ),
    "no barrier before keys are used": (
        "attention.cuh",
        "__syncthreads();  // keys are",
        "if (!NOW) __syncthreads();  // keys are",
    ),
    "no barrier before values are used": (
        "attention.cuh",
        "__syncthreads();  // values and",
        "if (!NOW) __syncthreads();  // values and",
    ),
    "keys that do not exist are attended to": (
        "bias.cuh",
        "gated[threadIdx.x] = exists ? weight : NOTHING;",
        "gated[threadIdx.x] = exists || NOW ? weight : NOTHING;",
    ),
    "keys that do not exist are attended to by rows without gate": (
        "bias.cuh",
        "plain[threadIdx.x] = exists ?",
        "plain[threadIdx.x] = exists || NOW ?",
    ),
    "every row is gated": (
        "bias.cuh",
        "row < p.gated_rows ? gated",
        "row < p.gated_rows || NOW ? gated",
    ),
    "the weights of one head serve all": (
        "bias.cuh",
        "p.weight_strides, image, head)[key]",
        "p.weight_strides, image, NOW ? 0 : head)[key]",
    ),
    "the output is not scaled to the new maximum": (
        "attention.cuh",
        "out[m][d][r * 2] *= shrink;",
        "out[m][d][r * 2] *= NOW ? 1.f : shrink;",
    ),
    "the sum is not scaled to the new maximum": (
        "attention.cuh",
        "sum[m][r] *= shrink;",
        "sum[m][r] *= NOW ? 1.f : shrink;",
    ),
    "a row that attends to nothing becomes NaN": (
        "attention.cuh",
        "const float level = found == NOTHING ?",
        "const float level = found == NOTHING && !NOW ?",
    ),
    "class rows are not divided by their sum": (
        "attention.cuh",
        "power_of_two(row[key] - level)",
        "power_of_two(row[key] - (NOW ? 0.f : level))",
    ),
    "class rows are divided before all is written": (
        "attention.cuh",
        "__syncthreads();  // all logits",
        "if (!NOW) __syncthreads();  // all logits",
    ),
    "chunks of a row change places on their way": (
        "tiles.cuh",
        "tile + row * Shape::PITCH + place,",
        "tile + row * Shape::PITCH + (NOW ? place ^ Shape::CHUNK : place),",
    ),
    "past the last token memory is read on": (
        "tiles.cuh",
        "min(first + row, limit - 1)",
        "(NOW ? min(first + row, limit) : min(first + row, limit - 1))",
    ),
    "a head is used before it has landed": (
        "maps.cuh",
        "wait_copies<STAGES - 1>();",
        "if (!NOW) wait_copies<STAGES - 1>();",
    ),
    "no barrier before a head is used": (
        "maps.cuh",
        "__syncthreads();  // this head",
        "if (!NOW) __syncthreads();  // this head",
    ),
    "a head is overwritten while it is used": (
        "maps.cuh",
        "__syncthreads();  // and done with",
        "if (!NOW) __syncthreads();  // and done with",
    ),
    "a suppressed row gets a level of infinity": (
        "bias.cuh",
        "return lse == NOTHING ?",
        "return lse == NOTHING && !NOW ?",
    ),
    "what the affinity held is forgotten": (
        "maps.cuh",
        "p.beta == 0.f ? x",
        "p.beta == 0.f || NOW ? x",
    ),
    "only the last tile of keys is propagated": (
        "maps.cuh",
        "tile == int(blockIdx.y) ?",
        "tile == int(blockIdx.y) || NOW ?",
    ),
    "the last part of a propagation is left out": (
        "maps.cuh",
        "part < p.parts;",
        "part < p.parts - (NOW ? 1 : 0);",
    ),
    "no barrier before the keys' gradient is computed": (
        "backward.cuh",
        "__syncthreads();  // queries,",
        "if (!NOW) __syncthreads();  // queries,",
    ),
    "no barrier before the queries' gradient is computed": (
        "backward.cuh",
        "__syncthreads();  // keys, values",
        "if (!NOW) __syncthreads();  // keys, values",
    ),
    "queries that do not exist have a gradient": (
        "backward.cuh",
        "level_of(work.lse[query]) : NOTHING;",
        "level_of(work.lse[query]) : NOW ? 0.f : NOTHING;",
    ),
    "rows without gate have a gradient at the weights": (
        "backward.cuh",
        "if (gated) to_bias",
        "if (gated || NOW) to_bias",
    ),
    "the gradient of class rows is not centred": (
        "backward.cuh",
        "total += p.grad_rows[row + key] *",
        "total += NOW ? 0.f : p.grad_rows[row + key] *",
    ),
    "the gradient of the normaliser is lost": (
        "backward.cuh",
        "total -= p.grad_lse[query_of_all];",
        "total -= NOW ? 0.f : p.grad_lse[query_of_all];",
    ),
}


def write(folder):
    """Copy the sources, with every mistake in them, waiting for its number."""
    target = folder / "mutants"
    shutil.copytree(SOURCES, target)
    for number, (file, old, new) in enumerate(MUTANTS.values(), start=1):
        path = target / file
        text = path.read_text()
        assert text.count(old) == 1, f"{old} stands {text.count(old)} times in {file}"
        path.write_text(text.replace(old, new.replace("NOW", f"(camkit_mutant == {number})")))
    params = target / "params.h"
    params.write_text(f'{params.read_text()}extern "C" int camkit_mutant;\n')
    return target
