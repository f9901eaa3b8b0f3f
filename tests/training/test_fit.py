"""What fits into a memory, found with a stand-in for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import TinyData, assert_same_state, newest_run, record, refusal

from fastmrcnn.config.file import load_config
from fastmrcnn.data.transforms import Size
from fastmrcnn.errors import UserError
from fastmrcnn.group import Group
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.training import fit
from fastmrcnn.training.fit import Advice, Trials, advise, largest_fit, memory_line, settled_batch
from fastmrcnn.training.run import prepare_run
from fastmrcnn.weights.checkpoint import read_checkpoint

GB = 2**30


def memory(
    fixed: float, each: Callable[[int], float], capacity: float, tried: list[int]
) -> Callable[[int], int | None]:
    """Gibibytes of a step with n images."""

    def measure(images: int) -> int | None:
        tried.append(images)
        taken = fixed + each(images)
        return None if taken > capacity else int(taken * GB)

    return measure


@pytest.mark.parametrize(
    "each",
    [
        pytest.param(lambda n: 1.37 * n, id="linear"),
        pytest.param(lambda n: 1.37 * n + 0.002 * n**1.5, id="a little more"),
        pytest.param(lambda n: 1.37 * n**0.95, id="a little less"),
        pytest.param(lambda n: -(-1.37 * n // 2) * 2, id="in blocks of 2"),
        pytest.param(lambda n: 8 if n < 20 else 60, id="a step"),
        pytest.param(lambda n: 1.37 * n + random.Random(n).uniform(0, 0.4), id="noise"),
    ],
)
@pytest.mark.parametrize("limit", [2.0, 4.1, 22.0, 75.0, 140.0])
@pytest.mark.parametrize("most", [1, 7, 2000])
def test_the_largest_is_found(each: Callable[[int], float], limit: float, most: int) -> None:
    tried: list[int] = []
    found = largest_fit(memory(2.5, each, limit + 3, tried), int(limit * GB), most)
    brute = max((n for n in range(1, most + 1) if 2.5 + each(n) <= limit), default=0)
    assert found.images == brute
    assert len(tried) <= 20
    assert len(set(tried)) == len(tried)
    assert max(found.taken, default=0) == brute
    assert brute == most or brute + 1 in tried  # it is not claimed unseen


def test_a_line_needs_few_trials() -> None:
    tried: list[int] = []
    assert largest_fit(memory(2.5, lambda n: 1.37 * n, 80, tried), 75 * GB, 10_000).images == 52
    assert tried == [1, 2, 52, 53]


def taking(each: float, capacity: float, fixed: float = 2.0) -> Callable[[int, Size], int | None]:
    """Gibibytes for 800x1344, in proportion to the pixels."""

    def measure(images: int, shape: Size) -> int | None:
        taken = fixed + each * images * shape[0] * shape[1] / (800 * 1344)
        return None if taken > capacity else int(taken * GB)

    return measure


SHAPE = (800, 1344)


def test_advice_on_the_batch() -> None:
    advice = advise(taking(1.5, 24), 16, SHAPE, 24 * GB)
    assert advice.images == 14  # 2 + 14 * 1.5 = 23
    assert advice.measured == [(1, SHAPE, int(3.5 * GB)), (2, SHAPE, 5 * GB)]
    line = memory_line(load_config(), advice, 16, SHAPE, 24 * GB)
    assert line == (
        "the GPU's memory is full with 16 images of 800x1344; lower train.batch to 14, or keep the batch "
        "with train.accumulate=2: 1 of 800x1344 takes 3.5 and 2 of 800x1344 take 5.0 of 24.0 GiB"
    )
    assert advise(taking(11, 24), 2, SHAPE, 24 * GB).images == 1
    assert advise(taking(12, 24), 16, SHAPE, 24 * GB).images == 1
    # By two images 16 would fit, and did not.
    assert advise(taking(0.1, 24), 16, SHAPE, 24 * GB).images == 15
    passes = load_config(overrides=["train.batch=32", "train.accumulate=2"])
    assert "lower train.batch to 28, or keep the batch with train.accumulate=4: " in memory_line(
        passes, advice, 16, SHAPE, 24 * GB
    )


def test_advice_on_the_sides() -> None:
    advice = advise(taking(30, 24), 16, SHAPE, 24 * GB)
    assert advice.images is None
    assert advice.scale is not None
    assert 2 + 30 * advice.scale**2 == pytest.approx(24, rel=0.01)
    assert [entry[:2] for entry in advice.measured] == [(1, (384, 672)), (1, (192, 320))]
    line = memory_line(load_config(), advice, 16, SHAPE, 24 * GB)
    assert (
        "train.batch=1 included; lower data.short_side to [685] and data.long_side_max to 1141: 1 of " in line
    )
    nothing = advise(taking(30, 24, fixed=30), 1, SHAPE, 24 * GB)
    assert nothing == Advice(None, None, [])
    assert "take a smaller model.backbone" in memory_line(load_config(), nothing, 1, SHAPE, 24 * GB)


class Card:
    """A GPU of so many pixels of a batch; a step takes its pixels, and its weights once."""

    held = 0.0

    def __init__(self, limit: int) -> None:
        self.limit, self.most = limit, 0

    def fresh(self) -> int:
        self.most = 0
        return 0

    def peak(self) -> int:
        return self.most


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Put in a card of so many images of 64x64; what is returned gets the images of each forward pass."""

    def put_in(images: float) -> list[int]:
        device = Card(int(images * 64 * 64))
        real = MaskRCNN.forward
        seen: list[int] = []

        def forward(model: MaskRCNN, batch: Any, *others: Any) -> Any:
            taken = batch.pixels[:, 0].numel()
            seen.append(len(batch.pixels))
            if taken > device.limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            device.most = max(device.most, taken)
            return real(model, batch, *others)

        monkeypatch.setattr(MaskRCNN, "forward", forward)
        monkeypatch.setattr(fit, "meter_of", lambda _: device)
        return seen

    return put_in


