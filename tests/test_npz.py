"""NumPy archives: what NumPy writes is read, what is written NumPy reads, and no archive does harm."""

import contextlib
import io
import struct
import zipfile

import numpy as np
import pytest

import microlora as ml
from microlora.exceptions import FormatError, UnsupportedVariantError
from styles_support import PATHS, delta, factors, same_deltas

F = factors()
WANT = {p: delta(a, b, 2.0) for p, (a, b) in F.items()}


def arrays(alpha=6.0, flip=False):
    out = {f"{p}.lora_a": a.T if flip else a for p, (a, _) in F.items()}
    out |= {f"{p}.lora_b": b.T if flip else b for p, (_, b) in F.items()}
    return out | ({} if alpha is None else {f"{p}.alpha": np.float64(alpha) for p in F})


def npy(array, **header):
    """The bytes of one .npy file; the header can lie."""
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape} | header
    text = repr(fields).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes()


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in members:
            z.writestr(name, data)
    return path


def good():
    return [(f"{name}.npy", npy(np.asarray(v))) for name, v in arrays().items()]


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("flip", [False, True])
def test_what_numpy_writes_is_read(tmp_path, write, flip):
    write(tmp_path / "a.npz", **arrays(flip=flip))
    (tmp_path / "a.npz").rename(tmp_path / "named-otherwise")
    file = ml.AdapterFile.read(tmp_path / "named-otherwise")
    assert file.format == "npz"
    same_deltas(file.adapter(), WANT)
    same_deltas(ml.load(tmp_path / "named-otherwise", mmap=True), WANT)


def test_alpha_may_be_given(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(None))
    same_deltas(ml.load(tmp_path / "a.npz", alpha=6.0), WANT)
    with pytest.raises(FormatError, match="no alpha"):
        ml.load(tmp_path / "a.npz")


def test_what_is_written_numpy_reads(tmp_path):
    adapter = ml.Adapter.from_factors(F, alpha=6.0, dtype="f16")
    ml.convert(adapter, tmp_path / "a.npz", format="npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as z:
        assert {n for n in z.files if n != "microlora"} == set(arrays())
        for p, (a, b) in F.items():
            np.testing.assert_array_equal(z[f"{p}.lora_a"], a.astype(np.float16))
            np.testing.assert_array_equal(z[f"{p}.lora_b"], b.astype(np.float16))
            assert z[f"{p}.lora_b"].dtype == np.float16
            assert z[f"{p}.alpha"] == 6.0
    with zipfile.ZipFile(tmp_path / "a.npz") as z:
        assert z.testzip() is None
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_STORED}
    again = (tmp_path / "a.npz").read_bytes()
    ml.convert(adapter, tmp_path / "a.npz", format="npz", overwrite=True)
    assert (tmp_path / "a.npz").read_bytes() == again


@pytest.mark.parametrize("how", ["fortran", "big-endian", "both"])
def test_order_and_endianness(tmp_path, how):
    def change(v):
        v = np.asarray(v, ">f4" if how != "fortran" and v.ndim else v.dtype)
        return np.asfortranarray(v) if how != "big-endian" else v

    np.savez(tmp_path / "a.npz", **{k: change(v) for k, v in arrays().items()})
    same_deltas(ml.load(tmp_path / "a.npz"), WANT)


