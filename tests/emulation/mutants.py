"""Mistakes to make in the kernels, each with the sentence that says what is lost.

All are compiled into one library and chosen by number when it runs: ``NOW(n)`` is true for one.
"""

import shutil

from camkit.native.kernels import SOURCES

MUTANTS = {
    "chunks of a row change places on their way": (
        "tiles.cuh",
        "copy16(tile + row * Shape::PITCH + place,",
        "copy16(tile + row * Shape::PITCH + (NOW && row % 2 ? place ^ Shape::CHUNK : place),",
    ),
    "past the last token memory is read on": (
        "tiles.cuh",
        "min(first + at / Shape::CHUNKS, limit - 1)",
        "min(first + at / Shape::CHUNKS, NOW ? limit : limit - 1)",
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
        "if (!NOW || head == p.heads - 1) __syncthreads();  // and done with",
    ),
    "no barrier at the end of the last head": (
        "maps.cuh",
        "__syncthreads();  // and done with",
        "if (!NOW || head < p.heads - 1) __syncthreads();  // and done with",
    ),
    "no barrier before the sums are read": (
        "maps.cuh",
        "__syncthreads();  // all sums",
        "if (!NOW) __syncthreads();  // all sums",
    ),
    "a suppressed row gets a level of infinity": (
        "maps.cuh",
        "return lse == NOTHING ?",
        "return lse == NOTHING && !NOW ?",
    ),
    "every row is gated": (
        "maps.cuh",
        "WEIGHTED && row < p.gated_rows;",
        "WEIGHTED && (row < p.gated_rows || NOW);",
    ),
    "the weights of the first head serve all": (
        "maps.cuh",
        "weights_of(p, image, head)[key] * LOG2_E;",
        "weights_of(p, image, NOW ? 0 : head)[key] * LOG2_E;",
    ),
    "every class row is gated": (
        "maps.cuh",
        "weights && query < p.gated_rows ?",
        "weights && (query < p.gated_rows || NOW) ?",
    ),
    "every head has the normaliser of the first": (
        "maps.cuh",
        "++head, lse += p.queries)",
        "++head, lse += NOW ? 0 : p.queries)",
    ),
    "what the affinity held is forgotten": (
        "maps.cuh",
        "p.beta == 0.f ? x",
        "p.beta == 0.f || NOW ? x",
    ),
    "a class row is another's": (
        "maps.cuh",
        "p.rows[(both * p.row_count + first) * p.keys + key] = x;",
        "p.rows[(both * p.row_count + (NOW ? 0 : first)) * p.keys + key] = x;",
    ),
    "one lane of four is left out": (
        "maps.cuh",
        "for (int d = lane * CHUNK; d < p.width; d += 4 * CHUNK)",
        "for (int d = lane * CHUNK; d < p.width; d += (NOW ? 8 : 4) * CHUNK)",
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
    "keys that do not exist are propagated": (
        "maps.cuh",
        "if (at >= columns) continue;",
        "if (at >= columns && !NOW) continue;",
    ),
    "a fold begins before the last is read": (
        "doei.cuh",
        "__syncthreads();  // a thread may still",
        "if (!NOW) __syncthreads();  // a thread may still",
    ),
    "a fold is read before all have written": (
        "doei.cuh",
        "room[threadIdx.x / 32] = x;\n  __syncthreads();",
        "room[threadIdx.x / 32] = x;\n  if (!NOW) __syncthreads();",
    ),
    "a flat row is divided by its span": (
        "doei.cuh",
        "flat = span == 0.f;",
        "flat = span == 0.f && !NOW;",
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
