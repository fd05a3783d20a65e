"""Check that a tag may be released: the version, the changelog and the citation agree with it.

python3 .ci/check_release.py v1.2.3            # exits with 1 and says what is wrong
python3 .ci/check_release.py v1.2.3 --notes    # prints the section of the changelog as well
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def section(changelog: str, version: str) -> tuple[str, str] | None:
    """Return the date and the text of a version's section, ``## 1.2.3 - 2026-01-31``."""
    heading = rf"^## {re.escape(version)} - (\d{{4}}-\d\d-\d\d)\n(.*?)(?=^## |\Z)"
    found = re.search(heading, changelog, re.MULTILINE | re.DOTALL)
    return (found[1], found[2].strip()) if found else None


def faults(root: Path, tag: str) -> list[str]:
    """List what keeps a tag from being released."""
    version = tag.removeprefix("v")
    init, citation, changelog = (
        (root / name).read_text("utf-8")
        for name in ("camkit/__init__.py", "CITATION.cff", "docs/changelog.md")
    )
    code = re.search(r'^__version__ = "(.+)"$', init, re.M)
    cited = dict(re.findall(r"^([\w-]+): (\S+)$", citation, re.M))
    changed = section(changelog, version)
    waiting = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", changelog, re.M | re.DOTALL)
    found = []
    if waiting and waiting[1].strip():
        found.append(f"docs/changelog.md has lines under Unreleased; move them under {version}")
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        found.append(f"the tag must be vX.Y.Z, got {tag}")
    if code is None or code[1] != version:
        found.append(f"camkit/__init__.py has version {code and code[1]}, the tag {version}")
    if cited.get("version") != version:
        found.append(f"CITATION.cff has version {cited.get('version')}, the tag {version}")
    if changed is None:
        found.append(f"docs/changelog.md has no heading `## {version} - YYYY-MM-DD`")
    elif cited.get("date-released") != changed[0]:
        released = cited.get("date-released")
        found.append(f"CITATION.cff has date-released {released}, the changelog {changed[0]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Check that a tag may be released.")
    parser.add_argument("tag")
    parser.add_argument("--notes", action="store_true", help="print its section of the changelog")
    options = parser.parse_args()
    wrong = faults(ROOT, options.tag)
    if wrong:
        sys.exit("\n".join(wrong))
    if options.notes:
        changelog = (ROOT / "docs/changelog.md").read_text("utf-8")
        changed = section(changelog, options.tag.removeprefix("v"))
        print(changed[1] if changed else "")


if __name__ == "__main__":
    main()
