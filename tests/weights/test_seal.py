"""The checksum of a checkpoint: what it finds, what it leaves alone, and which file is taken instead."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import (
    find_checkpoint,
    find_whole_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from fastmrcnn.weights.detectors import open_weights
from fastmrcnn.weights.seal import Sealing, fault_of, written_checksum
from fastmrcnn.weights.trained import load_trained

SEAL = 24  # bytes


def save(folder: Path, step: int) -> Path:
    torch.manual_seed(step)
    model = torch.nn.Linear(40, 50)
    optimizer = torch.optim.SGD(model.parameters())
    card = ModelCard(Config(), ["a"], [1])
    return save_checkpoint(folder, step=step, model=model, optimizer=optimizer, card=card, keep=9)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def unsealed(path: Path) -> None:
    """As a file of an earlier version."""
    torch.save(torch.load(path, weights_only=True), path)


def place_of_weight(path: Path) -> int:
    """Where the bytes of a tensor begin."""
    weight = torch.load(path, weights_only=True)["model"]["weight"]
    return path.read_bytes().index(weight.numpy().tobytes())


def test_any_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = path.read_bytes()
    assert fault_of(path) is None
    end = 8 * (len(content) - SEAL - 30)
    bits = [*random.Random(0).sample(range(8 * len(content)), 100), *range(end, 8 * len(content))]
    for bit in bits:
        flip(path, bit)
        assert fault_of(path) is not None, bit
        path.write_bytes(content)
    for length in [*range(len(content) - 2 * SEAL, len(content)), 0, 1, 21, 22, 5000]:
        path.write_bytes(content[:length])
        assert fault_of(path) is not None, length


def test_a_sealed_file_is_one_of_torch_with_a_comment(tmp_path: Path) -> None:
    tree = {"x": torch.arange(1000.0), "text": "ä"}
    plain, sealed = io.BytesIO(), tmp_path / "x.pt"
    torch.save(tree, plain)
    with sealed.open("wb") as stream:
        sealing = Sealing(stream)
        torch.save(tree, sealing)
        sealing.seal()
    content = sealed.read_bytes()
    assert content[: -SEAL - 2] == plain.getvalue()[:-2]
    with zipfile.ZipFile(sealed) as archive:
        assert archive.comment == content[-SEAL:]
    for mmap in (False, True):
        read = torch.load(sealed, weights_only=True, mmap=mmap)
        assert torch.equal(read["x"], tree["x"])
    assert written_checksum(sealed) == int(content[-8:], 16)
    copy = sealed.rename(tmp_path / "weights of another name")
    assert fault_of(copy) is None


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_however_it_is_cut_into_writes(size: int, tmp_path: Path) -> None:
    plain = io.BytesIO()
    torch.save(torch.arange(50), plain)
    content, found = plain.getvalue(), []
    for step in (size, len(content)):
        written = io.BytesIO()
        sealing = Sealing(written)
        for start in range(0, len(content), step):
            piece = content[start : start + step]
            assert sealing.write(memoryview(piece)) == len(piece)
            assert sealing.write(b"") == 0
        sealing.seal()
        found.append(written.getvalue())
    assert found[0] == found[1]


def test_files_without_a_seal(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    unsealed(path)
    assert written_checksum(path) is None
    assert fault_of(path) is None
    assert read_checkpoint(path)["step"] == 1
    content = path.read_bytes()
    for bit in (8 * place_of_weight(path) + 5, 8 * (len(content) - 22)):
        flip(path, bit)
        assert fault_of(path) is not None
        path.write_bytes(content)


def test_the_newest_that_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    paths = [save(folder, step) for step in (5, 10, 15, 20)]
    assert find_whole_checkpoint(tmp_path / "run") == (paths[3], [])
    flip(paths[3], 8 * 5000)
    paths[2].write_bytes(paths[2].read_bytes()[:6000])
    found, lines = find_whole_checkpoint(tmp_path)
    assert found == paths[1]
    assert lines[0].startswith(f"{paths[3]} is damaged: its checksum is ")
    assert lines[1] == (
        f"{paths[2]} is incomplete or damaged: its 6000 bytes do not end as a checkpoint does."
    )
    assert lines[2:] == ["Going on from the one before, step_0000010.pt."]
    assert find_checkpoint(folder) == paths[3]  # what was damaged is not passed over unasked
    for path in paths[:2]:
        flip(path, 8 * 3000)
    with pytest.raises(
        UserError, match=r"no checkpoint there is whole: .*_0000020\.pt is .*_0000005\.pt is "
    ):
        find_whole_checkpoint(folder)


@pytest.mark.parametrize("read", [read_checkpoint, load_trained, open_weights])
@pytest.mark.parametrize("how", ["bit", "cut", "empty", "bit, no seal"])
def test_whoever_reads_a_damaged_one_is_told_of_the_one_before(how: str, read: Any, tmp_path: Path) -> None:
    paths = [save(tmp_path / "checkpoints", step) for step in (5, 10, 15)]
    if how == "bit, no seal":
        unsealed(paths[2])
    content = paths[2].read_bytes()
    if how.startswith("bit"):
        flip(paths[2], 8 * place_of_weight(paths[2]) + 5)
    else:
        paths[2].write_bytes(content[: len(content) // 2 if how == "cut" else 0])
    with pytest.raises(UserError) as caught:
        read(tmp_path / "checkpoints" if how == "bit" else paths[2])
    text = str(caught.value)
    assert text.startswith(f"{paths[2]}: is ")
    assert "damaged: " in text
    assert text.endswith(f"; copy it again, or take the one before it, {paths[1]}, which is whole")
    flip(paths[1], 8 * 3000)
    paths[0].unlink()
    with pytest.raises(UserError, match="there is no whole one before it in its folder"):
        read(paths[2])


@pytest.mark.parametrize("read", [read_checkpoint, open_weights])
def test_one_that_is_not_there(read: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        read(tmp_path / "none" / "step_0000001.pt")


def test_a_moved_one_is_found_damaged_too(tmp_path: Path) -> None:
    moved = save(tmp_path, 5).rename(tmp_path / "mine.pt")
    assert read_checkpoint(moved)["step"] == 5
    flip(moved, 8 * place_of_weight(moved))
    with pytest.raises(UserError, match=r"mine\.pt: is damaged: its checksum is "):
        read_checkpoint(moved)


def test_so_is_one_that_no_longer_looks_like_ours(tmp_path: Path) -> None:
    moved = save(tmp_path, 5).rename(tmp_path / "mine.pt")
    flip(moved, 8 * moved.read_bytes().index(b"fastmrcnn checkpoint") + 3)
    with pytest.raises(UserError, match=r"mine\.pt: is damaged: its checksum is "):
        read_checkpoint(moved)
