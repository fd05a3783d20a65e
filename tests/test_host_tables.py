"""The tables of research codebases in the docs are those of benchmarks/results/hosts.json."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import host_tables  # noqa: E402 - from the folder above
from host_builders import HOSTS  # noqa: E402


@pytest.mark.parametrize("name", host_tables.PAGES)
def test_the_docs_hold_the_table_of_the_committed_file(name):
    page = (ROOT / "docs" / name).read_text("utf-8")
    table = host_tables.PAGES[name](host_tables.found())
    assert page == host_tables.with_table(page, table)


def test_every_host_says_what_is_left_to_its_user():
    assert list(host_tables.BY_HAND) == list(HOSTS)


def test_a_page_without_the_comments_is_refused():
    with pytest.raises(ValueError, match="once each"):
        host_tables.with_table("no comments", "| a |")


def row(**checks):
    told = {"watch": ("pass", "6 blocks, outputs same bits"), "doctor": ("-", "")}
    told |= {"wrap": ("-", ""), "attach": ("pass", "moves outputs by 5.2e-01, removal exact")}
    told |= {"cam": ("-", "none"), "files": ("-", "none")} | checks
    verdicts = {key: dict(zip(("verdict", "value"), v, strict=True)) for key, v in told.items()}
    return {"host": "ToCo", "commit": "0123456789", "checks": verdicts}


@pytest.mark.parametrize(
    ("checks", "cells"),
    [
        ({}, "yes | acts | - | -"),
        (
            {
                "watch": ("pass", "6 blocks, maps 0.0e+00, maps of 4 passes over crops 1.0e-07"),
                "attach": ("pass", "moves, 42 of 42 attention calls of the step edited, loss 2.01"),
                "cam": ("pass", "CAM 0.0e+00; auxiliary CAM 2.1e-07"),
                "files": ("pass", "theirs read by camkit 0.0e+00, ours read by theirs, mIoU 0"),
            },
            "yes, 4 passes | 42 of 42 calls | within 2e-07 | both ways",
        ),
        (
            {
                "watch": ("refused for the true reason", "four maps"),
                "attach": ("FAILS", "RuntimeError"),
                "cam": ("pass", "CAM 0.0e+00"),
                "files": ("pass", "their msc_seg read by camkit 0.0e+00"),
            },
            "refused | **FAILS** | equal | read",
        ),
    ],
)
def test_a_host_is_a_row_of_words(checks, cells):
    table = host_tables.summary({"hosts": [row(**checks)]}).splitlines()
    assert table[2] == f"| ToCo | 0123456 | {cells} | nothing |"


def test_details_keep_reasons_and_hosts_that_did_not_run():
    refused = row(watch=("refused for the true reason", "a | b"))
    report = {
        "environment": {"torch": "2"},
        "hosts": [refused, {"host": "SeCo", "commit": "abcdefghij", "error": "ImportError: x"}],
    }
    lines = host_tables.details(report).splitlines()
    assert lines[0] == "torch 2."
    assert lines[4].startswith("| ToCo | 0123456 | refused for the true reason: a &#124; b | ")
    assert lines[5].startswith("| SeCo | abcdefg | **FAILS**: ImportError: x | ")