def test_pickles_stay_shut(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02.")
        z.writestr("archive/data/0", b"0000")
    with pytest.raises(UnsupportedVariantError, match=r"pickle.*weights_only=True.*safetensors"):
        ml.load(tmp_path / "model.bin")
    bad = np.empty(1, object)
    np.savez(tmp_path / "a.npz", **arrays(), other=bad)
    with pytest.raises(UnsupportedVariantError, match="pickle"):
        ml.load(tmp_path / "a.npz")
    path = archive(tmp_path / "b.npz", [*good(), ("archive/data.pkl", b"\x80\x02.")])
    with pytest.raises(UnsupportedVariantError, match="pickle"):
        ml.load(path)


def patched(data, at_central, offset, value):
    """Bytes with a field of the first central or local record changed."""
    at = data.index(b"PK\x01\x02") if at_central else 0
    return data[: at + offset] + value + data[at + offset + len(value) :]


def test_hostile_archives(tmp_path):
    path = tmp_path / "a.npz"
    data = archive(path, good()).read_bytes()
    central = data.index(b"PK\x01\x02")
    cases = {
        "encrypted": (patched(data, True, 8, b"\x01\x00"), "encrypted"),
        "method": (patched(data, True, 10, b"\x0c\x00"), "compression method 12"),
        "checksum": (patched(data, True, 16, b"\x00\x00\x00\x00"), "checksum"),
        "size": (patched(data, True, 24, b"\xff\xff\xff\x7f"), "two sizes"),
        "both sizes": (patched(data, True, 20, b"\xff\xff\xff\x7f\xff\xff\xff\x7f"), "overlap"),
        "place": (patched(data, True, 42, b"\x10\x00\x00\x00"), "overlap|record"),
        "local name": (patched(data, False, 30, b"X"), "differ"),
        "not UTF-8": (patched(data, True, 46, b"\xff"), "not UTF-8"),
        "truncated": (data[:-30], "truncated|end"),
        "half": (data[: len(data) // 2], "truncated"),
        "tail": (data + b"x", "after its end"),
        "count": (data[:-12] + b"\xff\xff\xff\xff" + data[-8:], "members|disks|truncated|directory"),
        "start": (data[:-6] + b"\x00\x00\x00\x00" + data[-2:], "directory of"),
        "empty": (b"PK\x05\x06" + bytes(18), "header of"),
        "central": (data[:central] + b"XX" + data[central + 2 :], "record"),
    }
    for name, (bad, match) in cases.items():
        path.write_bytes(bad)
        with pytest.raises(FormatError, match=match) as e:
            ml.load(path)
        assert str(path) in str(e.value), name


@pytest.mark.parametrize("name", ["/etc/x.npy", "../x.npy", "a/../../x.npy", "a\\x.npy", "x\n.npy"])
def test_names_that_lead_away(tmp_path, name):
    path = archive(tmp_path / "a.npz", [*good(), (name, npy(np.zeros(1)))])
    with pytest.raises(FormatError, match=r"leads out|control"):
        ml.load(path)


def test_members_twice_and_strangers(tmp_path):
    members = good()
    with pytest.warns(UserWarning, match="Duplicate"):
        path = archive(tmp_path / "a.npz", [*members, members[0]])
    with pytest.raises(FormatError, match="twice"):
        ml.load(path)
    with pytest.raises(FormatError, match="expected arrays"):
        ml.load(archive(tmp_path / "b.npz", [*members, ("notes.txt", b"hello")]))
    with pytest.raises(FormatError, match="unused"):
        ml.load(archive(tmp_path / "c.npz", [*members, ("step.npy", npy(np.float64(1)))]))


def test_bombs_are_refused_before_memory_is_taken(tmp_path):
    size = 256 << 20
    body = npy(np.zeros(0, np.float32), shape=(size // 4,)) + bytes(size)
    path = archive(tmp_path / "a.npz", [("m.lora_a.npy", body)], zipfile.ZIP_DEFLATED)
    del body
    assert path.stat().st_size < 1 << 20
    with pytest.raises(FormatError, match="deflated members of"):
        ml.load(path)
    # A directory that gives a smaller size than the data has.
    small = npy(np.zeros((64, 1024), np.float32))
    data = archive(tmp_path / "b.npz", [("m.lora_a.npy", small)], zipfile.ZIP_DEFLATED).read_bytes()
    (tmp_path / "b.npz").write_bytes(patched(data, True, 24, struct.pack("<I", 1000)))
    with pytest.raises(FormatError, match="more than the 1000 bytes"):
        ml.load(tmp_path / "b.npz")
    (tmp_path / "b.npz").write_bytes(patched(data, True, 24, struct.pack("<I", len(small) + 5)))
    with pytest.raises(FormatError, match="the directory gives"):
        ml.load(tmp_path / "b.npz")


BAD_NPY = {
    "no magic": (b"\x93NUMPZ\x01\x00\x00\x00", "no NumPy header"),
    "short": (b"\x93NUMPY", "truncated"),
    "version": (b"\x93NUMPY\x09\x00\x00\x00\x00\x00", "version 9"),
    "long header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header of 4294967295"),
    "not a dict": (b"\x93NUMPY\x01\x00\x04\x00[1]\n", "expected descr"),
    "fields": (npy(np.zeros(1), extra=1), "expected descr"),
    "records": (npy(np.zeros(1), descr=[("x", "<f4")]), "expected descr"),
    "text": (npy(np.array("hello")), "dtype .<U5"),
    "void": (npy(np.zeros(2, "V2")), "V2"),
    "order": (npy(np.zeros(1), descr="!f8"), "byte order"),
    "shape": (npy(np.zeros(4), shape=(5,)), "32 bytes of data"),
    "overflow": (npy(np.zeros(4), shape=(2**62, 2**62)), "bytes of data"),
    "huge": (npy(np.zeros(4), shape=(10**30,)), "expected descr"),
    "negative": (npy(np.zeros(4), shape=(-4,)), "expected descr"),
    "dims": (npy(np.zeros(1), shape=(1,) * 40), "expected descr"),
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_bad_arrays(tmp_path, name):
    data, match = BAD_NPY[name]
    path = archive(tmp_path / "a.npz", [*good(), ("x.lora_a.npy", data)])
    with pytest.raises(FormatError, match=match) as e:
        ml.load(path)
    assert "x.lora_a" in str(e.value)


def test_our_own_entry_is_checked(tmp_path):
    for value, match in [
        (np.array(b"{"), "microlora"),
        (np.float32(1), "expected bytes"),
        (np.array(b'{"orientation": "up"}'), "orientation"),
        (np.array(b'{"microlora.modules": "x"}'), r"microlora\.modules"),
    ]:
        path = archive(tmp_path / "a.npz", [*good(), ("microlora.npy", npy(value))])
        with pytest.raises(FormatError, match=match):
            ml.load(path)


def test_any_byte_may_be_wrong(tmp_path):
    path = tmp_path / "a.npz"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{k: v for k, v in arrays().items() if PATHS[0] in k})
    data = buffer.getvalue()
    r = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(data)
        for at in r.integers(0, len(data), r.integers(1, 4)):
            bad[at] = r.integers(0, 256)
        path.write_bytes(bytes(bad[: r.integers(1, len(bad) + 1)] if r.random() < 0.2 else bad))
        with contextlib.suppress(FormatError):
            assert ml.load(path).modules()
