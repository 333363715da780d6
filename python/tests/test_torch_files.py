"""Files of ``torch.save``, looked at without torch."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm_bridge.checkpoints import torch_files
from vllm_bridge.checkpoints.headers import Tensor
from vllm_bridge.errors import BridgeError


def saved(folder: Path, value: Any) -> str:
    path = str(folder / "file.pt")
    torch.save(value, path)
    return path


def refused(path: str) -> BridgeError:
    with pytest.raises(BridgeError) as caught:
        torch_files.read(path)
    assert caught.value.reason == "invalid_checkpoint"
    assert path in caught.value.message
    return caught.value


def numbers(tensor: Tensor, dtype: str) -> list[float]:
    count = tensor.size // np.dtype(dtype).itemsize
    return np.fromfile(tensor.file, dtype, count, offset=tensor.start).tolist()  # type: ignore[no-any-return]


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    path = saved(
        tmp_path,
        OrderedDict(
            weight=torch.nn.Parameter(weight, requires_grad=False),
            part=weight[1:2],
            half=torch.ones(3, dtype=torch.float16),
            packed=torch.tensor([7, 9], dtype=torch.uint8),
            about={"nbits": 4, "shape": torch.Size([3, 4]), "dtype": torch.bfloat16, "axis": None},
            list=[1.5, "text", True, -70000],
        ),
    )
    found = torch_files.read(path)
    assert found["about"] == {
        "nbits": 4,
        "shape": (3, 4),
        "dtype": torch_files.Dtype("bfloat16"),
        "axis": None,
    }
    assert found["list"] == [1.5, "text", True, -70000]
    assert (found["weight"].dtype, found["weight"].shape) == ("F32", (3, 4))
    assert numbers(found["weight"], "<f4") == list(range(12))
    # It shares the storage of the other.
    assert found["part"].shape == (1, 4)
    assert numbers(found["part"], "<f4") == [4, 5, 6, 7]
    assert (found["half"].dtype, numbers(found["half"], "<f2")) == ("F16", [1, 1, 1])
    assert (found["packed"].dtype, numbers(found["packed"], "u1")) == ("U8", [7, 9])


def test_the_tensors_of_a_module(tmp_path: Path) -> None:
    found = torch_files.read(saved(tmp_path, torch.nn.Linear(4, 2).state_dict()))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        "weight": (2, 4),
        "bias": (2,),
    }


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/made-by-a-checkpoint",)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    error = refused(saved(tmp_path, {"weight": torch.ones(2), "harmful": Harmful()}))
    assert "more than tensors: posix.mkdir" in error.message
    assert not os.path.exists("/tmp/made-by-a-checkpoint")


def test_objects_of_classes_are_refused(tmp_path: Path) -> None:
    assert "more than tensors" in refused(saved(tmp_path, torch.nn.Linear(2, 2))).message


def test_the_format_before_torch_1_6_is_told(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "save its tensors anew with `torch.save`" in refused(str(path)).message


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    path = saved(tmp_path, {"weight": torch.ones(100)})
    whole = Path(path).read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        Path(path).write_bytes(whole[:length])
        refused(path)


def changed(path: str, program: bytes) -> str:
    """The file with another program."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize(
    "value",
    [
        ("storage", "not a storage"),
        ("module", None, "0", "cpu", 4),
    ],
)
def test_storages_that_are_none(tmp_path: Path, value: Any) -> None:
    path = saved(tmp_path, {"weight": torch.ones(4)})
    program = pickle.dumps(value, protocol=2)[:-1] + b"Q."
    refused(changed(path, program))


# A tuple of a tuple, twice, and so on: ``repr`` and ``hash`` would never end.
NESTED = b")" + b"".join(b"\x94h%c\x86" % number for number in range(100))


@pytest.mark.parametrize(
    "program",
    [
        NESTED + b")R.",
        b"}" + NESTED + b"Ns.",
        b"}(" + NESTED + b"Nu.",
        NESTED + b"\x8c\x01n\x93.",
        b"(" + NESTED + b"NNNNtQ.",
        b"(\x8c\x07storagectorch\nByteStorage\n" + NESTED + b"NNtQ.",
    ],
    ids=["called", "key", "keys", "module", "kind", "storage"],
)
def test_what_would_take_forever_is_refused(tmp_path: Path, program: bytes) -> None:
    refused(changed(saved(tmp_path, {"weight": torch.ones(4)}), program))


def test_a_tensor_that_is_larger_than_its_storage(tmp_path: Path) -> None:
    path = saved(tmp_path, {"weight": torch.ones(4, 4)})
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        program = archive.read(name)
    sizes = b"K\x04K\x04\x86"  # the shape
    assert program.count(sizes) == 1
    refused(changed(path, program.replace(sizes, b"K\xffK\x04\x86")))


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    """Bytes that are changed at random lead to an answer, not to a crash."""
    path = saved(tmp_path, {"a": {"W_q": torch.ones(8, dtype=torch.uint8), "nbits": 4}, "b": [1]})
    whole = Path(path).read_bytes()
    random = np.random.default_rng(7)
    outcomes = set()
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(random.integers(1, 5)):
            content[random.integers(len(content))] = random.integers(256)
        Path(path).write_bytes(content)
        try:
            torch_files.read(path)
            outcomes.add("read")
        except BridgeError as error:
            outcomes.add(error.reason)
    assert outcomes == {"read", "invalid_checkpoint"}
