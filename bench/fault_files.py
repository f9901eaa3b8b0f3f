"""What can go wrong with the files of a run. Each function makes it go wrong and judges what is left."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable

from breaking import (
    World,
    read_only,
    run_in,
    saved_step,
    small_disk,
    temporary_files,
    trained_a_while,
    wait_for,
)
from PIL import Image

from fastmrcnn.weights.checkpoint import find_checkpoint
from fastmrcnn.weights.seal import fault_of


def truncated(world: World, tries: int, draw: random.Random) -> str:
    def damage(content: bytearray) -> bytearray:
        return content[: draw.randrange(len(content))]

    return _damaged(world, tries, damage)


def flipped(world: World, tries: int, draw: random.Random) -> str:
    def damage(content: bytearray) -> bytearray:
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        return content

    return _damaged(world, tries, damage)


def _damaged(world: World, tries: int, damage: Callable[[bytearray], bytearray], looks: int = 50) -> str:
    """Damage the newest checkpoint: look at it often, and go on from it a few times."""
    newest = find_checkpoint(world.whole)
    content = newest.read_bytes()
    copy = world.root / newest.name
    for number in range(looks):
        copy.write_bytes(damage(bytearray(content)))
        assert fault_of(copy) is not None, f"damage number {number} was not seen"
    for _ in range(tries):
        run = world.copy(world.whole)
        find_checkpoint(run).write_bytes(damage(bytearray(content)))
        said = world.goes_on(run)
        assert f"{newest.name} is " in said, "the damage was not said"
        assert "Going on from the one before, " in said, "the one before was not named"
    return f"seen {looks} of {looks} times; the run went on from the one before and said so, the same bits"


def full_disk(world: World, tries: int, draw: random.Random) -> str:
    size = find_checkpoint(world.whole).stat().st_size
    for _ in range(tries):
        output = world.new_output()
        with small_disk(output, int(draw.uniform(1.2, 2.9) * size)) as enlarge:
            running = world.start(output)
            code = running.wait()
            assert code == 2, f"the exit code was {code}: {running.last()}"
            assert "No space left on device" in running.last(), running.last()
            run = run_in(output)
            saved = saved_step(run)
            assert saved > 0, "no checkpoint is left"
            assert f"go on from step_{saved:07d}.pt" in running.last(), running.last()
            assert not temporary_files(output), "half a file is left"
            enlarge(16 * size)
            world.goes_on(run)
    return "one line with the last good checkpoint, no half file; with more room the same bits"


def read_only_folder(world: World, tries: int, draw: random.Random) -> str:
    for _ in range(tries):
        output = world.new_output()
        output.mkdir()
        with read_only(output):
            running = world.start(output)
            code = running.wait()
        assert code == 2, f"the exit code was {code}: {running.last()}"
        assert "cannot hold a run" in running.last(), running.last()
        assert not list(output.iterdir()), "something was written"
        running = trained_a_while(world, output, draw)
        run = run_in(output)
        with read_only(run / "checkpoints"):
            saved = saved_step(run)
            code = running.wait()
            assert code == 2, f"the exit code was {code}: {running.last()}"
            assert "cannot be written" in running.last(), running.last()
            assert f"go on from step_{saved:07d}.pt" in running.last(), running.last()
        world.goes_on(run)
        # What was half written when the folder was closed could not be taken out before.
        assert not temporary_files(output), "half a file is left"
    return "one line before the first step, or with the last good checkpoint; the same bits"


def broken_images(world: World, tries: int, draw: random.Random) -> str:
    """Of one that cannot be decoded: with others in its place, and more of them than may be."""
    for _ in range(tries):
        data = world.new_output()
        shutil.copytree(world.root / "data", data)
        annotations = data / "train.json"
        tree = json.loads(annotations.read_text(encoding="utf-8"))
        for entry in draw.sample(tree["images"], 2):  # JPEG, of which only the header is read beforehand
            path = data / "train" / entry["file_name"]
            entry["file_name"] = f"{path.stem}.jpg"
            noise = Image.effect_noise((entry["width"], entry["height"]), 50).convert("RGB")
            noise.save(path.with_suffix(".jpg"), quality=95)
            content = path.with_suffix(".jpg").read_bytes()
            path.with_suffix(".jpg").write_bytes(content[: len(content) * 2 // 3])
        annotations.write_text(json.dumps(tree), encoding="utf-8")
        outputs = [world.new_output() for _ in range(3)]
        running = world.start(outputs[0], "data.max_broken=0.2", data=data)
        code = running.wait()
        assert code == 0, f"the exit code was {code}: {running.last()}"
        assert "2 training images could not be read and did not count:" in running.text(), (
            "they are not listed"
        )
        running = world.start(outputs[1], "data.max_broken=0.2", "data.workers=1", data=data)
        wait_for(world, running, outputs[1], draw)
        os.kill(running.pid, signal.SIGTERM)
        running.wait()
        world.goes_on(run_in(outputs[1]), run_in(outputs[0]))
        running = world.start(outputs[2], "data.max_broken=0.1", data=data)
        code = running.wait()
        assert code == 2, f"the exit code was {code}: {running.last()}"
        # Not the last line: what goes to the screen and what is an error come by two ways.
        assert "data.max_broken=0.167 or more" in running.text(), running.last()
    return (
        "named, listed, others in their place, the same ones after a resume; more than may be: saved, exit 2"
    )
