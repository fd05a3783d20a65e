"""Folders of results: an interrupted run goes on in them, and one of other settings is kept out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from camkit.atomic import unfinished
from camkit.bulk.jobs import Failure
from camkit.errors import DataError

SETTINGS = "settings.json"
ERRORS = "errors.tsv"


def claim_folder(
    folder: Path,
    settings: Mapping[str, str],
    names: Iterable[str],
    *,
    suffix: str,
    overwrite: bool = False,
) -> set[str]:
    """Make a folder ready for results, and find those that an earlier run left there.

    The settings are kept in ``settings.json``; a folder with results of other settings is refused,
    so that no folder ever holds results of two kinds.

    Args:
        folder: made if it is not there.
        settings: all that decides what the results look like.
        names: of the results that are wanted, without their ending.
        suffix: ending of a result file.
        overwrite: remove what is there of these results, and begin anew.

    Returns:
        The wanted names whose result is there already.

    Raises:
        DataError: the folder holds results of other settings, or of unknown ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.stem for path in folder.iterdir() if _is_result(path, suffix)}
    wanted = there & set(names)
    staying = there - wanted if overwrite else there
    if staying:
        way_out = (
            "they are of none of these images, so remove them or take another folder"
            if overwrite
            else "take another folder for these, or begin anew with overwrite (--overwrite)"
        )
        _check_settings(folder, settings, f"{len(staying)} {suffix} files", way_out)
    if overwrite:
        for name in wanted:
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
        wanted = set()
    with unfinished(folder / SETTINGS) as draft:
        draft.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
    return wanted


def write_errors(folder: Path, failures: Sequence[Failure]) -> None:
    """Write what failed as ``errors.tsv``, name and reason; without failures there is no file."""
    path = folder / ERRORS
    if not failures:
        path.unlink(missing_ok=True)
        return
    with unfinished(path) as draft:
        lines = [f"{one.name}\t{' '.join(one.reason.split())}\n" for one in failures]
        draft.write_text("name\treason\n" + "".join(sorted(lines)), encoding="utf-8")


def _is_result(path: Path, suffix: str) -> bool:
    return path.suffix == suffix and not path.name.startswith(".")


def _check_settings(folder: Path, settings: Mapping[str, str], held: str, way_out: str) -> None:
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds {held} but no {SETTINGS}, so how they were made is unknown; {way_out}"
        ) from error
    except ValueError as error:  # no JSON, or no text
        raise DataError(f"{path} cannot be read ({error}); {way_out}") from error
    if found != settings:
        known = found if isinstance(found, dict) else {}
        differ = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
        told = "; ".join(
            f"{one}: {known.get(one)} there, {settings.get(one)} now" for one in differ
        )
        raise DataError(f"{folder} holds {held} of other settings ({told}); {way_out}")
