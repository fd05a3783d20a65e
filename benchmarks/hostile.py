"""Try hostile and damaged files: each must be read, or refused in one line that names it.

    python benchmarks/hostile.py                 # writes benchmarks/results/hostile.md
    python benchmarks/hostile.py --seed 1 --only images

Inputs are made from a seed. They are read in batches by other processes, whose memory and time are
limited; a batch that dies costs one input. A fault is another exception than camkit's own, an error
of several lines or without the file's name, more time or memory than allowed, code that ran, or a
file outside of the input's folder that was written or removed.
"""

import argparse
import io
import json
import random
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np
from PIL import Image, features

RESULTS = Path(__file__).with_name("results") / "hostile.md"
SECONDS = 5  # for one input
MEMORY = 3 << 30  # above what Python and torch take
LONGEST = 1000  # characters of an error, with a long path in it
OBJECT = {"descr": "|O", "fortran_order": False, "shape": ()}
INTACT = "as written"
KINDS = ("images", "masks", "cams", "labels", "proposals", "readouts", "journals", "manifests")


@dataclass(frozen=True)
class Input:
    """A file to be read: its kind, how it was made, its name and content."""

    kind: str
    how: str
    name: str
    content: bytes


# What is tried


def damaged(data: bytes, rng: random.Random, cuts: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """Yield a file cut at random places, and with bits changed, mostly near its start."""
    yield INTACT, data
    for _ in range(cuts):
        yield "cut", data[: rng.randrange(len(data))]
    for _ in range(flips):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 20))):
            place = rng.randrange(min(len(data), rng.choice((64, 400, len(data)))))
            changed[place] ^= 1 << rng.randrange(8)
        yield "bits changed", bytes(changed)
    for _ in range(flips // 5):
        place = rng.randrange(len(data))
        yield "bytes put in", data[:place] + rng.randbytes(rng.choice((1, 4, 100))) + data[place:]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(cols: int, rows: int, colour: int = 2, more: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""
    header = struct.pack(">IIBBBBB", cols, rows, 8, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + body + chunk(b"IEND", b"")


def pictures() -> dict[str, bytes]:
    """One picture in every format and several modes."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48))
    forms: dict[str, tuple[str, str, dict[str, object]]] = {
        "a.jpg": (
            "JPEG",
            "RGB",
            {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06"},
        ),
        "cmyk.jpg": ("JPEG", "CMYK", {}),
        "a.png": ("PNG", "RGBA", {}),
        "palette.png": ("PNG", "P", {}),
        "grey16.png": ("PNG", "I;16", {}),
        "a.webp": ("WEBP", "RGB", {}),
        "a.gif": ("GIF", "P", {}),
        "a.tif": ("TIFF", "RGB", {}),
        "packed.tif": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        "a.bmp": ("BMP", "RGB", {}),
        "a.ppm": ("PPM", "RGB", {}),
        "a.jp2": ("JPEG2000", "RGB", {}),
    }
    if features.check("avif"):
        forms["a.avif"] = ("AVIF", "RGB", {})
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        forms["a.heic"] = ("HEIF", "RGB", {})
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401

        forms["a.jxl"] = ("JXL", "RGB", {})
    files = {}
    for name, (form, mode, settings) in forms.items():
        buffer = io.BytesIO()
        grey = small.convert("L")
        picture = Image.fromarray(np.asarray(grey, np.uint16) * 9) if mode == "I;16" else None
        (picture or small.convert(mode)).save(buffer, form, **settings)
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    small.save(buffer, "TIFF", save_all=True, append_images=[small.copy()])
    return files | {"pages.tif": buffer.getvalue()}


def image_inputs(rng: random.Random) -> Iterator[Input]:
    for name, data in pictures().items():
        for how, content in damaged(data, rng, 12, 30):
            yield Input("images", how, name, content)
    bombs = {
        "a size of 2^31": png_bomb(2**31 - 1, 2**31 - 1),
        "a size of 100,000": png_bomb(100_000, 100_000),
        "a size below the limit": png_bomb(8000, 8000),
        "a text that unpacks": png_bomb(
            8, 8, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 9))
        ),
        "a profile that unpacks": png_bomb(
            8, 8, more=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8), 9))
        ),
        "GIF of 65535": b"GIF89a\xff\xff\xff\xff\0\0\0"
        + b"\x2c"
        + bytes(4)
        + b"\xff\xff\xff\xff\0",
        "BMP of 2^31": b"BM"
        + bytes(12)
        + struct.pack("<IiiHHIIiiII", 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
        "JPEG XL of 2^30": b"\xff\x0a\xff\xff\xff\xff\xf7\xff\xff\xff\xff" + bytes(40),
        "WebP of 2^24": b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff"
        + bytes(60),
        "PPM of 10^9": b"P6 1000000000 1000000000 255\n" + bytes(100),
    }
    for how, content in bombs.items():
        for suffix in ("jpg", "png"):
            yield Input("images", how, f"bomb.{suffix}", content)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%s) run\n"
    others = (
        eps,
        b"",
        b"\0",
        b"<svg/>",
        b"%PDF-1.7",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"II*\0",
        b"RIFF",
    )
    for content in others:
        yield Input("images", "another format", "other.jpg", content)
    for _ in range(40):
        start = rng.choice([data[:12] for data in pictures().values()])
        yield Input("images", "a start and noise", "noise.png", start + rng.randbytes(300))


def mask_inputs(rng: random.Random) -> Iterator[Input]:
    for bits in (8, 16):
        ids = np.zeros((40, 60), np.uint8 if bits == 8 else np.uint16)
        ids[5:20, 5:30] = 3
        buffer = io.BytesIO()
        Image.fromarray(ids).save(buffer, "PNG")
        for how, content in damaged(buffer.getvalue(), rng, 15, 60):
            yield Input("masks", how, "mask.png", content)


def npy(data: bytes) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, OBJECT)
    return buffer.getvalue() + data


def cam_files() -> dict[str, bytes]:
    maps = np.linspace(0, 1, 2 * 6 * 8, dtype=np.float32).reshape(2, 6, 8)
    keys = np.array([3, 7])
    dicts: dict[str, object] = {
        "both": {"keys": keys, "high_res": maps, "attn_highres": maps.astype(np.float16)},
        "psa": {3: maps[0], 7: maps[1]},
        "logits": {"msc_seg": maps},
    }
    files = {}
    for name, content in dicts.items():
        buffer = io.BytesIO()
        np.save(buffer, np.array(content, object), allow_pickle=True)
        files[f"{name}.npy"] = buffer.getvalue()
    from safetensors.numpy import save

    arrays = {"keys": keys, "high_res": maps}
    for name, pack in (("plain.npz", np.savez), ("packed.npz", np.savez_compressed)):
        buffer = io.BytesIO()
        pack(buffer, **arrays)
        files[name] = buffer.getvalue()
    return files | {"a.safetensors": save(arrays)}


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    def call(module: str, name: str, argument: str) -> bytes:
        return f"c{module}\n{name}\n(V{argument}\ntR.".encode()

    def tower(levels: int, width: int) -> bytes:
        code = b"\x80\x03)q\x00"
        for level in range(levels):
            code += b"(" + b"h%c" % level * width + b"tq%c0" % (level + 1)
        return code + b"}h%cK\x01s." % levels

    touch = f"touch {canary}"
    return {
        "a call of os.system": call("os", "system", touch),
        "a call of posix.system": call("posix", "system", touch),
        "a call of eval": call("builtins", "eval", f"open({str(canary)!r}, 'w')"),
        "a call of numpy's own eval": call("numpy.testing", "runstring", "1"),
        "references that multiply": tower(60, 2),
        "wide references that multiply": tower(12, 250),
        "tuples of 200,000 levels": b"\x80\x03}K\x01" + b"\x85" * 200_000 + b"K\x01s.",
        "lists of 20,000 levels": b"\x80\x03" + b"]" * 20_000 + b"a" * 19_999 + b".",
        "an integer of 10,000 digits": b"\x80\x03}I" + b"9" * 10_000 + b"\nK\x01s.",
        "a memo of 2^31 slots": b"\x80\x03}r\xff\xff\xff\x7f.",
        "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a.",
        "a list that holds itself": b"\x80\x03]q\x00h\x00a.",
    }


def cam_inputs(rng: random.Random, canary: Path) -> Iterator[Input]:
    for name, data in cam_files().items():
        for how, content in damaged(data, rng, 12, 45):
            yield Input("cams", how, name, content)
    for how, content in hostile_pickles(canary).items():
        yield Input("cams", how, "a.npy", npy(content))
        yield Input("labels", how, "cls_labels.npy", npy(content))
        yield Input("proposals", how, "a.npy", npy(content))
        yield Input("cams", f"{how}, bare", "a.npy", content)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("keys.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(1100):
            member.write(bytes(2**20))
    header = io.BytesIO()
    claim = {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**9)}
    np.lib.format.write_array_header_1_0(header, claim)
    headers = (
        b'{"a":{"dtype":"F32","shape":[99999999,99999999],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}',
        b"{" * 5000,
    )
    for kind in ("cams", "proposals"):
        yield Input(kind, "a zip that unpacks to 1.1 GB", "a.npz", buffer.getvalue())
        yield Input(kind, "an array of 10^18 numbers", "a.npy", header.getvalue() + bytes(99))
    for text in headers:
        data = struct.pack("<Q", len(text)) + text + bytes(4)
        yield Input("cams", "a header of safetensors", "a.safetensors", data)
        yield Input("readouts", "a header of safetensors", "a.safetensors", data)
    yield Input("cams", "a header of 2^63", "a.safetensors", struct.pack("<Q", 2**63) + b"{}")


JSON_VALUES = (
    *("NaN", "Infinity", "-Infinity", "1e999", "9" * 30, "9" * 5000, "-1", "1.5", "true", "null"),
    *("[]", "{}", '""', '"\\ud800"', '"../../victim"', "[" * 60 + "]" * 60, "[" * 50_000),
    *('{"a":' * 90 + "1" + "}" * 90, "[[[1]]]", '"' + "a" * 10_000 + '"', '"\\u0000"'),
)


def json_inputs(kind: str, name: str, text: str, rng: random.Random) -> Iterator[Input]:
    """Yield a JSON file with each value replaced by odd ones, and damaged."""
    tokens = [at for at, letter in enumerate(text) if letter in '[{"0123456789']
    for value in JSON_VALUES:
        yield Input(kind, "another value", name, value.encode())
        for at in rng.sample(tokens, 4):
            end = at + 1
            while end < len(text) and text[end] not in ',]}:"':
                end += 1
            yield Input(kind, "another value", name, (text[:at] + value + text[end:]).encode())
    for how, content in damaged(text.encode(), rng, 15, 30):
        yield Input(kind, how, name, content)


def label_inputs(rng: random.Random) -> Iterator[Input]:
    table = {"classes": ["cat", "dog"], "labels": {"a": ["cat"], "b": ["dog", "cat"]}}
    yield from json_inputs("labels", "a.json", json.dumps(table), rng)
    yield from json_inputs("labels", "a.json", json.dumps({"a": [0, 1], "b": []}), rng)
    vectors = io.BytesIO()
    content = {"a": np.array([1.0, 0.0]), "b": np.array([0.0, 1.0])}
    np.save(vectors, np.array(content, object), allow_pickle=True)
    for how, data in damaged(vectors.getvalue(), rng, 15, 45):
        yield Input("labels", how, "cls_labels.npy", data)
    csv = b'image,labels\na.jpg,cat;dog\nb.jpg,"dog"\n'
    for how, data in damaged(csv, rng, 10, 40):
        yield Input("labels", how, "a.csv", data)


def proposal_inputs(rng: random.Random) -> Iterator[Input]:
    masks = [{"segmentation": {"size": [6, 9], "counts": [3, 5, 46]}, "predicted_iou": 0.9}]
    yield from json_inputs("proposals", "a.json", json.dumps(masks), rng)
    packed = [{"size": [6, 9], "counts": "f1"}, {"size": [6, 9], "counts": [54]}]
    yield from json_inputs("proposals", "a.json", json.dumps(packed), rng)
    huge = ([2**31, 2**31], [2**62, 2**62], [-1, 5], [0, 0], [10**5, 10**5], [6, 9, 1], [6.5, 9])
    for size in huge:
        for counts in ([54], "f1", [2**62], [], [10**10, -(10**10) + 54]):
            text = json.dumps([{"size": size, "counts": counts}])
            yield Input("proposals", "an odd size", "a.json", text.encode())
    for name, pack in (("a.npy", np.save), ("a.npz", np.savez_compressed)):
        buffer = io.BytesIO()
        pack(buffer, np.eye(6, 9, dtype=np.int32))
        for how, data in damaged(buffer.getvalue(), rng, 12, 40):
            yield Input("proposals", how, name, data)


def readout_inputs(rng: random.Random) -> Iterator[Input]:
    import torch
    from safetensors.torch import load, save

    from camkit.readout import _FILE

    parts = {"count": (), "total": (4,), "product": (4, 4)}
    tensors = {
        f"patches.{p}": torch.zeros(3, *shape, dtype=torch.float64) for p, shape in parts.items()
    }
    tensors |= {
        f"images.{p}": torch.zeros(1, *shape, dtype=torch.float64) for p, shape in parts.items()
    }
    tensors["images.labelled"] = torch.zeros(2, 4, dtype=torch.float64)
    tensors["images.photos"] = torch.zeros(2, dtype=torch.float64)
    origin = {"model": "m", "weights": "w", "method": "x"}
    facts = {
        "classes": ["cat", "dog"],
        "photos": 3,
        "origin": origin,
        "form": "auto",
        "made_with": "0",
    }
    text = json.dumps(facts)
    data = save(tensors, {_FILE: text})
    load(data)
    for how, content in damaged(data, rng, 15, 60):
        yield Input("readouts", how, "a.safetensors", content)
    for each in json_inputs("readouts", "a.safetensors", text, rng):
        with suppress(UnicodeDecodeError):
            content = save(tensors, {_FILE: each.content.decode()})
            yield Input("readouts", each.how, each.name, content)


def journal_inputs(rng: random.Random) -> Iterator[Input]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal.sqlite")
        with closing(sqlite3.connect(path)) as file, file:
            file.execute("CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            for table in ("images", "fitted_images"):
                file.execute(
                    f"CREATE TABLE {table} (key TEXT PRIMARY KEY, row TEXT, stage TEXT, "
                    "reason TEXT) WITHOUT ROWID"
                )
            file.execute("INSERT INTO settings VALUES ('model', 'm')")
            row = json.dumps({"key": "a", "mask": "masks/a.png"})
            file.execute("INSERT INTO images VALUES ('a', ?, NULL, NULL)", (row,))
        whole = path.read_bytes()
        for how, content in damaged(whole, rng, 15, 60):
            yield Input("journals", how, "journal.sqlite", content)
        rows = (
            *JSON_VALUES,
            '{"mask": "../victim"}',
            '{"mask": 5}',
            '{"mask": ""}',
            '{"cam": "/"}',
        )
        for value in rows:
            with closing(sqlite3.connect(path)) as file, file:
                file.execute("UPDATE images SET row = ?", (value,))
            yield Input("journals", "another row", "journal.sqlite", path.read_bytes())


def manifest_inputs(rng: random.Random) -> Iterator[Input]:
    row = {"key": "a", "source": "a.jpg", "size": [4, 4], "mask": "masks/a.png"}
    row |= {"legend": {"1": "cat"}, "classes": [{"index": 0, "name": "cat"}]}
    yield from json_inputs("manifests", "manifest.jsonl", json.dumps(row), rng)


def inputs(seed: int, canary: Path) -> list[Input]:
    """Make all inputs."""
    rng = random.Random(seed)
    return [
        *image_inputs(rng),
        *mask_inputs(rng),
        *cam_inputs(rng, canary),
        *label_inputs(rng),
        *proposal_inputs(rng),
        *readout_inputs(rng),
        *journal_inputs(rng),
        *manifest_inputs(rng),
    ]


# How it is read


def _read_image(path: Path) -> None:
    from camkit.bulk.items import FilePlace, Item
    from camkit.bulk.recipe import Loading
    from camkit.bulk.stages import read
    from camkit.photo import load_photo

    load_photo(path, size=32)
    read(Item("a", FilePlace(path)), Loading(size=32, channels=4, mean=0.5, std=0.5))


def _read_mask(path: Path) -> None:
    from camkit.data.sample import read_mask

    read_mask(path, size=(40, 60), num_classes=20)


def _read_cam(path: Path) -> None:
    from camkit.data.camfiles import read_cam

    read_cam(path)


def _read_labels(path: Path) -> None:
    from camkit.data import read_labels

    read_labels(path)


def _read_proposals(path: Path) -> None:
    from camkit.data.proposals import read_proposals

    read_proposals(path)


def _read_readout(path: Path) -> None:
    from camkit.readout import Readout

    Readout.load(path)


def _open_journal(path: Path) -> None:
    from camkit.bulk.running import Journal
    from camkit.bulk.stages import OutFolder

    with Journal(OutFolder(path.parent)) as journal:
        journal.known(["a"])
        journal.export()
        journal.claim({"model": "other"}, overwrite=True)


def _export(path: Path) -> None:
    from camkit.data import ExportOptions, export

    folder = path.parent / "masks"
    folder.mkdir()
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(folder / "a.png")
    with tempfile.TemporaryDirectory() as out:
        export(path.parent, "coco", Path(out, "new"), options=ExportOptions(photos="none"))


READERS: dict[str, Callable[[Path], None]] = {
    "images": _read_image,
    "masks": _read_mask,
    "cams": _read_cam,
    "labels": _read_labels,
    "proposals": _read_proposals,
    "readouts": _read_readout,
    "journals": _open_journal,
    "manifests": _export,
}


def _too_long(_: int, __: FrameType | None) -> NoReturn:
    raise TimeoutError


def judged(text: str, path: Path) -> str:
    """Return what is wrong with an error of camkit, or "refused"."""
    if "\n" in text or len(text) > LONGEST:
        return f"an error of several lines or {len(text)} characters: {text[:100]!r}"
    return "refused" if str(path.parent) in text else f"an error without the file: {text[:100]!r}"


def attempt(kind: str, path: Path) -> str:
    """Read a file; return "read", "refused", or what is wrong."""
    from camkit.errors import CamkitError

    try:
        READERS[kind](path)
    except CamkitError as error:
        return judged(str(error), path)
    except TimeoutError:
        return f"more than {SECONDS} s"
    except MemoryError:
        return "more memory than allowed"
    except Exception as error:  # noqa: BLE001 - to find the others is what this is for
        return f"{type(error).__name__}: {str(error)[:100]!r}"
    return "read"


def work(batch: Path) -> None:
    """Read the files of a batch, and print the outcome of each as it comes."""
    import camkit.data  # noqa: F401

    warnings.simplefilter("ignore")
    used = (
        int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        * resource.getpagesize()
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, _too_long)
    for line in batch.read_text("utf-8").splitlines():
        kind, path = line.split("\t")
        print("?", flush=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        outcome = attempt(kind, Path(path))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(outcome.encode("unicode_escape").decode(), flush=True)


def outcomes(files: list[tuple[str, Path]], scratch: Path) -> list[str]:
    """Read files in processes of their own, one after another; the next goes on where one died."""
    done: list[str] = []
    while len(done) < len(files):
        left = files[len(done) :]
        batch = scratch / "batch.txt"
        batch.write_text("".join(f"{kind}\t{path}\n" for kind, path in left), "utf-8")
        command = [sys.executable, __file__, "--batch", str(batch)]
        try:
            seconds = len(left) + 120
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False
            )
            printed, how = ended.stdout, f"the process died ({ended.returncode})"
        except subprocess.TimeoutExpired as error:
            printed, how = (error.stdout or b"").decode(), "the process hung"
        lines = printed.splitlines()
        if not lines:
            raise SystemExit(f"no input could be tried: {how}\n{ended.stderr[-2000:]}")
        answers = [line for line in lines if line != "?"]
        done += answers
        if len(answers) < len(left):
            done.append(how)
    return done


def tried(chosen: list[Input], folder: Path, canary: Path) -> list[str]:
    """Write the inputs, each into a folder of its own, and read them."""
    victim = folder / "victim"
    files = []
    for number, each in enumerate(chosen):
        place = folder / f"{number:05d}"
        place.mkdir()
        (place / each.name).write_bytes(each.content)
        files.append((each.kind, place / each.name))
    victim.write_text("must stay")
    before = {path.name for path in folder.iterdir()}
    results = outcomes(files, folder.parent)
    after = {path.name for path in folder.iterdir()}
    if canary.exists():
        results.append("FAULT code ran")
    if before != after:
        results.append(f"FAULT files outside changed: {sorted(before ^ after)[:5]}")
    return results


# What is published


def report(chosen: list[Input], results: list[str], seconds: float, seed: int) -> str:
    """Return the table, and the faults."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    faults = results[len(chosen) :]
    for each, result in zip(chosen, results, strict=False):
        fault = result not in (("read",) if each.how == INTACT else ("read", "refused"))
        counts[each.kind]["fault" if fault else result] += 1
        if fault:
            faults.append(f"{each.kind}, {each.name}, {each.how}: {result}")
    lines = [
        "# Hostile and damaged files",
        "",
        f"{len(chosen)} files from seed {seed}, read in {seconds:.0f} s by processes with "
        f"{MEMORY >> 30} GB and {SECONDS} s for each file. `benchmarks/hostile.py` says what a "
        "fault is.",
        "",
        "| files | tried | read | refused in one line | faults |",
        "|---|---|---|---|---|",
    ]
    for kind, count in counts.items():
        cells = (kind, count.total(), count["read"], count["refused"], count["fault"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    total = [sum(count[name] for count in counts.values()) for name in ("read", "refused", "fault")]
    lines.append("| all | " + " | ".join(map(str, (len(chosen), *total))) + " |")
    lines += ["", *[f"- {fault}" for fault in faults[:60]]] if faults else []
    ways = sorted({each.how for each in chosen})
    return "\n".join([*lines, "", f"Ways to make them: {'; '.join(ways)}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--batch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    if options.batch is not None:
        work(options.batch)
        return
    start = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        canary, folder = scratch / "canary", scratch / "files"
        folder.mkdir()
        everything = inputs(options.seed, canary)
        chosen = [each for each in everything if options.only in (None, each.kind)]
        results = tried(chosen, folder, canary)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    text = report(chosen, results, time.monotonic() - start, options.seed)
    if options.print or options.only is not None:
        print(text)
        return
    RESULTS.write_text(text, "utf-8")
    print(f"{RESULTS}: {len(chosen)} files")


if __name__ == "__main__":
    main()
