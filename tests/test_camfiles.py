"""Class maps of other codebases: each written their way, ours read their way, no code run."""

import marshal
import math
import os
import pickle
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from safetensors.numpy import save_file

from camkit.data.camfiles import read_cam, write_cam
from camkit.errors import DataError

LOW = np.array([[0.0, 0.25, 0.5]], np.float32)  # one row of three pixels
HIGH = np.array([[1.0, 0.75, 0.5]], np.float32)
OBJECT_HEADER = {"descr": "|O", "fortran_order": False, "shape": ()}
# numpy.save({np.int64(3): np.array([[0.25, 1.0]], np.float32)}) as numpy 1.24.4 wrote it
NUMPY_1 = (
    b"\x80\x03cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02C\x01b"
    b"q\x03\x87q\x04Rq\x05(K\x01)cnumpy\ndtype\nq\x06X\x02\x00\x00\x00O8q\x07\x89\x88\x87q\x08Rq\t("
    b"K\x03X\x01\x00\x00\x00|q\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tq\x0bb\x89]q\x0c}q\rcnumpy."
    b"core.multiarray\nscalar\nq\x0eh\x06X\x02\x00\x00\x00i8q\x0f\x89\x88\x87q\x10Rq\x11(K\x03X\x01"
    b"\x00\x00\x00<q\x12NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x13bC\x08\x03\x00\x00\x00\x00"
    b"\x00\x00\x00q\x14\x86q\x15Rq\x16h\x00h\x01K\x00\x85q\x17h\x03\x87q\x18Rq\x19(K\x01K\x01K\x02"
    b"\x86q\x1ah\x06X\x02\x00\x00\x00f4q\x1b\x89\x88\x87q\x1cRq\x1d(K\x03h\x12NNNJ\xff\xff\xff\xffJ"
    b"\xff\xff\xff\xffK\x00tq\x1eb\x89C\x08\x00\x00\x80>\x00\x00\x80?q\x1ftq bsatq!b."
)
# The same dict {3: [[0.25, 1.0]]}, put together as Python 2 did: bytes are text, ints are plain.
PYTHON_2 = (
    b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01)"
    b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb\x89]"
    b"}K\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01"
    b"K\x02\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    b"K\x00tb\x89U\x08\x00\x00\x80>\x00\x00\x80?tbsatb."
)


def save(path, content):
    """What every codebase does: numpy.save of a dict."""
    np.save(path, content)
    return path


def load(path):
    """What every codebase does: numpy.load of a dict, which runs whatever the file says."""
    return np.load(path, allow_pickle=True).item()


def save_pickle(path, data):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, OBJECT_HEADER)
        file.write(data)
    return path


def rows(tensor):
    """The numbers of maps that have one row of pixels."""
    return tensor[..., 0, :].tolist()


@pytest.fixture
def npy(tmp_path):
    return tmp_path / "2007_000032.npy"


# Each form, written as its codebase writes it.


def test_psa_maps_are_of_the_classes_that_key_them(npy):
    found = read_cam(save(npy, {3: LOW, 14: HIGH}))
    assert (found.classes, found.form, found.background) == ((3, 14), "psa", None)
    assert rows(found.cam) == [[0.0, 0.25, 0.5], [1.0, 0.75, 0.5]]
    assert found.cam.dtype == torch.float32


def test_psa_maps_of_class_0_are_no_background_unless_all_sum_to_1(npy):
    found = read_cam(save(npy, {0: LOW, 14: LOW}))
    assert (found.classes, found.form) == ((0, 14), "psa")
    assert rows(found.cam) == [[0.0, 0.25, 0.5], [0.0, 0.25, 0.5]]


