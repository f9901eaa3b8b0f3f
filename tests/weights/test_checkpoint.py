"""Checkpoints: whole or not there, safe to read, and enough by themselves. And the run's folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastmrcnn import files as output
from fastmrcnn.config.file import load_config
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.training.optim import Ema, GatedStep, build_optimizer
from fastmrcnn.weights import checkpoint as checkpoints
from fastmrcnn.weights.card import ModelCard, read_card
from fastmrcnn.weights.checkpoint import find_checkpoint, read_checkpoint, restore, save_checkpoint
from fastmrcnn.weights.trained import load_trained

CONFIG = load_config(
    overrides=[
        "model.backbone.name=resnet18",
        "model.backbone.width=8",
        "model.backbone.norm=bn",
        "model.backbone.frozen_stages=0",
        "model.fpn.channels=8",
        "model.box_head.hidden=8",
        "model.mask_head.channels=8",
        "model.mask_head.convs=1",
        "optim.lr=1e-3",
    ]
)
CARD = ModelCard(CONFIG, ["cat", "dög"], [3, 90])


class Run:
    """What a checkpoint holds, after some made-up updates."""

    def __init__(self, seed: int, card: ModelCard = CARD, momentum: float = 0.9) -> None:
        torch.manual_seed(seed)
        self.model = build_model(card.config.model, len(card.class_names))
        optim = card.config.optim.model_copy(update={"momentum": momentum})
        self.optimizer = build_optimizer(self.model, optim)
        self.update = GatedStep(self.model, self.optimizer, loss_scale=2.0**10)
        self.ema = Ema(self.model, 0.9)

    def step(self, steps: int = 1) -> Run:
        for number in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"].fill_(0.1)
            loss = torch.stack([p.square().mean() for p in self.model.parameters()]).sum()
            self.update.before_forward()
            self.update.backward(loss, number)
            self.ema.update(number)
        return self

    def save(self, folder: Path, step: int = 1, **changes: Any) -> Path:
        arguments: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scaler": self.update,
            "ema": self.ema.model,
            "card": CARD,
            "keep": 3,
        }
        return save_checkpoint(folder, step=step, **(arguments | changes))

    def tensors(self) -> dict[str, torch.Tensor]:
        found = dict(self.model.state_dict())
        found |= {f"ema.{key}": value for key, value in self.ema.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        return found | self.update.state_dict()


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(0).step(2)


def error_of(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_and_contents(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path / "checkpoints", step=100, extra={"best": 0.5, "list": [1, None, "x"]})
    assert path == tmp_path / "checkpoints" / "step_0000100.pt"
    assert (tmp_path / "checkpoints" / "last_checkpoint").read_text() == "step_0000100.pt\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["last_checkpoint", "step_0000100.pt"]
    raw = torch.load(path, weights_only=True)
    assert raw["format_version"] == checkpoints.FORMAT_VERSION
    assert raw["step"] == 100
    assert raw["config"] == CONFIG.model_dump(mode="json")
    assert (raw["class_names"], raw["category_ids"]) == (["cat", "dög"], [3, 90])
    assert raw["torch_version"] == torch.__version__
    assert raw["extra"] == {"best": 0.5, "list": [1, None, "x"]}
    assert raw["scaler"].keys() == {"scale", "good_steps"}


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/last_checkpoint_file"])
def test_path_may_be_a_run_a_folder_or_a_file(run: Run, tmp_path: Path, place: str) -> None:
    path = run.save(tmp_path / "checkpoints", step=5)
    asked = path if place.endswith("file") else tmp_path / place
    assert find_checkpoint(asked) == path
    assert read_checkpoint(str(asked))["step"] == 5


def test_a_folder_of_runs_means_the_run_that_saved_last(run: Run, tmp_path: Path) -> None:
    small = {"model": nn.Linear(1, 1), "ema": None}
    paths = [run.save(tmp_path / f"run_00{n}" / "checkpoints", step=n, **small) for n in (1, 2, 3)]
    (tmp_path / "run_004").mkdir()
    for age, path in zip((3, 1, 2), paths, strict=True):
        os.utime(path.parent / "last_checkpoint", (1000 - age, 1000 - age))
    assert find_checkpoint(tmp_path) == paths[1]


def test_old_ones_are_removed_and_later_ones_are_not(run: Run, tmp_path: Path) -> None:
    small = {"model": nn.Linear(1, 1), "ema": None}
    for step in (10, 20, 9_999_999, 30, 40):
        run.save(tmp_path, step=step, keep=2, **small)
    (tmp_path / "step_notes.pt").touch()
    run.save(tmp_path, step=50, keep=2, **small)
    names = ["last_checkpoint", "step_0000040.pt", "step_0000050.pt", "step_9999999.pt", "step_notes.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert find_checkpoint(tmp_path).name == "step_0000050.pt"


def test_a_run_goes_on_with_the_same_bits(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path, step=2)
    there = Run(0).step(2).step(3)
    back = Run(1)
    assert restore(read_checkpoint(tmp_path), back.model, back.optimizer, back.update, back.ema.model) == 2
    for key, value in run.tensors().items():
        assert torch.equal(value, back.tensors()[key]), key
    back.step(3)
    for key, value in there.tensors().items():
        assert torch.equal(value, back.tensors()[key]), key


def test_options_of_the_optimizer_come_from_the_configuration(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path)
    back = Run(1, momentum=0.5)
    rates = [group["lr"] for group in back.optimizer.param_groups]
    restore(read_checkpoint(tmp_path), back.model, back.optimizer, back.update, back.ema.model)
    for group, rate in zip(back.optimizer.param_groups, rates, strict=True):
        assert group["momentum"] == 0.5
        assert group["lr"] is rate


def test_state_of_another_device_takes_the_weights_memory_format(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path)
    back = Run(1)
    back.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    restore(read_checkpoint(tmp_path), back.model, back.optimizer, back.update, back.ema.model)
    moments = {
        p: back.optimizer.state[p]["momentum_buffer"] for p in back.model.parameters() if p.requires_grad
    }
    assert any(p.stride() != p.contiguous().stride() for p in moments)
    assert all(p.stride() == moment.stride() for p, moment in moments.items())
    for mine, theirs in zip(run.optimizer.state.values(), back.optimizer.state.values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


def test_an_average_that_is_new_starts_from_the_weights(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path, ema=None, scaler=None)
    back = Run(1)
    restore(read_checkpoint(tmp_path), back.model, back.optimizer, back.update, back.ema.model)
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, back.ema.model.state_dict()[key])
    assert back.update.scale == 2.0**10


def test_state_of_another_optimizer(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path)
    state, model = read_checkpoint(tmp_path), Run(1).model
    adamw = build_optimizer(model, CONFIG.optim.model_copy(update={"name": "adamw"}))
    assert "does not fit optim.name" in error_of(lambda: restore(state, model, adamw))
    model.backbone.requires_grad_(False)
    fewer = build_optimizer(model, CONFIG.optim)
    assert "optimizer state does not fit" in error_of(lambda: restore(state, model, fewer))


def test_load_gives_a_model_that_detects_and_knows_its_classes(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path)
    for device in ("auto", "cpu", torch.device("cpu")):
        trained = load_trained(path, device)
        model = trained.model
        assert isinstance(model, MaskRCNN)
        assert not any(module.training for module in model.modules())
        assert trained.card == CARD
    for key, value in run.ema.model.state_dict().items():
        assert torch.equal(value.cpu(), model.state_dict()[key]), key
    assert not torch.equal(model.backbone.conv1.weight, run.model.backbone.conv1.weight)

    plain = load_trained(run.save(tmp_path, step=2, ema=None), "cpu").model
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


def test_load_does_not_fetch_backbone_weights(run: Run, tmp_path: Path) -> None:
    named = CONFIG.model_dump()
    named["model"]["backbone"]["weights"] = str(tmp_path / "none.pth")
    card = ModelCard(type(CONFIG).model_validate(named), ["cat", "dog"], [1, 2])
    assert load_trained(run.save(tmp_path, card=card), "cpu").card == card


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_no_such_device(run: Run, tmp_path: Path, device: str) -> None:
    assert device in error_of(lambda: load_trained(run.save(tmp_path), device))


def test_weights_that_do_not_fit_are_listed(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path, ema=None, card=ModelCard(CONFIG, ["one"], [1]))
    text = error_of(lambda: load_trained(path, "cpu"))
    assert text.startswith(f"{path}: does not fit the model: of another shape (")
    assert "in the file" in text


def test_configuration_that_is_not_valid_here(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path)
    tree = torch.load(path, weights_only=True)
    tree["config"]["train"]["stpes"] = 1
    text = error_of(lambda: read_card(tree, path))
    assert str(path) in text
    assert "did you mean 'train.steps'" in text


def test_missing(tmp_path: Path) -> None:
    assert "no such checkpoint" in error_of(lambda: read_checkpoint(tmp_path / "none"))
    assert "holds no last_checkpoint" in error_of(lambda: read_checkpoint(tmp_path))
    (tmp_path / "step_0000007.pt").touch()
    for name in ("step_0000009.pt", "../x.pt", ""):
        (tmp_path / "last_checkpoint").write_text(name)
        text = error_of(lambda: read_checkpoint(tmp_path))
        assert f"names '{name}'" in text
        assert "step_0000007.pt" in text


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated(run: Run, tmp_path: Path, share: float) -> None:
    path = run.save(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert error_of(lambda: read_checkpoint(path)).startswith(f"{path}: is incomplete or damaged")


def test_not_ours_newer_or_not_whole(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for foreign in ({"model": {}}, [1], torch.zeros(2), {"format": "other"}):
        torch.save(foreign, path)
        assert "is not a fastmrcnn checkpoint" in error_of(lambda: read_checkpoint(path))
    tree = torch.load(run.save(tmp_path), weights_only=True)
    torch.save(tree | {"format_version": 99, "fastmrcnn_version": "9.9"}, path)
    text = error_of(lambda: read_checkpoint(path))
    assert "format 99, written by fastmrcnn 9.9" in text
    assert "upgrade" in text
    del tree["ema"], tree["category_ids"]
    torch.save(tree, path)
    assert "lacks ema, category_ids" in error_of(lambda: read_checkpoint(path))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def test_code_in_a_checkpoint_does_not_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = run.save(tmp_path)
    tree = torch.load(path, weights_only=True)
    torch.save(tree | {"extra": Evil()}, path)
    assert "holds pickled code" in error_of(lambda: read_checkpoint(path))
    assert not (tmp_path / "ran").exists()


def test_what_could_not_be_read_back_is_not_written(run: Run, tmp_path: Path) -> None:
    for value in (Evil(), {1, 2}, tmp_path, CARD):
        with pytest.raises(TypeError, match=r"extra.*'x'.*cannot carry"):
            run.save(tmp_path / "new", extra={"x": [value]})
    assert not (tmp_path / "new").exists()


def test_full_disk_leaves_the_last_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run.save(tmp_path, step=1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real = torch.save

    def save(tree: Any, stream: Any) -> None:
        class Full:
            left = 5000

            def write(self, data: Any) -> int:
                self.left -= len(data)
                if self.left < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return int(stream.write(data))

            def flush(self) -> None: ...

        real(tree, Full())  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "save", save)
    text = error_of(lambda: run.save(tmp_path, step=2, keep=1))
    assert text == f"{tmp_path / 'step_0000002.pt'}: cannot be written (No space left on device)"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert find_checkpoint(tmp_path) == first


KILLED = """
import os, sys, torch
from fastmrcnn.config.schema import Config
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import save_checkpoint
replace = os.replace

