"""How the processes of a run find each other, decide, and part."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pair import Pair

from fastmrcnn import group as module
from fastmrcnn import train
from fastmrcnn.config.file import parse_config
from fastmrcnn.errors import UserError, run_main
from fastmrcnn.group import ALONE, Group, Told, first_speaks, group_of_environment, joined
from fastmrcnn.structures import Batch
from fastmrcnn.training.restart import MARK, Launch, begun_before, launch_of_environment, mark
from fastmrcnn.training.sharing import own_device, share_of
from fastmrcnn.weights.checkpoint import LAST

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def together(act: str, *arguments: Any) -> Any:
    """One of the functions below, within a group, as a program of ours."""
    found: list[Any] = []

    def main(argv: list[str]) -> None:
        group = group_of_environment()
        with first_speaks(group), joined(group):
            found.append(globals()[act](group, *arguments))

    run_main(main)
    return found[0] if found else None


def test_the_environment_of_a_launcher() -> None:
    assert group_of_environment({}) == ALONE
    assert group_of_environment({"MASTER_ADDR": "a", "LOCAL_RANK": "2"}) == ALONE
    assert group_of_environment(TORCHRUN) == Group(3, 8, 1)
    pod = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}  # as Kubeflow's
    assert group_of_environment(pod) == Group(3, 8, 0)
    assert group_of_environment({"RANK": "0", "WORLD_SIZE": "1"}) == Group(0, 1, 0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"RANK": ""}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK .* are set, but RANK is not"),
        (
            {"MASTER_PORT": "", "MASTER_ADDR": ""},
            "but MASTER_ADDR, MASTER_PORT are not; start it with torchrun",
        ),
        ({"RANK": "x"}, "RANK=x: expected a number"),
        ({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
    ],
)
def test_half_an_environment(changes: dict[str, str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        group_of_environment({**TORCHRUN, **changes})


def test_alone_nothing_is_asked_of_others() -> None:
    with first_speaks(ALONE), joined(ALONE) as group:
        assert group.lead(lambda: 3) == group.each(lambda: 3) == 3
        assert group.gather("a") == ["a"]
        assert group.collect(iter("ab")) == [["a", "b"]]
        assert group.most([1, True]) == [1, 1]
        assert not torch.distributed.is_initialized()


def exchange(group: Group) -> list[Any]:
    large = os.urandom(5) * (module.PIECE // 3)  # more than a piece
    found = group.collect([f"{group.rank}", large, {}, ()])
    sizes = [[len(item) for item in items] for items in found]
    return [
        group.lead(lambda: os.getpid()),
        group.gather(group.rank),
        group.most([group.rank, -group.rank, 7]),
        sizes,
    ]


def test_what_processes_exchange(pair: Pair) -> None:
    first, second = (one.value for one in pair.call(together, "exchange"))
    assert first[:3] == second[:3] == [pair.pids[0], [0, 1], [1, 0, 7]]
    large = 5 * (module.PIECE // 3)
    assert first[3] == [[1, large, 0, 0]] * 2
    assert second[3] == [[], []]


def joined_before() -> Any:
    """As by Ray Train, which joins its workers to a group before it calls what they are to run."""
    torch.distributed.init_process_group("gloo")
    found = together("exchange")
    assert torch.distributed.is_initialized()  # its own to leave
    return found


def test_a_group_that_is_there_already(pair: Pair) -> None:
    first, second = pair.call(joined_before)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert first.value[:3] == second.value[:3] == [pair.pids[0], [0, 1], [1, 0, 7]]


def fail(group: Group, rank: int, how: str) -> None:
    def make() -> None:
        if group.rank == rank:
            raise UserError("no such file") if how != "bug" else KeyError("bug")

    if how == "lead":
        group.lead(make)
    elif how == "later":
        make()  # with no word to the others, which are in
        group.gather(1)
    else:
        group.each(make)


@pytest.mark.parametrize(
    ("rank", "how", "codes", "lines"),
    [
        (0, "lead", (2, 2), ("error: no such file", "")),
        (0, "each", (2, 2), ("error: no such file", "")),
        (1, "each", (2, 2), ("error: process 1: no such file", "")),
        (1, "bug", (2, 1), ("error: process 1: KeyError: 'bug'", "KeyError: 'bug'")),
        (1, "later", (2, 2), ("error: process 1: no such file", "error: process 1: no such file")),
        (0, "later", (2, 2), ("error: no such file", "error: process 1: process 0: no such file")),
    ],
)
def test_a_failure_of_one_ends_all(
    rank: int, how: str, codes: tuple[int, int], lines: tuple[str, str], pair: Pair
) -> None:
    ended = pair.call(together, "fail", rank, how)
    assert tuple(one.code for one in ended) == codes, ended
    assert tuple(one.last for one in ended) == lines, ended


class Compiler:
    """Of a step that has been warmed up for all but this shape on one process."""

    def __init__(self, new: bool) -> None:
        self.new, self.warmed = new, 0

    def is_new(self, batch: Batch) -> bool:
        return self.new

    def warm_up(self, batch: Batch, buckets: Sequence[tuple[int, int]]) -> None:
        self.warmed += 1


def prepare(group: Group) -> list[int]:
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.tensor([[32, 32]]))
    found = []
    for new_on in (None, 1):
        compiler: Any = Compiler(group.rank == new_on)
        train.prepare_shapes(compiler, batch, [(32, 32)], group, first=False)
        found.append(compiler.warmed)
    return found


def test_a_shape_that_is_new_to_one_is_compiled_by_all(pair: Pair) -> None:
    """What is compiled sums over all of them, so that none can do it by itself."""
    assert [one.value for one in pair.call(together, "prepare")] == [[0, 1], [0, 1]]


def part(group: Group, rank: int) -> None:
    if group.rank == rank:
        torch.distributed.destroy_process_group()  # as if it had been killed: no word, no connection
        raise Told(1)
    group.gather(1)


def test_a_process_that_has_gone_without_a_word(pair: Pair) -> None:
    first, _ = pair.call(together, "part", 1)
    assert first.code == 2
    assert first.last.startswith("error: another process of the run has ended without a word (")
    assert "Traceback" not in first.err


def lonely() -> None:
    from datetime import timedelta

    module.MEETING = timedelta(seconds=2)
    os.environ["WORLD_SIZE"] = "3"
    together("exchange")


def test_processes_that_do_not_all_come(pair: Pair) -> None:
    started = time.monotonic()
    for one in pair.call(lonely):
        assert one.code == 2
        assert "error: " in one.last
        assert "the 3 processes of the run did not find each other at 127.0.0.1:" in one.last
        assert "Traceback" not in one.err
    assert time.monotonic() - started < 60


def test_each_process_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cuda:1", ALONE) == "cuda:1"
    assert own_device("auto", ALONE) == "auto"
    assert [own_device("auto", Group(5, 8, local)) for local in (0, 1)] == ["cuda:0", "cuda:1"]
    assert own_device("cpu", Group(5, 8, 1)) == "cpu"
    with pytest.raises(UserError, match=r"runtime\.device=cuda:1 is one device"):
        own_device("cuda:1", Group(1, 2, 1))
    with pytest.raises(UserError, match=r"process 5 is number 2 on its machine, which has 2 GPUs"):
        own_device("auto", Group(5, 8, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6")  # a launcher that gives each process its own
    assert own_device("auto", Group(5, 8, 2)) == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto", Group(5, 8, 2)) == "auto"


def test_shares_of_a_batch() -> None:
    config = parse_config({"train": {"batch": 12, "accumulate": 2}}, "the test")
    assert share_of(config, Group(2, 3)) == (2, 3, 2)
    with pytest.raises(UserError, match=r"it can with 1, 2, 3, 6 processes"):
        share_of(config, Group(0, 4))


def test_a_launch_finds_its_own_run_again(tmp_path: Any) -> None:
    assert launch_of_environment({}) is None
    launch = launch_of_environment({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"})
    assert launch == Launch("a", 0)
    unnamed = launch_of_environment({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"})
    assert unnamed is not None
    assert f"process {os.getppid()} of " in unnamed.identity
    again = Launch("a", 1)
    assert begun_before(again, tmp_path / "none") is None
    for number, (name, saved) in enumerate([("a", True), ("a", True), ("b", True), ("a", False)]):
        run = tmp_path / f"run_{number}"
        (run / "checkpoints").mkdir(parents=True)
        mark(run, Launch(name, 0))
        os.utime(run / MARK, (number, number))
        if saved:
            (run / "checkpoints" / LAST).touch()
    assert begun_before(again, tmp_path) == tmp_path / "run_1"
    assert begun_before(Launch("a", 0), tmp_path) is None  # a first start begins anew
    assert begun_before(Launch("c", 1), tmp_path) is None
    mark(tmp_path / "run_0", None)
