"""Label files of other tools are read as meant, or refused with file and line."""

import codecs
import sys
import unicodedata

import pytest
from pages import ROOT

from camkit.data import read_labels
from camkit.data.names import NameIndex, read_class_names, read_image_names, split_line
from camkit.data.tables import read_table
from camkit.errors import DataError

sys.path.append(str(ROOT / "benchmarks"))
import odd_labels

CASES = odd_labels.cases()


@pytest.mark.parametrize("kind", sorted({case.kind for case in CASES}))
def test_label_files_are_read_as_meant_or_refused_with_their_line(tmp_path, kind):
    faults = {
        f"{number} {case.name}": fault
        for number, case in enumerate(CASES)
        if case.kind == kind and (fault := odd_labels.outcome(case, tmp_path)) is not None
    }
    assert faults == {}


def test_the_published_table_counts_the_files_of_today():
    pytest.importorskip("pandas", reason="some of the files are written by pandas")
    table = (ROOT / "benchmarks" / "results" / "odd_labels.md").read_text("utf-8")
    assert f"| all | {len(CASES)} | {len(CASES)} |" in table


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")
    return path


def test_names_in_a_file_count_the_classes_given(tmp_path):
    path = write(tmp_path / "a.json", '{"x": ["dog"], "y": ["cat", "dog"]}')
    assert read_labels(path).classes == ("cat", "dog")  # sorted, as the file lists none
    labels = read_labels(path, classes=("bird", "dog", "cat"))
    assert (labels.of("x"), labels.of("y")) == ((1,), (1, 2))
    labels = read_labels(path, default=("dog", "cat", "sheep"))
    assert (labels.classes, labels.of("x")) == (("dog", "cat", "sheep"), (0,))
    assert read_labels(path, default=("dog", "sheep")).classes == ("cat", "dog")


def test_indices_in_a_file_with_its_own_classes_follow_their_names(tmp_path):
    path = write(tmp_path / "a.json", '{"classes": ["dog", "cat"], "labels": {"x": [0]}}')
    assert read_labels(path, classes=("cat", "dog")).of("x") == (1,)


def test_numbers_without_names_stay_numbers(tmp_path):
    labels = read_labels(write(tmp_path / "a.csv", "image,label\nx,3\ny,0\n"))
    assert (labels.classes, labels.of("x"), labels.of("y")) == (None, (3,), (0,))


def test_a_zero_and_a_one_for_two_classes_are_not_guessed(tmp_path):
    for text in (
        '{"x": [1, 0], "y": [0, 1]}',
        "x,1,0\ny,0,1\n",
        'image,labels\nx,"1,0"\ny,"0,1"\n',
    ):
        path = write(tmp_path / "a", text)
        with pytest.raises(DataError, match="may be class indices, or a 0 or 1 for each of two"):
            read_labels(path, classes=("cat", "dog"))
        assert read_labels(path, classes=("a", "b", "c")).of("x") == (
            0,
            1,
        )  # three classes: indices


def test_a_class_that_is_a_number_is_a_name_where_classes_are_given(tmp_path):
    path = write(tmp_path / "a.csv", "image,label\nx,3\n")
    assert read_labels(path, classes=("1", "3", "5")).of("x") == (1,)


def test_a_class_name_with_a_comma_is_kept_where_classes_are_given(tmp_path):
    path = write(tmp_path / "a.csv", 'image,label\nx,"tench, Tinca tinca"\n')
    assert read_labels(path, classes=("goldfish", "tench, Tinca tinca")).of("x") == (1,)


def test_classes_sort_as_a_person_counts(tmp_path):
    path = write(tmp_path / "a.csv", "image,label\nx,class 10\ny,class 9\n")
    assert read_labels(path).classes == ("class 9", "class 10")


def test_coco_labels_follow_the_categories_of_the_file(tmp_path):
    images = '"images": [{"id": 5, "file_name": "a.jpg"}, {"id": 0, "file_name": "b.jpg"}]'
    marks = '{"image_id": 5, "category_id": 0}, {"image_id": 5, "category_id": 9, "iscrowd": 1}'
    names = '"categories": [{"id": 9, "name": "pear"}, {"id": 0, "name": "apple"}]'
    path = write(tmp_path / "a.json", f'{{{images}, "annotations": [{marks}], {names}}}')
    labels = read_labels(path)
    assert (labels.classes, labels.of("a"), labels.of("b")) == (("apple", "pear"), (0,), ())


def test_the_folders_of_an_image_decide_between_equal_names():
    index = NameIndex(["train/cats/1.jpg", "train/dogs/1.jpg", "bird.png", 2007000032])
    assert index.find("cats/1") == ["train/cats/1.jpg"]
    assert index.find("x/train/dogs/1.png") == ["train/dogs/1.jpg"]
    assert index.find("1") == ["train/cats/1.jpg", "train/dogs/1.jpg"]
    assert index.find("any/folder/bird") == ["bird.png"]
    assert index.find("2007_000032") == [2007000032]
    assert index.find("birds/1") == []