def test_what_others_hold_is_not_charged_to_a_step() -> None:
    class Held(Card):
        def fresh(self) -> int:
            return 4 * 6 + 1000

        def peak(self) -> int:
            return self.most + 1000

    class Step:
        def warm_up(self, batch: list[int], shapes: list[Size]) -> None:
            if len(shapes) > 2:
                raise torch.OutOfMemoryError
            card.most = 4 * 6 + 10 * batch[0] * len(shapes)

    card = Held(10_000)
    make_step: Any = Step
    batch_of: Any = lambda images: [images]  # noqa: E731
    model: Any = torch.nn.Linear(2, 2)
    trials = Trials(model, make_step, batch_of, card)
    assert trials(3, SHAPE) == 24 + 30
    assert trials(3, SHAPE, SHAPE) == 24 + 60
    assert trials(3, SHAPE, SHAPE, SHAPE) is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("fit"))


def test_auto_is_the_number_that_was_found(
    data: TinyData,
    tmp_path: Path,
    card: Callable[[float], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = data.run(tmp_path / "given", "train.batch=5")
    seen = card(5)
    found = data.run(tmp_path / "auto", "train.batch=auto")
    said = capsys.readouterr().out
    assert "train.batch=auto: 5 images a step. 5 of 64x64 take 0.0 of 0.0 GiB; one more does not fit." in said
    assert seen[:5] == [1, 2, 5, 6, 5]
    assert yaml.safe_load((found / "config.yaml").read_text())["train"]["batch"] == 5
    states = [read_checkpoint(run) for run in (given, found)]
    assert states[1]["config"]["train"]["batch"] == 5
    assert_same_state(*states)  # trials leave no trace, and the rate follows the batch
    assert record(given) == record(found)


def test_auto_is_no_more_than_the_set(
    data: TinyData, tmp_path: Path, card: Callable[[float], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    card(1000)
    data.run(tmp_path, "train.batch=auto", "train.steps=1")
    said = capsys.readouterr().out
    assert "6 images a step. 6 of 64x64 take 0.0 of 0.0 GiB; as many as the set has." in said


class Two(Group):
    """This process and another one, in which less fits."""

    def each(self, make: Callable[[], Any]) -> Any:
        return make()

    def most(self, numbers: Any) -> list[int]:
        assert numbers == [-5]
        return [-3]


def test_several_processes_take_what_fits_all(
    data: TinyData, tmp_path: Path, card: Callable[[float], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*data.train, f"output={tmp_path}", "train.batch=auto", "train.accumulate=2"]
    config = load_config(data.recipe, arguments)
    config, _, train_set, _ = prepare_run(config, None)
    model = build_model(config.model, len(train_set.class_names))
    gradients = 4 * sum(p.numel() for p in model.parameters())
    card(5 + gradients / 64**2)  # each has room for the gradients that travel
    assert settled_batch(config, train_set, Two(0, 2)).train.batch == 3 * 2 * 2
    assert "train.batch=auto: 12 images a step, 3 to a pass of a process. 5 of " in capsys.readouterr().out


def test_not_even_one(data: TinyData, tmp_path: Path, card: Callable[[float], list[int]]) -> None:
    card(0)
    with pytest.raises(UserError, match="is full with 1 image of 64x64, and even with one at a quarter"):
        data.run(tmp_path, "train.batch=auto")
    assert not list(tmp_path.iterdir())


def test_a_warm_up_for_which_there_is_no_room(
    data: TinyData, tmp_path: Path, card: Callable[[float], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are compiled are warmed up; here by a compiler that compiles nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    seen = card(4)
    with pytest.raises(UserError) as caught:
        data.run(tmp_path, "train.batch=6", "train.compile=on")
    assert str(caught.value).startswith(
        "the GPU's memory is full with 6 images of 64x64; lower train.batch to 4, or keep the batch with "
        "train.accumulate=2: 1 of 64x64 takes 0.0 and 2 of 64x64 take 0.0 of "
    )
    assert seen == [6, 1, 2]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    data.run(tmp_path, "train.batch=4", "train.compile=on")


def test_on_a_cpu(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ([], ["--dry-run"]):
        line = refusal([*data.arguments(tmp_path, "train.batch=auto"), *more], capsys, monkeypatch)
        assert line == (
            "error: train.batch=auto measures a GPU's memory, and this run is on cpu; give a number, such as "
            "train.batch=2"
        )
    assert not newest_runs(tmp_path)


def newest_runs(folder: Path) -> list[Path]:
    return [newest_run(folder)] if any(folder.glob("run_*")) else []


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "none", "many", "[2]", ".inf", ".nan"])
def test_what_is_no_batch(value: str) -> None:
    with pytest.raises(UserError, match=r"train\.batch: expected a whole number above 0, or auto"):
        load_config(overrides=[f"train.batch={value}"])
    assert load_config(overrides=["train.batch=auto"]).train.batch == "auto"
    assert load_config(overrides=["train.batch=4"]).train.images == 4
