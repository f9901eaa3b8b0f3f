"""What can go wrong with a run, all in a table. Here is what befalls its processes and its numbers."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from breaking import (
    EVERY,
    PLANTED,
    STEPS,
    NotTriedError,
    World,
    run_in,
    same_run,
    saved_step,
    steps_shown,
    temporary_files,
    trained_a_while,
    wait_for,
)
from fault_files import broken_images, flipped, full_disk, read_only_folder, truncated

from fastmrcnn.weights.checkpoint import read_checkpoint

Act = Callable[[World, int, random.Random], str]


class Fault(NamedTuple):
    """A row of the table."""

    words: str
    tries: int
    act: Act
    """Takes the world, how often to try, and where its moments come from; returns what was seen.
    AssertionError: something was lost."""


def killed(world: World, tries: int, draw: random.Random) -> str:
    """Every other time while a checkpoint is being written; else at any moment, starting up included."""
    run, output = None, world.new_output()
    amid, repeated, ends = 0, [], 0
    for number in range(tries):
        running = world.start(output) if run is None else world.resume(run)
        if number % 2:
            running.until(partial(temporary_files, output), pause=0)
            time.sleep(draw.uniform(0, 0.01))
        else:
            running.ends_within(draw.uniform(0, world.seconds))
        running.kill()
        amid += bool(temporary_files(output))
        run = next(iter(sorted(output.glob("run_*"))), None)
        saved = 0 if run is None else saved_step(run)
        repeated.append(max(0, steps_shown(running) - saved))
        if saved == 0:  # nothing to go on from
            run, output = None, world.new_output()
        elif saved == STEPS:
            same_run(world.whole, run)  # type: ignore[arg-type]
            ends += 1
            run, output = None, world.new_output()
    if run is not None:
        world.goes_on(run)
        ends += 1
    assert max(repeated) <= EVERY + 1, f"{max(repeated)} steps, of which one in {EVERY} was to be saved"
    return (
        f"{amid} of them amid the writing of a checkpoint; {ends} taken up until the end, the same bits; at "
        f"most {max(repeated)} steps made again, with a checkpoint every {EVERY}"
    )


def asked_to_stop(world: World, tries: int, draw: random.Random) -> str:
    kinds = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
    for number in range(tries):
        kind, expected = kinds[number % len(kinds)]
        output = world.new_output()
        running = trained_a_while(world, output, draw)
        os.kill(running.pid, kind)
        code = running.wait()
        assert code == expected, f"{kind.name} gave the exit code {code}: {running.last()}"
        run = run_in(output)
        saved = saved_step(run)
        assert f"go on from step_{saved:07d}.pt with: " in running.last(), running.last()
        assert steps_shown(running) <= saved, f"{steps_shown(running) - saved} steps after {kind.name}"
        world.goes_on(run)
    return "the step ended, saved, one line says how to go on; exit codes 143, 130, 129; the same bits"


def asked_twice(world: World, tries: int, draw: random.Random) -> str:
    for _ in range(tries):
        output = world.new_output()
        running = trained_a_while(world, output, draw)
        began = time.monotonic()
        os.kill(running.pid, signal.SIGTERM)
        time.sleep(0.02)
        with_second = running.process.poll() is None
        if with_second:
            os.kill(running.pid, signal.SIGTERM)
        code = running.wait()
        waited = time.monotonic() - began
        # The second may come when the first has been answered and nobody listens. A shell says 143 of both.
        assert code in (143, -signal.SIGTERM), f"the exit code was {code}: {running.last()}"
        assert waited < 30, f"it took {waited:.0f} s"
        world.goes_on(run_in(output))
    return "stopped at once, exit code 143; the last checkpoint is whole, the same bits"


def asked_to_save(world: World, tries: int, draw: random.Random) -> str:
    for _ in range(tries):
        output = world.new_output()
        running = trained_a_while(world, output, draw)
        os.kill(running.pid, signal.SIGUSR1)
        code = running.wait()
        assert code == 0, f"the exit code was {code}: {running.last()}"
        assert "saved, as SIGUSR1 asked: " in running.text(), "nothing was saved"
        same_run(world.whole, run_in(output))
    return "saved and went on, the same bits"


def worker_killed(world: World, tries: int, draw: random.Random) -> str:
    for _ in range(tries):
        output = world.new_output()
        running = trained_a_while(world, output, draw, "data.workers=2", wait=0.3)
        children = running.children()
        if not children:
            running.kill()
            raise NotTriedError("loader processes are not found")
        os.kill(draw.choice(children), signal.SIGKILL)
        code = running.wait()
        assert code == 2, f"the exit code was {code}: {running.last()}"
        assert "a loader process died" in running.last(), running.last()
        assert "go on from step_" in running.last(), running.last()
        world.goes_on(run_in(output))
    return "one line, the step saved; the same bits"


def mistake(world: World, tries: int, draw: random.Random) -> str:
    for number in range(tries):
        output, step = world.new_output(), draw.randrange(3, STEPS - 1)
        running = world.start(output, launcher=["-c", PLANTED, ("step", "loader")[number % 2], str(step)])
        code = running.wait()
        assert code == 1, f"the exit code was {code}: {running.last()}"
        assert "a mistake that was planted" in running.last(), running.last()
        saved = saved_step(run_in(output))
        assert saved == step, f"saved {saved} of {step} steps"
        world.goes_on(run_in(output))
    return "saved, then the traceback, exit code 1; the same bits"


def bad_loss(world: World, tries: int, draw: random.Random) -> str:
    """By a rate that no network survives."""
    named = ""
    for _ in range(tries):
        output = world.new_output()
        rate = draw.uniform(1, 9) * 1e6
        changes = [f"optim.lr={rate}", "optim.clip_norm=null", "optim.name=sgd", "train.checkpoint_every=100"]
        running = world.start(output, *changes)
        code = running.wait()
        assert code == 2, f"the exit code was {code}: {running.last()}"
        found = re.search(r"not finite at step (\d+) ", running.last())
        assert found, running.last()
        run = run_in(output)
        state = read_checkpoint(run)
        assert state["step"] == int(found[1]), "the weights are not those before the step"
        weights = (value for value in state["model"].values() if value.is_floating_point())
        assert all(bool(value.isfinite().all()) for value in weights), (
            "weights that are not finite were saved"
        )
        assert state["extra"]["bad_step"] == {"seed": 0, "step": state["step"]}, "the batch was not saved"
        running = world.resume(run, "--replay", found[1])
        code = running.wait()
        said = " ".join(running.text().split())
        assert code == 0, f"--replay ended with {code}: {running.last()}"
        named = next(iter(re.findall(r"it began with (\S+)|(Every gradient is finite)", said)), ("", ""))
        assert any(named), said
    return f"the weights before it saved; --replay goes wrong again and names it ({''.join(named)})"


def rank_killed(world: World, tries: int, draw: random.Random) -> str:
    """Of two that train together under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "fastmrcnn.train"]
    whole = world.undisturbed(launcher=launcher)
    for _ in range(tries):
        output = world.new_output()
        running = world.start(output, launcher=launcher)
        wait_for(world, running, output, draw)
        ranks = running.children()
        assert len(ranks) >= 2, f"torchrun has {len(ranks)} processes"
        os.kill(draw.choice(ranks), signal.SIGKILL)
        code = running.wait()
        assert code != 0, "torchrun took no notice"
        run = run_in(output)
        assert saved_step(run) > 0, "no checkpoint is left"
        assert not temporary_files(output), "half a file is left"
        world.goes_on(run, whole, launcher)
    return "the others ended, the last checkpoint whole; the same bits"