def test_psa_keys_may_be_numpy_scalars_and_maps_columns_first(npy):
    map_ = np.asfortranarray(np.array([[0.0, 0.25], [0.5, 1.0]]))
    found = read_cam(save(npy, {np.int64(7): map_}))
    assert found.classes == (7,)
    assert found.cam.tolist() == [[[0.0, 0.25], [0.5, 1.0]]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_probabilities_that_sum_to_1_have_the_background_at_key_0(npy, dtype):
    background = 1 - LOW - 0.1 * HIGH
    content = {0: background, 1: LOW, 15: 0.1 * HIGH}
    found = read_cam(save(npy, {key: value.astype(dtype) for key, value in content.items()}))
    assert (found.classes, found.form) == ((0, 14), "psa-crf")
    torch.testing.assert_close(found.background, torch.tensor(background), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.cam[0], torch.tensor(LOW), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.cam[1], torch.tensor(0.1 * HIGH), atol=1e-3, rtol=0)


def test_an_empty_dict_is_an_image_without_classes(npy):
    found = read_cam(save(npy, {}))
    assert (found.classes, found.form, found.cam.shape) == ((), "psa", (0, 0, 0))


def test_one_map_of_ones_at_key_0_needs_the_classes(npy):
    save(npy, {0: np.ones((1, 2), np.float32)})
    with pytest.raises(DataError, match=r"or class 0; pass `classes`, \(\) or \(0,\), to say"):
        read_cam(npy)
    nothing, aeroplane = read_cam(npy, classes=()), read_cam(npy, classes=(0,))
    assert (nothing.classes, nothing.form, rows(nothing.background)) == ((), "psa-crf", [1.0, 1.0])
    assert (aeroplane.classes, aeroplane.form, rows(aeroplane.cam)) == ((0,), "psa", [[1.0, 1.0]])


def test_irn_maps_are_read_with_torch_tensors_inside(npy):
    small = torch.rand(2, 4, 4)[:, 1::2, 1:3]  # a view into a larger storage
    maps = np.stack([LOW, HIGH])
    save(npy, {"keys": torch.tensor([3, 14]), "cam": small, "high_res": maps})
    found = read_cam(npy)
    assert (found.classes, found.form) == ((3, 14), "irn")
    assert rows(found.cam) == [[0.0, 0.25, 0.5], [1.0, 0.75, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_strided_tensors_keep_their_pixels(npy, dtype):
    whole = torch.arange(24, dtype=dtype).reshape(2, 3, 4)
    view = whole.transpose(1, 2)[:, 1:3, ::2]
    found = read_cam(save(npy, {"keys": torch.tensor([5, 6]), "high_res": view}))
    assert found.cam.tolist() == [[[1, 9], [2, 10]], [[13, 21], [14, 22]]]


def test_an_irn_image_without_classes_has_no_maps(npy):
    none = torch.zeros(0, dtype=torch.int64)
    maps = np.zeros((0, 3, 4), np.float32)
    found = read_cam(save(npy, {"keys": none, "cam": torch.zeros(0, 1, 1), "high_res": maps}))
    assert (found.classes, found.cam.shape) == ((), (0, 3, 4))


def test_toco_maps_keep_the_order_of_their_keys(npy):
    found = read_cam(save(npy, {"keys": np.array([14, 3]), "high_res": np.stack([LOW, HIGH])}))
    assert (found.classes, found.form) == ((14, 3), "toco")
    assert rows(found.cam) == [[0.0, 0.25, 0.5], [1.0, 0.75, 0.5]]


@pytest.mark.parametrize("more", [{}, {"highres": np.stack([HIGH]).astype(np.float16)}])
def test_clip_es_maps_are_the_ones_with_attention(npy, more):
    maps = np.stack([LOW]).astype(np.float16)
    found = read_cam(save(npy, {"keys": np.array([3]), **more, "attn_highres": maps}))
    assert (found.classes, found.form, found.cam.dtype) == ((3,), "clip-es", torch.float32)
    assert rows(found.cam) == [[0.0, 0.25, 0.5]]


@pytest.mark.parametrize(
    "entries", [("msc_seg",), ("segs", "msc_segs")], ids=["toco", "afa and weclip"]
)
def test_logits_become_probabilities_with_the_background_first(npy, entries):
    odds = np.array([1.0, 3.0, 4.0]).reshape(1, 3, 1, 1)  # softmax of their logarithms: n / 8
    last = entries[-1]
    content = {name: np.log(odds if name == last else odds[:, ::-1]) for name in entries}
    found = read_cam(save(npy, content))
    assert (found.classes, found.form) == ((0, 1), "logits")
    assert found.background.item() == pytest.approx(1 / 8)
    assert found.cam.flatten().tolist() == pytest.approx([3 / 8, 4 / 8])


def test_excel_maps_begin_with_the_background_and_are_no_logits(npy):
    maps = np.stack([HIGH, LOW])
    found = read_cam(save(npy, {"valid_lam": maps, "keys_gt": np.array([4])}))
    assert (found.classes, found.form) == ((4,), "excel")
    assert rows(found.background) == [1.0, 0.75, 0.5]
    assert rows(found.cam) == [[0.0, 0.25, 0.5]]


def test_a_plain_array_takes_the_classes_it_is_given(npy):
    found = read_cam(save(npy, np.stack([LOW, HIGH])), classes=[3, 14])
    assert (found.classes, found.form) == ((3, 14), "array")
    assert rows(found.cam) == [[0.0, 0.25, 0.5], [1.0, 0.75, 0.5]]


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed, save_file])
def test_the_same_entries_may_stand_in_npz_or_safetensors(tmp_path, saver):
    content = {"keys": np.array([3]), "high_res": np.stack([LOW])}
    path = tmp_path / "maps"
    with path.open("wb") as file:
        if saver is save_file:
            save_file(content, path)
        else:
            saver(file, **content)
    found = read_cam(path)
    assert (found.classes, found.form, rows(found.cam)) == ((3,), "toco", [[0.0, 0.25, 0.5]])


@pytest.mark.parametrize("data", [NUMPY_1, PYTHON_2], ids=["numpy 1", "python 2"])
def test_files_of_old_versions_are_read(npy, data):
    found = read_cam(save_pickle(npy, data))
    assert (found.classes, rows(found.cam)) == ((3,), [[0.25, 1.0]])


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("package", [b"numpy.core", b"numpy._core"])
def test_every_protocol_is_read_under_both_names_of_numpy(npy, protocol, package):
    maps = np.asfortranarray(np.linspace(0, 1, 6).reshape(1, 2, 3))
    whole = np.array({"keys": np.array([2]), "high_res": maps}, dtype=object)
    data = pickle.dumps(whole, protocol=protocol)
    if protocol < 4:  # names stand as lines there; later they have lengths
        data = data.replace(b"cnumpy._core.", b"c" + package + b".")
    found = read_cam(save_pickle(npy, data))
    np.testing.assert_array_equal(found.cam, maps.astype(np.float32))


# What camkit writes, read as the other codebases read it.


@pytest.fixture
def cam():
    return torch.tensor([[[0.0, 0.25, 0.5]], [[1.0, 0.75, 0.1]]])


def test_toco_reads_what_is_written(npy, cam):
    write_cam(npy, [3, 14], cam)
    cam_dict = load(npy)
    cams = np.pad(cam_dict["high_res"], ((1, 0), (0, 0), (0, 0)), constant_values=0.3)
    keys = np.pad(cam_dict["keys"] + 1, (1, 0), mode="constant")
    assert keys[np.argmax(cams, axis=0)].tolist() == [[15, 15, 4]]
    assert (cam_dict["keys"].dtype, cam_dict["high_res"].dtype) == (np.int64, np.float32)


def test_clip_es_reads_what_is_written(npy, cam):
    write_cam(npy, [3, 14], cam)
    cam_dict = load(npy)
    assert cam_dict["keys"].tolist() == [3, 14]
    assert cam_dict["attn_highres"].dtype == np.float16
    np.testing.assert_array_equal(cam_dict["attn_highres"], cam.half())


def test_irn_reads_what_is_written(npy):
    cam = torch.full((2, 9, 16), 0.5)
    write_cam(npy, [3, 14], cam, form="irn")
    cam_dict = load(npy)
    assert np.pad(cam_dict["keys"] + 1, (1, 0), mode="constant").tolist() == [0, 4, 15]
    torch.testing.assert_close(cam_dict["cam"], torch.full((2, 3, 4), 0.5))
    np.testing.assert_array_equal(cam_dict["high_res"], cam)


def test_mctformer_reads_what_is_written(npy, cam):
    write_cam(npy, [3, 14], cam, form="psa")
    predict_dict = load(npy)
    assert list(predict_dict) == [3, 14]
    assert predict_dict[14].shape == (1, 3)
    np.testing.assert_array_equal(predict_dict[14], cam[1])


@pytest.mark.parametrize("form", ["both", "psa", "clip-es"])
def test_written_files_do_not_name_a_module_that_numpy_1_lacks(npy, cam, form):
    write_cam(npy, [3, 14], cam, form=form)
    data = npy.read_bytes()
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in data
    assert b"numpy._core" not in data


@pytest.mark.parametrize("form", ["both", "irn"])
def test_only_the_given_maps_are_written_not_what_they_are_cut_from(npy, form):
    write_cam(npy, [1], torch.zeros(100, 64, 64)[5:6], form=form)
    assert npy.stat().st_size < 30_000  # one map is 16384 bytes in float32


@pytest.mark.parametrize("form", ["both", "psa", "irn", "clip-es"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_maps_of_any_float_dtype_and_with_gradients_are_written(npy, form, dtype):
    cam = torch.full((1, 2, 2), 0.5, dtype=dtype, requires_grad=True)
    write_cam(npy, (0,), cam, form=form)
    torch.testing.assert_close(read_cam(npy).cam, torch.full((1, 2, 2), 0.5))


@settings(deadline=None)  # of files, on busy disks
@given(
    classes=st.lists(st.integers(0, 90), unique=True, max_size=5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    form=st.sampled_from(["both", "psa", "irn", "clip-es"]),
)
@example(classes=[], size=(3, 4), form="psa")
@example(classes=[], size=(3, 4), form="irn")
def test_what_is_written_is_read_back(classes, size, form):
    cam = 0.15 * torch.rand(len(classes), *size)  # maps that add up to 1 mean something else
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.npy"
        write_cam(path, classes, cam, form=form)
        found = read_cam(path)
    assert found.classes == tuple(classes)
    assert found.form == form
    if classes or form != "psa":
        wanted = cam.half().float() if form == "clip-es" else cam
        torch.testing.assert_close(found.cam, wanted, rtol=0, atol=0)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("classes", "cam", "words"),
    [
        ([1], torch.full((1, 2, 2), 1.5), r"must lie in \[0, 1\], got 1.5 to 1.5; normalise it"),
        ([1], torch.full((1, 2, 2), -0.5), r"\[0, 1\], got -0.5 to -0.5"),
        ([1], torch.full((1, 2, 2), math.nan), "`cam` must be finite, got NaN in map 0"),
        ([1], torch.full((1, 2, 2), math.inf), "`cam` must be finite, got infinity in map 0"),
        ([1, 2], torch.zeros(1, 2, 2), r"each of the 2 classes, .* of shape \(1, 2, 2\)"),
        ([1], torch.zeros(1, 1, 2, 2), r"each of the 1 classes, .* of shape \(1, 1, 2, 2\)"),
        ([1, 1], torch.zeros(2, 2, 2), r"distinct indices from 0, got \[1, 1\]"),
        ([-1], torch.zeros(1, 2, 2), r"distinct indices from 0, got \[-1\]"),
        ([1], torch.zeros(1, 2, 2, dtype=torch.int64), "floating-point pixels, got torch.int64"),
        ([1], torch.zeros(1, 0, 2), r"pixels, got torch.float32 of shape \(1, 0, 2\)"),
    ],
)
def test_maps_that_others_would_misread_are_not_written(npy, classes, cam, words):
    with pytest.raises(ValueError, match=words):
        write_cam(npy, classes, cam)
    assert not npy.exists()


@pytest.mark.usefixtures("no_shape_checks")
def test_an_unknown_form_is_refused(npy, cam):
    with pytest.raises(ValueError, match="must be both, psa, irn or clip-es, got 'seam'"):
        write_cam(npy, [3, 14], cam, form="seam")


def test_a_failed_write_leaves_the_old_file(npy, cam, monkeypatch):
    write_cam(npy, [3, 14], cam)
    before = npy.read_bytes()
    monkeypatch.setattr(pickle, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_cam(npy, [3, 14], 0.5 * cam)
    assert [path.name for path in npy.parent.iterdir()] == [npy.name]
    assert npy.read_bytes() == before


# Files that hold no class maps.

MAP = np.stack([LOW])
KEYS = np.array([3])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({-1: LOW}, r"032\.npy: keys must be distinct class indices from 0, got \[-1\]"),
        ({1: LOW, 2: LOW.T}, r"map 2 has shape \(3, 1\), map 1 has \(1, 3\); all maps of an"),
        ({1: LOW.astype(np.complex64)}, r"map 1 must hold floating-point numbers, got complex64"),
        ({1: LOW.astype(object)}, r"map 1 must hold floating-point numbers, got object of"),
        ({1: LOW.astype(np.uint8)}, r"floating-point numbers, got uint8 of shape \(1, 3\)"),
        ({1: LOW.tolist()}, "map 1 must hold floating-point numbers, got a list"),
        ({1: MAP}, r"map 1 must be rows x columns, got float32 of shape \(1, 1, 3\)"),
        ({1: LOW[:0]}, r"map 1 must be rows x columns, got float32 of shape \(0, 3\)"),
        ({1: LOW * math.nan}, "`map 1` must be finite, got NaN .* look for"),
        ({1: LOW + math.inf}, "`map 1` must be finite, got infinity"),
        ({1: LOW + np.float64(1e300)}, "`map 1` must be finite, got infinity"),
        ({"keys": KEYS, "high_res": LOW}, "high_res must be maps x rows x columns, got float32 of"),
        ({"keys": KEYS, "high_res": np.stack([LOW, LOW])}, "has 2 maps; expected 1"),
        ({"keys": KEYS[:0], "high_res": MAP}, "has 1 maps; expected 0"),
        ({"keys": -KEYS, "high_res": MAP}, r"keys must be distinct class .*, got \[-3\]"),
        ({"keys": [3, 3], "high_res": MAP}, r"keys must be distinct class .*, got \[3, 3\]"),
        ({"keys": KEYS / 2, "attn_highres": MAP}, "keys must be whole numbers, got float64"),
        ({"keys": 3, "attn_highres": MAP}, "keys must be a list of class indices, got a int"),
        ({"keys": KEYS.astype(object), "high_res": MAP}, "must be whole numbers, got object"),
        ({"valid_lam": MAP, "keys_gt": KEYS}, "valid_lam has 1 maps; expected 2"),
        ({"msc_seg": MAP[None]}, "msc_seg has 1 maps; expected the background and each class"),
        ({"msc_seg": np.stack([MAP, MAP])}, r"msc_seg must be maps .*, got float32 of shape \(2,"),
        ({"keys": KEYS, "cam": MAP}, r"has the entries 'keys', 'cam'; expected \{class index: map"),
        ({"a": 1, 2: LOW}, "has the entries 'a', 2; expected"),
        ({True: LOW}, "has the entries True; expected"),
        ([LOW], "holds an array of shape .* without classes"),
        (MAP, r"holds an array of shape \(1, 1, 3\) without classes; pass `classes`, one for each"),
        (np.array(None, dtype=object), "holds a NoneType; expected a dict of maps"),
        ({1: np.array(["a"])}, "other than arrays .it holds an array of dtype U1.; write it again"),
    ],
)
def test_a_file_without_usable_maps_is_named_with_the_reason(npy, content, words):
    with pytest.raises(DataError, match=words):
        read_cam(save(npy, content))


def test_classes_that_contradict_the_file_are_refused(npy):
    save(npy, {3: LOW, 14: HIGH})
    assert read_cam(npy, classes=[14, 3]).classes == (3, 14)
    with pytest.raises(DataError, match=r"holds the classes \(3, 14\), but `classes` is \(3,\)"):
        read_cam(npy, classes=[3])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"032\.npy is no \.npy, \.npz or safetensors file; expected arrays"),
        (b"\x93NUMPY\x01\x00", r"032\.npy cannot be read"),
        (b"\x93NUMPY\x09\x00", r"032\.npy is of \.npy version \(9, 0\); arrays are of"),
        (b"\x93NUMPY\x01\x00\x02\x00{\n", r"032\.npy cannot be read"),
        (b"PK\x03\x04 and no more", r"032\.npy cannot be read"),
        (b"\x03\0\0\0\0\0\0\0{..", r"032\.npy cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_named(npy, data, words):
    npy.write_bytes(data)
    with pytest.raises(DataError, match=words):
        read_cam(npy)


def test_a_missing_file_is_named(npy):
    with pytest.raises(DataError, match=r"032\.npy cannot be read \(.*No such file"):
        read_cam(npy)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(npy):
    with npy.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20, 2**20)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match=r"032\.npy cannot be read"):
        read_cam(npy, classes=[1])


