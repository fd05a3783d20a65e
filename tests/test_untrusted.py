"""What other programs wrote cannot stop a reader; JSON's answers come from RFC 8259 and by hand."""

import json
import os

import pytest
from hypothesis import given, strategies as st

from camkit.errors import DataError, one_line
from camkit.untrusted import bounded, read_bytes, read_json

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.floats(-9, 9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_json_is_read_in_every_encoding(document, encoding):
    text = json.dumps(document)
    assert read_json(text, "a.json") == document
    assert read_json(text.encode(encoding), "a.json") == document


@given(st.binary(max_size=60) | st.text('[]{}",:0123456789.eE-+ntrufalsINy \\', max_size=60))
def test_bytes_are_a_document_or_a_data_error(content):
    try:
        json.dumps(read_json(content, "a.json"), allow_nan=True)
    except DataError as error:
        assert str(error).startswith("a.json ")  # noqa: PT017 - other errors would be the fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 65 + "]" * 65, "nests more than 64"),
        ('{"a":' * 200 + "1" + "}" * 200, "nests more than 64"),
        ("[NaN]", "it holds NaN, which JSON does not have"),
        ("[-Infinity]", "it holds -Infinity"),
        ("[9223372036854775808]", "an integer of 19 digits"),
        ("[-9223372036854775809]", "an integer of 20 digits"),
        ("[" + "9" * 5000 + "]", "an integer of 5000 digits"),
        ('{"a": 1', "is not JSON .* correct it or remove it"),
        (b"\xff\xff[]", "is not JSON .*decode"),
    ],
)
def test_json_that_no_label_file_needs_is_refused(text, words):
    with pytest.raises(DataError, match=f"^labels.json .*{words}"):
        read_json(text, "labels.json")


def test_json_at_the_limits_is_read():
    deepest = "[" * 64 + "]" * 64
    assert json.dumps(read_json(deepest, "a")) == deepest
    assert read_json("[9223372036854775807, -9223372036854775808]", "a") == [2**63 - 1, -(2**63)]
    assert read_json('["12345678901234567890123", 1.2345678901234567890123]', "a") == [
        "12345678901234567890123",
        1.2345678901234567,
    ]


def test_a_file_names_itself_and_a_file_that_was_perhaps_meant(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text("[1, 2]")
    assert read_json(path) == [1, 2]
    with pytest.raises(DataError, match=r"label\.json cannot be read \(No such file.*labels\.json"):
        read_json(tmp_path / "label.json")
    path.write_text("[1, 2")
    with pytest.raises(DataError, match=r"labels\.json is not JSON .*line 1 column 6"):
        read_json(path)


def test_only_regular_files_of_the_expected_size_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, most=5) == b"12345"
    with pytest.raises(DataError, match="file has 5 bytes, expected at most 4"):
        read_bytes(path, most=4)
    with pytest.raises(DataError, match="is a folder; name a file"):
        read_bytes(tmp_path, most=5)
    os.mkfifo(tmp_path / "pipe")  # opening one without a writer would wait for ever
    with pytest.raises(DataError, match="pipe is no regular file; name a file"):
        read_bytes(tmp_path / "pipe", most=5)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: bytearray(2**62), "claims more memory than there is"),
        (lambda: int(float("1e999")), "a number is out of range"),
        (lambda: json.loads("[" * 100_000), "nested too deeply"),
    ],
)
def test_claims_of_a_file_become_a_data_error(work, words):
    with pytest.raises(DataError, match=f"^a.bin cannot be read: .*{words}"), bounded("a.bin"):
        work()


def test_other_errors_pass():
    with pytest.raises(KeyError), bounded("a.bin"):
        raise KeyError("a")


@given(st.text(max_size=2000), st.integers(20, 300))
def test_an_error_is_one_printable_line(text, most):
    line = one_line(text, most=most)
    assert len(line) <= most
    assert line.isprintable()


def test_a_long_error_keeps_its_start_and_its_end():
    line = one_line(ValueError("a.npy holds " + "7, " * 10_000_000 + "; write it again"))
    assert line.startswith("a.npy holds 7, 7, ")
    assert line.endswith("7, ; write it again")
    assert 490 < len(line) <= 500