def save_and_die(folder, last_words):
    def stop(source, target):
        if str(target).endswith(last_words):
            os.kill(os.getpid(), 9)
        replace(source, target)
    os.replace = stop
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    card = ModelCard(Config(), ["a"], [1])
    save_checkpoint(folder, step=2, model=model, optimizer=optimizer, card=card, keep=1)

for folder, last_words in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if child == 0:
        save_and_die(folder, last_words)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
"""


def test_a_killed_save_leaves_the_last_one(run: Run, tmp_path: Path) -> None:
    """Processes die in the middle of their second save; the first is what is found."""
    moments = {"early": "step_0000002.pt", "late": "last_checkpoint"}  # what was about to be renamed
    first = {name: run.save(tmp_path / name, step=1) for name in moments}
    arguments = [text for name, what in moments.items() for text in (str(tmp_path / name), what)]
    root = Path(checkpoints.__file__).parents[1]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True, cwd=root)
    for name, what in moments.items():
        folder = tmp_path / name
        assert find_checkpoint(folder) == first[name]
        assert read_checkpoint(folder)["step"] == 1
        assert [p.name.startswith(f".{what}") for p in folder.iterdir() if p.suffix == ".tmp"] == [True]
        run.save(folder, step=3, keep=1)
        assert sorted(p.name for p in folder.iterdir()) == ["last_checkpoint", "step_0000003.pt"]


def test_run_folders_are_new_each_time(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    assert [output.new_run_folder(root).name for _ in range(3)] == ["run_001", "run_002", "run_003"]
    (root / "run_041").mkdir()
    (root / "run_007x").mkdir()
    (root / "run_050").touch()  # a file takes its number too
    assert output.new_run_folder(root).name == "run_051"
    assert output.new_run_folder(root, "demo").name == "demo_001"


def test_run_folders_that_start_together_are_different(tmp_path: Path) -> None:
    folders: list[Path] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        folders.extend(output.new_run_folder(tmp_path) for _ in range(20))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == len(folders) == 160


def test_run_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "must name a folder" in error_of(lambda: output.new_run_folder(tmp_path / "file"))
    assert "cannot hold a run" in error_of(lambda: output.new_run_folder(tmp_path / "file" / "x"))


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    output.write_json(path, {"ä": [1, 2.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        output.write_json(path, [float("nan")])

    def fail() -> None:
        with output.replacing(path) as stream:
            stream.write(b"half")
            raise KeyError("in between")

    with pytest.raises(KeyError):
        fail()
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, 2.5, None]}
    output.write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "none" / "x.txt"
    text = error_of(lambda: output.write_text(path, "x"))
    assert text == f"{path}: cannot be written (No such file or directory)"
