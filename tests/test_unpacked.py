"""The cache of unpacked data sets: what is removed from it, and who may have written to it."""

import os
import time
from pathlib import Path

import pytest

from camkit.data.unpacked import prune, unpacked
from camkit.errors import DataError

DAY = 24 * 3600


def kept(root: Path, ages: dict[str, int], **settings) -> set[str]:
    """Make folders of 1000 bytes that were last opened so many days ago, and prune them."""
    for name, days in ages.items():
        (root / name).mkdir()
        (root / name / "a").write_bytes(bytes(1000))
        then = time.time() - days * DAY
        os.utime(root / name, (then, then))
    prune(root, **settings)
    return {path.name for path in root.iterdir()}


A, B, C, D = (letter * 32 for letter in "abcd")


def test_what_was_not_opened_for_90_days_is_removed(tmp_path):
    ages = {A: 91, B: 89, ".draft-1": 8, ".draft-2": 6, "mine": 400}
    assert kept(tmp_path, ages) == {B, ".draft-2", "mine"}


def test_the_oldest_are_removed_until_the_rest_fits(tmp_path):
    assert kept(tmp_path, {A: 30, B: 20, C: 10, D: 1}, most=2500) == {C, D}


def test_what_was_opened_this_week_stays(tmp_path):
    assert kept(tmp_path, {A: 6, B: 1}, most=0) == {A, B}


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CAMKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.zip"
    path.write_bytes(b"content")
    return path


def test_opening_a_folder_again_makes_it_young(archive):
    place = unpacked([archive], lambda _: None, "1")
    os.utime(place, (0, 0))
    assert unpacked([archive], lambda _: None, "1") == place
    assert time.time() - place.stat().st_mtime < 3600


@pytest.mark.parametrize("above", [False, True])
def test_a_folder_that_others_may_write_to_is_refused(archive, above):
    place = unpacked([archive], lambda _: None, "1")
    (place.parent if above else place).chmod(0o777)
    with pytest.raises(DataError, match="is not used: others may write to it; run `chmod go-w "):
        unpacked([archive], lambda _: None, "1")


def test_a_folder_of_another_user_is_refused(archive):
    if os.getuid():
        pytest.skip("only root can give files away")
    place = unpacked([archive], lambda _: None, "1")
    os.chown(place, 65534, 65534)
    with pytest.raises(DataError, match="belongs to another user; name a folder of your own"):
        unpacked([archive], lambda _: None, "1")
