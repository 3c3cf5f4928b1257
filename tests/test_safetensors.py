"""A safetensors file is believed only after it has been checked, and its tensors are what the library of that name reads."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanorl.errors import UserError
from nanorl.interop.safetensors import DTYPES, LONGEST_HEADER, read_safetensors, write_safetensors

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5]), "c": torch.arange(4.0)}


def file_of(header, data=b"", length=None):
    """A file with this header, an object or bytes, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    return read_safetensors(folder / "model.safetensors")


def refused(folder, content):
    """The one sentence, which names the file."""
    with pytest.raises(UserError) as error:
        read(folder, content)
    text = str(error.value)
    assert "model.safetensors" in text and "\n" not in text and len(text) < 600, text
    return text


# ---- Round trips ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_what_is_written_is_read(dtype, tmp_path):
    """Its data begins at a multiple of 8 bytes, so that any reader can map it."""
    write_safetensors(tmp_path / "x", TENSORS, dtype)
    assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0
    found = read_safetensors(tmp_path / "x")
    assert list(found) == list(TENSORS)
    for name, x in TENSORS.items():
        assert found[name].dtype == dtype and torch.equal(found[name], x.to(dtype))


@pytest.mark.parametrize("name", DTYPES)
def test_the_library_reads_the_same_and_writes_what_we_read(name, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {"x": torch.tensor([[0, 1, 1], [1, 0, 0]]).to(DTYPES[name]), "y": torch.ones(1, dtype=DTYPES[name])}
    library.save_file(tensors, tmp_path / "theirs")
    found = read_safetensors(tmp_path / "theirs")
    assert found.keys() == tensors.keys() and all(found[key].dtype == x.dtype and torch.equal(found[key], x)
                                                  for key, x in tensors.items())
    if DTYPES[name].is_floating_point:
        write_safetensors(tmp_path / "ours", tensors, DTYPES[name])
        back = library.load_file(tmp_path / "ours")
        assert all(torch.equal(back[key], x) for key, x in tensors.items())


def test_what_is_read_is_a_view_of_the_file_that_no_write_reaches(tmp_path):
    write_safetensors(tmp_path / "x", TENSORS, torch.float32)
    before = (tmp_path / "x").read_bytes()
    (tmp_path / "x").chmod(0o400)
    a, b = read_safetensors(tmp_path / "x")["a.weight"], read_safetensors(tmp_path / "x")["a.weight"]
    a.zero_()
    assert (tmp_path / "x").read_bytes() == before and torch.equal(b, TENSORS["a.weight"])


@pytest.mark.parametrize("blanks", range(8))
def test_data_may_begin_anywhere(blanks, tmp_path):
    """Most writers pad the header so that the data is aligned; not all."""
    header = json.dumps({"x": entry("F64", [2], [0, 16])}).encode() + b" " * blanks
    assert read(tmp_path, file_of(header, struct.pack("<2d", 1.5, -2.5)))["x"].tolist() == [1.5, -2.5]


# ---- Files that are not what they say ----


GOOD = {"x": entry(), "y": entry(offsets=(4, 8))}
HOSTILE = {
    "empty": (b"", "0 bytes"),
    "four bytes": (b"abcd", "4 bytes"),
    "only a length": (struct.pack("<Q", 100), "header of 100 bytes"),
    "a pickle": (b"\x80\x02}q\x00." + b"\0" * 30, "announces a header"),
    "a zip archive": (b"PK\x03\x04" + b"\0" * 60, "announces a header of 67324752 bytes"),
    "the longest length": (file_of(GOOD, bytes(8), length=2**64 - 1), "header of 18446744073709551615 bytes"),
    "a header past the end": (file_of(GOOD, bytes(8), length=10_000), "header of 10000 bytes"),
    "no header": (file_of(b"", bytes(8)), "not readable as JSON"),
    "not JSON": (file_of(b"{x: 1}"), "not readable as JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not readable as JSON"),
    "a list": (file_of([1]), "list"),
    "deep JSON": (file_of(b"[" * 100_000), "not readable as JSON"),
    "a number of 5,000 digits": (file_of(b'{"x": ' + b"9" * 5000 + b"}"), "not readable as JSON"),
    "the same name twice": (file_of(b'{"x": 1, "x": 1}'), "same key twice"),
    "an entry that is a number": (file_of({"x": 1}), "'x' is 1"),
    "a field too few": (file_of({"x": {"dtype": "F32", "shape": [1]}}), "expected a dtype"),
    "a field too many": (file_of({"x": entry() | {"strides": [1]}}, bytes(4)), "expected a dtype"),
    "an unknown dtype": (file_of({"x": entry("F8_E4M3", [4])}, bytes(4)), "F8_E4M3"),
    "a dtype that is a list": (file_of({"x": entry([])}, bytes(4)), "has the dtype []"),
    "a shape of text": (file_of({"x": entry(shape="1")}, bytes(4)), "expected a dtype"),
    "a negative shape": (file_of({"x": entry(shape=[-1])}, bytes(4)), "expected a dtype"),
    "a shape of true": (file_of({"x": entry(shape=[True])}, bytes(4)), "expected a dtype"),
    "a shape of fractions": (file_of({"x": entry(shape=[1.0])}, bytes(4)), "expected a dtype"),
    "an empty tensor": (file_of({"x": entry(shape=[0, 2**62], offsets=[0, 0])}), "expected a dtype"),
    "nine dimensions": (file_of({"x": entry(shape=[1] * 9)}, bytes(4)), "expected a dtype"),
    "a shape beyond all numbers": (file_of({"x": entry(shape=[10**400])}, bytes(4)), "expected a dtype, a shape"),
    "offsets beyond all numbers": (file_of({"x": entry(offsets=[0, 10**400])}, bytes(4)), "and two data_offsets"),
    "bytes to spare": (file_of({"x": entry(offsets=[0, 8])}, bytes(8)), "'x' has 8 bytes; its shape and dtype take 4"),
    "a shape of exabytes": (file_of({"x": entry(shape=[2**40, 2**40])}, bytes(4)), "'x' has 4 bytes"),
    "a shape that overflows to 1": (file_of({"x": entry(shape=[2**62 + 1, 4])}, bytes(4)), "'x' has 4 bytes"),
    "offsets of exabytes": (file_of({"x": entry("U8", [2**60], [0, 2**60])}, bytes(4)), "4 follow the header"),
    "negative offsets": (file_of({"x": entry(offsets=[-4, 0])}, bytes(4)), "expected a dtype"),
    "offsets backwards": (file_of({"x": entry(offsets=[4, 0])}, bytes(4)), "'x' has -4 bytes"),
    "three offsets": (file_of({"x": entry(offsets=[0, 4, 8])}, bytes(8)), "expected a dtype"),
    "overlapping": (file_of({"x": entry(shape=[2], offsets=[0, 8]), "y": entry(offsets=[4, 8])}, bytes(8)), "'y' begins at"),
    "the same bytes twice": (file_of({"x": entry(), "y": entry()}, bytes(4)), "'y' begins at byte 0"),
    "a gap": (file_of({"x": entry(), "y": entry(offsets=[8, 12])}, bytes(12)), "'y' begins at byte 8"),
    "truncated": (file_of(GOOD, bytes(7)), "tensors have 8 bytes, and 7"),
    "bytes too many": (file_of(GOOD, bytes(9)), "tensors have 8 bytes, and 9"),
    "no tensors, but bytes": (file_of({}, bytes(9)), "tensors have 0 bytes, and 9"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name, tmp_path):
    content, named = HOSTILE[name]
    assert named in refused(tmp_path, content)


def test_a_header_longer_than_any_is_refused_unread(tmp_path):
    """A file of a gigabyte that is all header would become many gigabytes of Python objects."""
    with open(tmp_path / "x", "wb") as f:
        f.write(struct.pack("<Q", 2**30))
        f.truncate(2**30 + 8)
    with pytest.raises(UserError, match=str(LONGEST_HEADER)):
        read_safetensors(tmp_path / "x")


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="expected a safetensors file"):
            read_safetensors(path)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 24, 28, 2**31, 2**63, 2**64, 10**30, 0.5, True, None, "4"])
