"""Does camkit work in other people's repositories, unchanged, at the commits that are checked out?

    python benchmarks/hosts.py --repos FOLDER [--only NAME ...]
    python benchmarks/hosts.py --tables    # writes the tables of the docs from results/hosts.json

FOLDER holds checked-out repositories under their own names (host_builders/__init__.py lists them);
absent ones are skipped. Each host runs in a process of its own, because repositories clash in the
names of their modules. The models are small, have random weights and are built from the
repositories' own classes; packages they import but do not need here are stubbed if they are not
installed. host_checks.py says what is checked.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from host_builders import HOSTS, Builder
from host_checks import CHECKS, FAILS, MISSING, NONE, PASS, REFUSED, check
from host_stubs import stay_on_cpu, stub
from host_tables import write_tables

from camkit.manifest import environment

RESULTS = Path(__file__).parent / "results"
TIMEOUT = 600.0  # seconds for one host


def run_host(name: str, repository: Path) -> dict[str, Any]:
    """Check one host in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--host", name]
        command += ["--repository", str(repository.resolve()), "--found", str(found)]
        start = time.monotonic()
        done = subprocess.run(
            command,
            cwd=folder,  # what a repository writes goes here
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        seconds = round(time.monotonic() - start, 1)
        if done.returncode or not found.is_file():
            lines = done.stderr.strip().splitlines() or ["no message"]
            result: dict[str, Any] = {"error": lines[-1].replace(str(repository.parent), "...")}
        else:
            result = json.loads(found.read_text())
    return {"host": name, "commit": commit_of(repository), **result, "seconds": seconds}


def check_host(builder: Builder, repository: Path) -> dict[str, Any]:
    """Check one host in this process."""
    stubbed = stub(builder.stubs)
    module = import_module(builder.module)
    here = Path(__file__).resolve().parent  # its names clash with those of repositories
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    sys.path[:] = [str(repository / builder.root), *others]
    checks = check(getattr(module, builder.function))
    return {"stubs": stubbed, "checks": {key: asdict(value) for key, value in checks.items()}}


def commit_of(repository: Path) -> str:
    """Return the commit that is checked out."""
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "no git checkout"


def described() -> dict[str, Any]:
    """Return the versions that matter here, and the machine."""
    found = environment()
    for name in ("timm", "numpy", "open_clip_torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"threads": 1}


def markdown(report: dict[str, Any]) -> str:
    """Write the table."""
    versions = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts(report).items())
    lines = [
        f"`{report['command']}`; {versions}.",
        "",
        f"Hosts: {len(report['hosts'])}. Checks: {counts}. A dash: does not apply.",
        "",
        f"| host | commit | {' | '.join(CHECKS)} |",
        "|---|---|" + "---|" * len(CHECKS),
    ]
    for row in report["hosts"]:
        cells = [row["host"], row["commit"][:7]]
        if "error" in row:
            cells += [f"**{FAILS}**: {row['error']}"] + [""] * (len(CHECKS) - 1)
        else:
            cells += [_shown(**row["checks"][name]) for name in CHECKS]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    if report["absent"]:
        lines += ["", f"Not checked out: {', '.join(report['absent'])}."]
    return "\n".join(lines) + "\n"


def verdicts(report: dict[str, Any]) -> dict[str, int]:
    """Count the verdicts of all checks; a host that did not run failed them all."""
    failed = [{"verdict": FAILS}] * len(CHECKS)
    found = [c for row in report["hosts"] for c in row.get("checks", {}).values() or failed]
    counts = Counter(check["verdict"] for check in found)
    return {word: counts[word] for word in (PASS, REFUSED, MISSING, FAILS, NONE) if counts[word]}


def _shown(verdict: str, value: str) -> str:
    return f"**{verdict}**: {value}" if verdict == FAILS else f"{verdict}: {value}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repos", type=Path, help="folder of checked-out repositories")
    parser.add_argument("--only", nargs="+", choices=sorted(HOSTS), help="check these hosts only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--tables", action="store_true", help="write the tables of the docs")
    parser.add_argument("--host", help=argparse.SUPPRESS)
    parser.add_argument("--repository", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tables:
        write_tables()
        return
    if options.host:
        torch.set_num_threads(1)
        stay_on_cpu()
        found = check_host(HOSTS[options.host], options.repository)
        options.found.write_text(json.dumps(found))
        return
    if options.repos is None or not options.repos.is_dir():
        parser.error("--repos must name a folder of checked-out repositories")
    chosen = options.only or list(HOSTS)
    present = [name for name in chosen if (options.repos / HOSTS[name].repository).is_dir()]
    absent = [name for name in chosen if name not in present]
    for name in absent:
        print(f"{name}: skipped, {HOSTS[name].repository} is not in the folder", file=sys.stderr)
    if not present:
        wanted = ", ".join(sorted({HOSTS[name].repository for name in chosen}))
        parser.error(f"--repos must hold at least one of the folders {wanted}")
    rows = []
    for name in present:
        row = run_host(name, options.repos / HOSTS[name].repository)
        rows.append(row)
        print(_line(row), flush=True)
    report = {
        "command": "python benchmarks/hosts.py --repos FOLDER",
        "environment": described(),
        "hosts": rows,
        "absent": absent,
    }
    report["verdicts"] = verdicts(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "hosts.json").write_text(json.dumps(report, indent=2) + "\n")
    text = markdown(report)
    (options.out / "hosts.md").write_text(text)
    print(text)


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['host']}: FAILS {row['error']}"
    told = "; ".join(f"{k} {c['verdict']} ({c['value']})" for k, c in row["checks"].items())
    return f"{row['host']}: {told} [{row['seconds']} s]"


if __name__ == "__main__":
    main()
