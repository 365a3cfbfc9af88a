"""PyTorch's files without PyTorch: every kind that torch.save writes, nothing else, and nothing run."""

import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxmed.core import weights
from jaxmed.core.errors import UserError
from jaxmed.ports import torch_files

# Written by PyTorch: files/make.py.
FILES = Path(__file__).parent / "files"


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for k, x in a.items():
        assert b[k].dtype == x.dtype, k
        np.testing.assert_array_equal(b[k], x, err_msg=k)


@pytest.mark.parametrize("name", ["zip", "legacy", "protocol5"])
def test_everything_that_pytorch_saves(name):
    state = torch_files.read(FILES / f"{name}.pt")
    assert state.key == "state_dict" and {"optimizer", "args", "scaler"} <= set(state.others)
    expected = {"module.weight": np.arange(6.0).reshape(2, 3), "module.bias": np.array([10.0, 11.0])}
    same({k: x.astype(np.float32) for k, x in expected.items()}, state.tensors)
    got = torch_files.read(FILES / f"{name}.pt", "extra").tensors
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    numbers = ["float64", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "complex64"]
    numbers = [np.dtype(k) for k in numbers]
    numbers += [np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)]
    others = {
        "bool": base > 3,
        "view": base[1:, ::2],
        "transposed": base.T,
        "expanded": np.ones((2, 3), np.float32),
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
        "whole": base,
        "parameter": expected["module.weight"].astype(np.float32),
        "half_view": base.astype(ml_dtypes.bfloat16).T[2:],
    }
    same({str(d): base.astype(d) for d in numbers} | others, got)


def test_which_dict(tmp_path):
    with pytest.raises(UserError, match=r"no weights under 'ema'; --key can name state_dict, extra"):
        torch_files.read(FILES / "zip.pt", "ema")
    assert torch_files.read(FILES / "no_checksums.pt").tensors["a"].tolist() == [0, 1, 2]
    assert torch_files.read(FILES / "no_checksums.pt").key == ""


def test_written_files_read_back(tmp_path):
    tensors = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scale": np.float32(3).reshape(()),
        "half": np.ones((2, 0), np.float16),
        "brain": np.arange(5).astype(ml_dtypes.bfloat16),
        "ids": np.arange(3),
        "mask": np.array([True, False]),
    }
    torch_files.write(tmp_path / "w.pt", tensors)
    same(tensors, torch_files.read(tmp_path / "w.pt").tensors)
    with zipfile.ZipFile(tmp_path / "w.pt") as z:
        assert z.testzip() is None
        assert all((i.header_offset + 30 + len(i.filename) + len(i.extra)) % 64 == 0 for i in z.infolist())
    # Numbers of a big-endian machine.
    with zipfile.ZipFile(tmp_path / "w.pt") as z, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        for i in z.infolist():
            k = i.filename.split("/")[-1]
            x = list(tensors.values())[int(k)] if k.isdigit() else None
            swapped = None if x is None else x.reshape(-1).view(np.uint8).reshape(x.size, x.itemsize)[:, ::-1].tobytes()
            content = b"big" if k == "byteorder" else z.read(i) if x is None else swapped
            big.writestr(i.filename, content, zipfile.ZIP_DEFLATED if k == "0" else zipfile.ZIP_STORED)
    same(tensors, torch_files.read(tmp_path / "big.pt").tensors)
    with pytest.raises(UserError, match="'c' is complex64, which safetensors files cannot hold"):
        weights.write(tmp_path / "c.safetensors", {"c": np.ones(2, np.complex64)})
    weights.write(tmp_path / "w.safetensors", tensors, {"system": "x"})
    same(dict(sorted(tensors.items())), dict(sorted(weights.read(tmp_path / "w.safetensors").items())))


def test_damaged_files_are_one_line(tmp_path):
    whole = (FILES / "zip.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.array([10.0, 11.0], np.float32).tobytes())] ^= 1
    legacy = (FILES / "legacy.pt").read_bytes()
    for content, message in (
        (bytes(flipped), "data/1 has a wrong checksum"),
        (whole[: len(whole) // 2], "no whole PyTorch file"),
        (legacy[:-5], "is cut off"),
        (legacy[: len(legacy) // 3], "no whole PyTorch file"),
        (b"", "no whole PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1", "it starts with b'version https://git-"),
    ):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            torch_files.read(tmp_path / "x.pt")
    with pytest.raises(UserError, match="No such file"):
        torch_files.read(tmp_path / "nothing.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("module", r"the Python object torch\.nn\.modules\.linear\.Linear"),
        ("script", "a compiled program"),
        ("sparse", r"the Python object torch\._utils\._rebuild_sparse_tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        torch_files.read(FILES / f"{name}.pt")


def test_nothing_in_a_file_is_run(tmp_path):
    mark = tmp_path / "ran"
    command = f"touch {mark}".encode()

    class Evil:
        def __reduce__(self):
            import os

            return os.system, (command.decode(),)

    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for pickled, message in (
        (pickle.dumps({"a": Evil()}, 2), r"the Python object posix\.system"),
        (pickle.dumps({"a": Evil()}, 5), r"the Python object posix\.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", r"the Python object builtins\.eval"),
        (b"cbuiltins\ngetattr\n.", r"the Python object builtins\.getattr"),
        (b"ctorch.storage\n_load_from_bytes\n.", r"the Python object torch\.storage\._load_from_bytes"),
        (b"(S'" + command + b"'\nios\nsystem\n.", "the pickle instruction INST"),
        (b"\x82\x01.", "the pickle instruction EXT1"),
        (tensor + b"}S'__code__'\nI1\nsb.", r"attributes of torch\._utils\._rebuild_tensor_v2"),
        (b"S'os.system'\n(S'x'\ntR.", "a call of something that is no constructor"),
        (b"}(S'a'\n" + tensor + b"(I1\nI0\n(t(tI00\nNtRu.", "a tensor without a storage"),
        (b"(((.", "no whole PyTorch file"),
        (b"]00.", "no whole PyTorch file"),
    ):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as z:
            z.writestr("x/data.pkl", pickled)
        with pytest.raises(UserError, match=message):
            torch_files.read(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil(), 2))
    with pytest.raises(UserError, match=r"the Python object posix\.system"):
        torch_files.read(tmp_path / "x.pt")
    # Harmless libraries have functions too: their names are words here.
    gadget = b"}S'a'\ncnumpy.testing._private.utils\nrunstring\n(S'open(\"" + str(mark).encode() + b'", "w")\'\n}tRs.'
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as z:
        z.writestr("x/data.pkl", gadget)
    with pytest.raises(UserError, match="it has no tensors"):
        torch_files.read(tmp_path / "x.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (5,), (1,)), (3, (2,), (1,)), (-1, (2,), (1,)), (3, (2,), (-1,)), (0, (2,), ())],
)
def test_a_tensor_stays_within_its_storage(tmp_path, offset, shape, strides):
    numbers = [b"(" + b"".join(b"I%d\n" % i for i in x) + b"t" for x in (shape, strides)]
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    call = b"(" + storage + b"I%d\n" % offset + b"".join(numbers) + b"I00\nNtR"
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as z:
        z.writestr("x/data.pkl", b"}S'a'\nctorch._utils\n_rebuild_tensor_v2\n" + call + b"s.")
        z.writestr("x/data/0", np.ones(4, np.float32).tobytes())
    with pytest.raises(UserError, match=r"no whole PyTorch file \(a tensor of shape"):
        torch_files.read(tmp_path / "x.pt")