VALUES = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=3), st.sampled_from([*DTYPES, "F4", "", {}]))


@st.composite
def damaged(draw):
    """A sound file of three tensors, and what was done to it: to fields of its header, to its length, to single bytes."""
    header, end = {}, 0
    for name, x in TENSORS.items():
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    for _ in range(draw(st.integers(0, 2))):
        name, field = draw(st.sampled_from([*header])), draw(st.sampled_from(["dtype", "shape", "data_offsets", "x", None]))
        if field is None:
            header[name] = draw(VALUES)
        elif isinstance(header[name], dict):
            header[name] = header[name] | {field: draw(VALUES)}
    content = bytearray(file_of(header, b"".join(x.numpy().tobytes() for x in TENSORS.values())))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content) - 1))
        match draw(st.sampled_from(["change", "insert", "delete", "cut"])):
            case "change":
                content[place] = draw(st.integers(0, 255))
            case "insert":
                content[place:place] = draw(st.binary(max_size=9))
            case "delete":
                del content[place : place + draw(st.integers(1, 9))]
            case "cut":
                del content[max(place, 1) :]
    return bytes(content)


@given(damaged())
def test_a_damaged_file_is_read_as_the_library_reads_it_or_refused_in_one_sentence(tmp_path_factory, content):
    """What is read never has more bytes than the file."""
    folder = tmp_path_factory.getbasetemp()
    try:
        found = read(folder, content)
    except UserError as e:
        assert "model.safetensors" in str(e) and "\n" not in str(e) and len(str(e)) < 600, str(e)
        return
    assert sum(x.nbytes for x in found.values()) < len(content)
    library = pytest.importorskip("safetensors.torch")
    theirs = library.load(content)
    assert found.keys() == theirs.keys()
    for name, x in found.items():
        assert x.dtype == theirs[name].dtype and x.shape == theirs[name].shape
        assert torch.equal(x.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))