def out_of_memory(world: World, tries: int, draw: random.Random) -> str:
    """What is said of it rests on measured numbers, which tests/training/test_fit.py makes up."""
    if not torch.cuda.is_available():
        raise NotTriedError("there is no GPU")
    for _ in range(tries):
        output = world.new_output()
        changes = ["runtime.device=cuda", "data.short_side=[1600]", "data.long_side_max=1600"]
        running = world.start(output, *changes, "train.batch=4096")
        code = running.wait()
        assert code == 2, f"the exit code was {code}: {running.last()}"
        assert re.search(r"train\.batch=\d+ fits", running.last()), running.last()
    return "one line before the first step says which batch fits"


FAULTS: dict[str, Fault] = {
    "killed": Fault("kill -9 at random moments", 20, killed),
    "truncated": Fault("the newest checkpoint truncated", 3, truncated),
    "flipped": Fault("one bit of the newest checkpoint flipped", 3, flipped),
    "stopped": Fault("SIGTERM, Ctrl-C, SIGHUP", 3, asked_to_stop),
    "stopped-twice": Fault("a second SIGTERM", 2, asked_twice),
    "asked-to-save": Fault("SIGUSR1", 2, asked_to_save),
    "worker": Fault("a loader process killed", 2, worker_killed),
    "rank": Fault("one of two processes under torchrun killed", 2, rank_killed),
    "full-disk": Fault("a full disk", 2, full_disk),
    "read-only": Fault("a read-only output folder", 2, read_only_folder),
    "broken-images": Fault("images that cannot be read", 1, broken_images),
    "mistake": Fault("any other error in a step or in the loader", 2, mistake),
    "bad-loss": Fault("a loss that is not finite", 2, bad_loss),
    "out-of-memory": Fault("out of memory on a GPU", 1, out_of_memory),
}
