"""Pickles of arrays are read; whatever else a pickle asks for is named, and does not happen."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import pickletools
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fastmrcnn.errors import UserError
from fastmrcnn.weights.pickles import read_pickle
from fastmrcnn.weights.sources import read_weights


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


def write(path: Path, tree: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


DTYPES = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", ">f4", ">i8")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_come_as_tensors(tmp_path: Path, protocol: int, dtype: str) -> None:
    array = (np.arange(24).reshape(2, 3, 4) % 7).astype(dtype)
    tree = {
        "model": OrderedDict(a=array, b=np.asfortranarray(array), c=array[:, ::2], empty=array[:0]),
        "scalar": np.float64(0.5),
        "__author__": "somebody",
        "plain": [1, 2.5, None, True, b"\xff", ("x",)],
    }
    found = read_weights(write(tmp_path / "w.pkl", tree, protocol))
    for key, expected in tree["model"].items():
        assert isinstance(found["model"][key], torch.Tensor)
        assert np.array_equal(found["model"][key].numpy(), expected), key
    assert found["model"]["a"].is_contiguous()
    assert {key: found[key] for key in ("scalar", "__author__", "plain")} == {
        "scalar": 0.5,
        "__author__": "somebody",
        "plain": [1, 2.5, None, True, b"\xff", ("x",)],
    }


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    # {'w': numpy.array([1, 2], '<f4')} as Python 2.7 wrote it: text and data are byte strings.
    content = (
        b"\x80\x02}q\x00U\x01wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04"
        b"U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x02\x85q\x08cnumpy\ndtype\nq\tU\x02f4q\nK\x00K\x01\x87q\x0bRq\x0c"
        b"(K\x03U\x01<q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89U\x08\x00\x00\x80?\x00\x00\x00@q\x0f"
        b"tq\x10bs."
    )
    path = tmp_path / "w.pkl"
    path.write_bytes(content)
    assert read_weights(path)["w"].tolist() == [1.0, 2.0]


@given(
    arrays.arrays(
        st.sampled_from(["f4", ">f8", "i8", "?"]), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0)
    ),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_array(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, protocol: int) -> None:
    path = write(tmp_path_factory.mktemp("arrays") / "w.pkl", {"x": array}, protocol)
    found = read_pickle(path)["x"].numpy()
    assert found.shape == array.shape
    assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")


CALLS = {
    "posix.system": Call(os.system, "touch {mark}"),
    "builtins.eval": Call(eval, "open({mark!r}, 'w')"),
    "builtins.exec": Call(exec, "open({mark!r}, 'w')"),
    "io.open": Call(open, "{mark}", "w"),
    "builtins.getattr": Call(getattr, (), "__class__"),
    "builtins.__import__": Call(builtins.__import__, "os"),
    "subprocess.Popen": Call(subprocess.Popen, ["touch", "{mark}"]),
    "numpy.load": Call(np.load, "{mark}"),
    "torch._utils._rebuild_tensor_v2": Call(torch._utils._rebuild_tensor_v2, 1),
}


def armed(tree: Any, mark: Path) -> Any:
    """The call with the path of the file that would be written in its arguments."""

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{mark!r}", repr(str(mark))).replace("{mark}", str(mark))
        return [fill(part) for part in value] if isinstance(value, list) else value

    function, arguments = tree.parts
    return Call(function, *(fill(argument) for argument in arguments))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("place", ["alone", "beside weights", "as a key", "within an array", "within a call"])
def test_code_is_named_and_does_not_run(tmp_path: Path, name: str, protocol: int, place: str) -> None:
    mark = tmp_path / "mark"
    call = armed(CALLS[name], mark)
    array = np.zeros(2, np.float32)
    tree: Any = {
        "alone": call,
        "beside weights": {"model": {"w": array}, "meta": [call]},
        "as a key": {"model": {call: array}},
        "within an array": {"w": np.array([call, None], dtype=object)},
        "within a call": {"w": Call(OrderedDict, [("x", Call(tuple, [call]))])},
    }[place]
    text = refusal(write(tmp_path / "w.pkl", tree, protocol))
    assert not mark.exists()
    # What is asked for first is named. Before protocol 3 modules went by the names of Python 2.
    first = "builtins.tuple" if place == "within a call" else name
    assert f".{first.rpartition('.')[2]}, which is no array" in text
    assert protocol < 3 or f"{first}, which is no array" in text
    assert "nothing of it was run" in text


def test_a_class_of_ones_own_is_named(tmp_path: Path) -> None:
    text = refusal(write(tmp_path / "w.pkl", {"w": Path("x")}))
    assert "pathlib" in text


@pytest.mark.parametrize("protocol", [2, 4])
def test_odd_arrays_are_refused(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "w.pkl"
    odd: dict[str, Any] = {
        "objects": np.array([1, "a"], dtype=object),
        "records": np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]),
        "sub-arrays": np.zeros(2, dtype=np.dtype([("a", "f4", (2,))])),
        "U3": np.array(["abc"]),
        "S3": np.array([b"abc"]),
        "M8": np.zeros(2, dtype="datetime64[s]"),
        "c8": np.zeros(2, dtype="complex64"),
        "V4": np.zeros(2, dtype="V4"),
        "matrix": np.zeros((2, 2)).view(np.matrix),
        "masked": np.ma.masked_array([1.0, 2.0], [True, False]),
    }
    for name, value in odd.items():
        text = refusal(write(path, {"w": value}, protocol))
        assert "is no array and no container" in text, name


RECONSTRUCT = np.zeros(1, np.float32).__reduce__()[0]
FLOAT = np.dtype("f4")
FORGED: dict[str, Any] = {
    # An object dtype whose flags claim that it holds no objects: numpy would take bytes for pointers.
    "pointers": Call(
        RECONSTRUCT,
        np.ndarray,
        (0,),
        b"b",
        state=(
            1,
            (1,),
            Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, 8, 8, 0)),
            False,
            b"A" * 8,
        ),
    ),
    "too few bytes": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (10**9,), FLOAT, False, b"1234")),
    "negative": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (-1, -1), FLOAT, False, b"1234")),
    "overflow": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (2**62, 4), FLOAT, False, b"")),
    "not a shape": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, ("a",), FLOAT, False, b"1234")),
    "not a dtype": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), "f4", False, b"1234")),
    "no contents": Call(RECONSTRUCT, np.ndarray, (0,), b"b"),
    "another class": Call(RECONSTRUCT, np.dtype, (0,), b"b"),
    "a class as data": np.ndarray,
    "a function as data": RECONSTRUCT,
    "numpy's dtype as data": FLOAT,
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_arrays_are_refused(tmp_path: Path, name: str) -> None:
    refusal(write(tmp_path / "w.pkl", {"model": {"w": FORGED[name]}}))


def test_attributes_of_containers_are_dropped(tmp_path: Path) -> None:
    class Loaded(OrderedDict[str, Any]):
        def __reduce__(self) -> Any:
            return OrderedDict, (), {"items": "shadowed", "_metadata": 1}, None, iter(self.items())

    found = read_pickle(write(tmp_path / "w.pkl", Loaded(w=np.ones(1, np.float32))))
    assert found == {"w": torch.ones(1)}


def test_a_bomb_of_lists(tmp_path: Path) -> None:
    bomb: list[Any] = []
    for _ in range(18):
        bomb = [bomb] * 50
    path = write(tmp_path / "w.pkl", {"w": np.ones(1, np.float32), "bomb": bomb})
    assert path.stat().st_size < 10_000
    assert read_pickle(path)["w"].tolist() == [1.0]


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    refusal(write(tmp_path / "w.pkl", {"w": loop}))


def test_references_to_something_outside_are_refused(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", "x") if isinstance(value, torch.Tensor) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"w": torch.zeros(1)})
    (tmp_path / "w.pkl").write_bytes(stream.getvalue())
    assert "something outside the file" in refusal(tmp_path / "w.pkl")


def test_half_a_pickle(tmp_path: Path) -> None:
    tree = {"model": {f"w{i}": np.ones((4, 4), np.float32) for i in range(3)}, "__author__": "x"}
    content = pickle.dumps(tree, protocol=4)
    path = tmp_path / "w.pkl"
    cuts = sorted(
        {position for _, _, position in pickletools.genops(content) if position} | {len(content) - 1}
    )
    for cut in cuts:
        path.write_bytes(content[:cut])
        assert "incomplete or damaged" in refusal(path), cut


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_noise_gives_no_other_error(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "w.pkl"
    path.write_bytes(b"\x80\x04" + noise)
    with contextlib.suppress(UserError):
        read_pickle(path)  # whatever the noise, nothing else is raised