def test_npz_with_pickles_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", keys=KEYS, high_res=np.array([None]))
    with pytest.raises(DataError, match=r"a\.npz cannot be read .*holds a pickle"):
        read_cam(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [{3: LOW}, {"keys": torch.tensor([3]), "high_res": MAP}])
def test_no_beginning_of_a_file_is_taken_for_the_whole(npy, content):
    data = save(npy, content).read_bytes()
    for end in range(len(data)):
        npy.write_bytes(data[:end])
        with pytest.raises(DataError, match=r"032\.npy"):
            read_cam(npy)


@given(place=st.integers(128, 2000), byte=st.integers(0, 255))
def test_a_flipped_byte_is_either_harmless_or_told(place, byte):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.npy"
        write_cam(path, [3, 14], torch.rand(2, 4, 5), form="irn")
        data = bytearray(path.read_bytes())
        data[place % (len(data) - 128) + 128] = byte
        path.write_bytes(data)
        try:
            outcome = f"{len(read_cam(path).cam)} maps"
        except DataError as error:
            outcome = str(error)
    assert outcome == "2 maps" or str(path) in outcome


# Files that would run code.


class Runs:
    """Pickled, it asks for a call on loading."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def global_line(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def counted(value):
    return b"B" + len(value).to_bytes(4, "little") + value


def make_folder(folder):
    """Pickles that make the folder, each by another way to call something."""
    code = f"import os; os.mkdir({folder!r})"
    shell = f"mkdir {folder}"
    marshalled = counted(marshal.dumps(compile(code, "", "exec")))
    return {
        "posix.system": pickle.dumps(Runs(os.system, shell)),
        "posix.mkdir": pickle.dumps(Runs(os.mkdir, folder), protocol=0),
        "builtins.exec": pickle.dumps(Runs(exec, code)),
        "__builtin__.eval": pickle.dumps(Runs(eval, f"__import__('os').mkdir({folder!r})"), 2),
        "_pickle.loads": pickle.dumps(Runs(pickle.loads, pickle.dumps(Runs(os.mkdir, folder)))),
        "os.system": b"(S" + repr(shell).encode() + b"\nios\nsystem\n.",  # the opcode INST
        "os.mkdir": b"(" + global_line("os.mkdir") + text(folder) + b"o.",  # the opcode OBJ
        "types.FunctionType": global_line("types.FunctionType")  # a lambda, then called
        + global_line("marshal.loads")
        + marshalled
        + b"\x85R}\x86R)R.",
    }


CALLS = list(make_folder("x"))


def as_value(call):
    return b"}K\x01" + call.removesuffix(b".") + b"s."


def as_key(call):
    return b"}" + call.removesuffix(b".") + b"\x85Ns."


def as_deep_list(call):
    return b"]" * 5000 + call.removesuffix(b".") + b"a" * 5000 + b"."


def as_tensor_header(call):
    return global_line("torch.storage._load_from_bytes") + counted(call) + b"\x85R."


def as_tensor_storage(call):
    start = b"".join(
        pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    return global_line("torch.storage._load_from_bytes") + counted(start + call) + b"\x85R."


@pytest.mark.parametrize("name", CALLS)
def test_the_hostile_pickles_do_run_where_nothing_stops_them(tmp_path, name):
    folder = tmp_path / "canary"
    pickle.loads(make_folder(str(folder))[name])
    assert folder.is_dir()


@pytest.mark.parametrize(
    "place", [bytes, as_value, as_key, as_deep_list, as_tensor_header, as_tensor_storage]
)
@pytest.mark.parametrize("name", CALLS)
def test_a_hostile_pickle_is_refused_by_name_and_runs_nothing(npy, tmp_path, name, place):
    folder = tmp_path / "canary"
    save_pickle(npy, place(make_folder(str(folder))[name]))
    with pytest.raises(DataError, match=rf"032\.npy asks for {name}, .* it was not run"):
        read_cam(npy)
    assert not folder.exists()


@pytest.mark.parametrize(
    "name",
    [
        "numpy.load",
        "numpy.ndarray.tofile",
        "numpy.core.multiarray.fromfile",
        "torch.load",
        "torch.serialization.load",
        "torch._utils._rebuild_parameter",
        "torch.FloatStorage",
        "builtins.getattr",
        "collections.OrderedDict.fromkeys",
        "camkit.data.unpickling._NAMES",
    ],
)
def test_names_near_the_allowed_ones_are_refused(npy, name):
    module, attribute = ("numpy", "ndarray.tofile") if "tofile" in name else name.rsplit(".", 1)
    data = b"\x80\x04" + text(module) + text(attribute) + b"\x93."
    save_pickle(npy, data)
    with pytest.raises(DataError, match=f"asks for {name}, "):
        read_cam(npy)


RECONSTRUCT = global_line("numpy.core.multiarray._reconstruct")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (RECONSTRUCT + b"N}" + text("__defaults__") + b"Ns\x86b.", "it changes a function"),
        (global_line("numpy.ndarray") + b")\x81.", "write it again"),
        (global_line("_codecs.encode") + text("a") + text("rot13") + b"\x86R.", "as rot13"),
        (b"Nr\xff\xff\xff\xff.", "memory slots do not fit its length"),  # would take 64 GB
        (b"\x8e" + b"\xff" * 7 + b"\x7f.", "write it again"),  # promises 2**63 bytes
        (b"\x82\x01.", "write it again"),  # an extension that nobody registered
        (text("a") + b"Q.", "write it again"),  # something stored outside
        (RECONSTRUCT + b")R.", "an array without content"),
    ],
)
def test_other_misuse_of_a_pickle_is_refused(npy, data, words):
    save_pickle(npy, b"\x80\x04" + data)
    with pytest.raises(DataError, match=rf"032\.npy holds a damaged pickle.*{words}"):
        read_cam(npy)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "words"),
    [
        (0, (1, 1, 9), (8, 8, 1), "larger than its storage"),
        (0, (1, 1, 4), (8, 8, 3), "reaches beyond its storage"),
        (6, (1, 1, 3), (8, 8, 1), "reaches beyond its storage"),
        (-1, (1, 1, 3), (8, 8, 1), "larger than its storage"),
        (7, (1, 1, 3), (8, 8, -1), "larger than its storage"),
        (0, (2**40, 2**40, 1), (0, 0, 0), "larger than its storage"),
    ],
)
def test_a_tensor_never_reaches_memory_beyond_its_own(npy, offset, size, stride, words):
    storage = torch.zeros(8).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    tensor = Runs(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, {})
    save(npy, {"keys": KEYS, "high_res": tensor})
    with pytest.raises(DataError, match=words):
        read_cam(npy)


def test_bytes_cannot_be_passed_off_as_objects(npy):
    dtype = global_line("numpy.dtype") + text("O8") + b"\x85R"
    scalar = global_line("numpy.core.multiarray.scalar") + dtype + text("addresse") + b"\x86R."
    save_pickle(npy, b"\x80\x02" + scalar)
    with pytest.raises(DataError, match="it takes bytes for objects"):
        read_cam(npy)


# Files that are small and would take for ever.


def tower(levels, width=2):
    """A pickle that builds a tuple of references to a tuple, and so on; and the opcode for it."""
    code = b"\x80\x03)q\x00"
    for level in range(levels):
        code += b"(" + b"".join(b"h%c" % level for _ in range(width)) + b"tq%c0" % (level + 1)
    return code, b"h%c" % levels


def as_tuple_key(levels, width):
    code, top = tower(levels, width)
    return code + b"}" + top + b"K\x01s."


def as_tuple_value(levels, width):
    code, top = tower(levels, width)
    return code + b"}K\x01" + top + b"s."


@pytest.mark.parametrize("build", [as_tuple_key, as_tuple_value])
@pytest.mark.parametrize(("levels", "width"), [(60, 2), (12, 200)])
def test_references_that_multiply_are_refused_at_once(npy, build, levels, width):
    save_pickle(npy, build(levels, width))
    # without a refusal this takes longer than anyone waits
    with pytest.raises(DataError, match="nested too deeply or too often") as caught:
        read_cam(npy)
    assert len(str(caught.value)) < 300 + len(str(npy))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        # hashing a tuple of 200,000 levels overflows the stack of the process
        (b"\x80\x03}K\x01" + b"\x85" * 200_000 + b"K\x01s.", "nested too deeply or too often"),
        (b"\x80\x03]q\x00h\x00h\x00\x86.", "uses a list or a dict twice"),
        (b"\x80\x03}(I1\nI2\nI3\nu.", "holds a damaged pickle"),
        (b"\x80\x03}\x8a\xff" + b"\x01" * 255 + b"K\x01s.", "holds|must be|expected"),
        (b"\x80\x03(K\x01K\x02K\x03", "holds a damaged pickle"),
        (b"\x80\x03h\x07.", "opcodes do not fit each other"),
        (b"\x80\x03}X\xff\xff\xff\x7fabc", "holds a damaged pickle"),
    ],
)
def test_pickles_of_any_nesting_end_in_a_data_error(npy, code, words):
    save_pickle(npy, code)
    with pytest.raises(DataError, match=words):
        read_cam(npy)


def test_a_shape_that_is_no_shape_is_refused(npy):
    # math.prod of it would make a tuple of 10**10 entries
    shape = (10**10, (1,))
    call = (
        global_line("numpy._core.numeric._frombuffer")
        + b"(U\x00"
        + global_line("numpy.dtype")
        + b"X\x02\x00\x00\x00f4\x85R"
        + pickle.dumps(shape, 2)[2:-1]
        + b"X\x01\x00\x00\x00CtR."
    )
    save_pickle(npy, call)
    with pytest.raises(DataError, match="an array has no shape"):
        read_cam(npy)


def test_a_zip_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "a.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("keys.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**28 + 1,)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(1025):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**21
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.npz unpacks to 10\d+ bytes, more than the 1073741824"):
        read_cam(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_header_that_promises_more_than_the_file_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(100))
    with pytest.raises(DataError, match="promises 4000000000000 bytes and has 228"):
        read_cam(path)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_maps_or_a_data_error(content):
    for start in (b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x20" + bytes(7) + b"{"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.npy")
            path.write_bytes(start + content)
            with pytest.raises(DataError):
                read_cam(path)
            save_pickle(path, content)
            with pytest.raises(DataError):
                read_cam(path)