def test_entries_that_fit_an_image_equally_must_agree(tmp_path):
    path = write(tmp_path / "a.json", '{"u/x": [0], "v/x": [1], "u/y": [2], "v/y": [2]}')
    labels = read_labels(path)
    assert labels.of("y") == (2,)
    with pytest.raises(DataError, match=r"2 entries that fit x \(u/x, v/x\), with other labels"):
        labels.of("x")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_equal_in_every_unicode_form(tmp_path, form):
    path = write(tmp_path / "a.csv", unicodedata.normalize(form, "image,label\nköln.jpg,café\n"))
    other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", "köln")
    assert read_labels(path).of(other) == (0,)
    assert read_labels(path, classes=(unicodedata.normalize("NFD", "café"),)).of("köln") == (0,)


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "gb18030", "shift_jis"])
def test_an_old_encoding_is_refused_with_the_line(tmp_path, encoding):
    word = {"cp1252": "Kätzchen", "cp1251": "кошка", "gb18030": "小狗", "shift_jis": "子犬"}[
        encoding
    ]
    path = tmp_path / "a.csv"
    path.write_bytes(f"image;labels\na.jpg;cat\nb.jpg;{word}\n".encode(encoding))
    with pytest.raises(DataError, match=r"a\.csv, line 3 cannot be read .* save it as UTF-8"):
        read_labels(path)


def test_a_table_says_what_it_was_taken_for(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(codecs.BOM_UTF16_LE + "id\tcat\tdog\nx\t1\t0\n".encode("utf-16-le"))
    form = "UTF-16 table, tabs between cells, header id, cat, dog; "
    assert read_labels(path).form == form + "a column of 0 and 1 for each of 2 classes"


def test_quoted_cells_hold_separators_quotes_and_line_ends(tmp_path):
    text = 'image,label,note\n"a,1.jpg",cat,"says ""no"""\nb.jpg,dog,"two\nlines"\nc.jpg,cat,\n'
    table = read_table(write(tmp_path / "a.csv", text))
    assert [row.cells for row in table.rows] == [
        ("a,1.jpg", "cat", 'says "no"'),
        ("b.jpg", "dog", "two\nlines"),
        ("c.jpg", "cat", ""),
    ]
    assert [row.line for row in table.rows] == [2, 4, 5]  # the last line of a row


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("2007_000032", ("2007_000032", None)),
        ("/JPEGImages/a.jpg /SegmentationClassAug/a.png", ("/JPEGImages/a.jpg", None)),
        ("my cat.jpg 3 1", ("my cat.jpg", (1, 3))),
        ("my cat", ("my cat", None)),
        ("a.jpg,4", ("a.jpg", (4,))),
        ("a.jpg ²", ("a.jpg ²", None)),  # a digit to str.isdigit, but not to int
        ("COCO_val2014_000000000042 60", ("COCO_val2014_000000000042", (60,))),
    ],
)
def test_lines_of_image_lists(line, expected):
    assert split_line(line) == expected


def test_a_list_of_presence_is_not_taken_for_class_indices():
    with pytest.raises(DataError, match=r"followed by -1, as in the lists of ImageSets/Main"):
        split_line("2007_000032 -1")


def test_image_lists_of_every_kind_name_the_same_images(tmp_path):
    lists = [
        "a\nb c\n",
        "a.jpg\nb c.jpg\n",
        "JPEGImages/a.jpg SegmentationClass/a.png\nJPEGImages/b c.jpg SegmentationClass/b.png\n",
        "a  1\nb c -1\n",
        "a.jpg 3 5\nb c.jpg 0\n",
        "C:\\x\\a.jpg\r\nC:\\x\\b c.jpg\r\n",
    ]
    for text in lists:
        assert list(read_image_names(write(tmp_path / "l.txt", text))) == ["a", "b c"]
    path = write(tmp_path / "l.txt", "x/a.jpg\ny/a.jpg\n")
    assert list(read_image_names(path, folders=True)) == ["x/a", "y/a"]
    with pytest.raises(DataError, match=r"line 2: 'a' is already on line 1"):
        read_image_names(path)


@pytest.mark.parametrize(
    "text",
    [
        "cat\nhot dog\n",
        '["cat", "hot dog"]',
        '{"0": "cat", "1": "hot dog"}',
        '{"hot dog": 1, "cat": 0}',
        '{"id2label": {"1": "hot dog", "0": "cat"}, "model_type": "vit"}',
    ],
)
def test_files_of_class_names(tmp_path, text):
    assert read_class_names(write(tmp_path / "names", text)) == ("cat", "hot dog")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"0": "cat", "2": "dog"}', "without gaps"),
        ('["cat", "cat"]', "none twice"),
        ("cat\ncat\n", "line 2: 'cat' is already on line 1"),
        ('{"model": "vit"}', "lists no classes"),
    ],
)
def test_wrong_files_of_class_names(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        read_class_names(write(tmp_path / "names", text))
