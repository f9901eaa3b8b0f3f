"""A folder in which the blocks of the documentation run as they stand.

It holds small things under the names that the documentation uses: `DIR` is a folder of images, `FILE` their
annotations, `runs/run_001` a trained run, and so on. What makes a command small is added at its end.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml
from arrows import write_arrows
from pages import ROOT
from tiny import TREE
from torch.distributed.run import get_args_parser as launcher_parser

from fastmrcnn import convert, train
from fastmrcnn.config.checks import check_trainable, starting_config
from fastmrcnn.service.answer import Options
from fastmrcnn.service.app import PREDICT

SMALL = {**TREE["train"], "steps": 2, "log_every": 1, "checkpoint_every": 2}
DATA = ["data.train.images=DIR", "data.train.annotations=FILE"]
PUBLISHED = "model_final_f10217.pkl"  # its name holds its hash, so that no other file can have it
WITHOUT_OPTIONS = ("fastmrcnn.kernels.check", "bench/table.py")
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A tree of settings as `key=value`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value}"


TINY = list(flat({**TREE, "train": SMALL}))


def furnish(folder: Path) -> None:
    """Put the things in their places; trains for a moment."""
    annotations = write_arrows(folder / "DIR", seed=1, images=4)
    annotations.rename(folder / "FILE")
    shutil.copytree(folder / "DIR", folder / "coco" / "val2017")
    for word in ("instances", "person_keypoints"):
        place = folder / "coco" / "annotations" / f"{word}_val2017.json"
        place.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "FILE", place)
    (folder / "IMAGE_OR_FOLDER...").mkdir()
    shutil.copy(folder / "DIR" / "1.png", folder / "IMAGE_OR_FOLDER..." / "image.png")
    shutil.copy(folder / "DIR" / "1.png", folder / "image.png")
    (folder / "RECIPE").write_text(yaml.safe_dump({**TREE, "train": SMALL}), encoding="utf-8")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "YOUR_PACKAGE").mkdir()
    (folder / "YOUR_PACKAGE" / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["--config", "RECIPE", *DATA, "data.val.images=DIR", "data.val.annotations=FILE"])
        convert.main(["runs/run_001", "theirs.pkl", "--to", "detectron2"])
        convert.main(["theirs.pkl", "converted.pt", "--config", "RECIPE"])


class Performer:
    """Runs a command of a block in the current folder, a desk, or checks what it names.

    Args:
        place: of the block, for messages.
    """

    def __init__(self, place: str, config: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self.config = config
        self.monkeypatch = monkeypatch
        self.made: set[str] = set()  # virtual environments

    def perform(self, words: list[str]) -> None:
        for start, act in self._acts().items():
            if words[: len(start)] == list(start):
                act(words[len(start) :])
                return
        pytest.fail(f"{self.place}: nothing here knows how to run {' '.join(words)!r}")

    def _acts(self) -> dict[tuple[str, ...], Callable[[list[str]], None]]:
        module = ("python", "-m")
        return {
            (*module, "fastmrcnn.train"): self.train,
            (*module, "fastmrcnn.evaluate"): self.evaluate,
            (*module, "fastmrcnn.predict"): self.predict,
            (*module, "fastmrcnn.serve"): lambda words: check_options("fastmrcnn.serve", words),
            (*module, "fastmrcnn.demo"): lambda words: check_options("fastmrcnn.demo", words),
            (*module, "fastmrcnn.propose"): self.main_of("fastmrcnn.propose"),
            (*module, "fastmrcnn.convert"): self.convert,
            (*module, "fastmrcnn.export"): lambda words: check_options("fastmrcnn.export", words),
            (*module, "fastmrcnn.benchmark"): self.benchmark,
            (*module, "fastmrcnn.experiments"): self.experiments,
            (*module, "fastmrcnn.kernels.check"): self.compare,
            (*module, "fastmrcnn.kernels.report"): lambda words: check_options(
                "fastmrcnn.kernels.report", words
            ),
            (*module, "fastmrcnn.kernels.hub"): self.hub,
            (*module, "YOUR_PACKAGE.roi_kernels.report"): self.report_of_copy,
            ("python", "bench/tune.py"): lambda words: check_options("bench/tune.py", words),
            ("python", "bench/table.py"): self.table,
            ("python", "bench/clients.py"): lambda words: check_options("bench/clients.py", words),
            ("python", "bench/first_gpu/run.py"): lambda words: check_options(
                "bench/first_gpu/run.py", words
            ),
            ("pytest",): lambda words: check_pytest(words, self.config),
            ("pip", "install"): check_installation,
            ("curl",): check_request,
            ("docker",): check_container,
            ("torchrun",): check_launch,
            ("srun",): check_launch,
            ("export",): lambda words: None,  # of a script for a scheduler
            ("cp", "-r", "kernels"): self.copy_kernels,
            ("python3", "-m", "venv"): self.new_environment,
            (".",): self.enter_environment,
        }

    def main_of(self, module: str) -> Callable[[list[str]], None]:
        return importlib.import_module(module).main

    def train(self, words: list[str]) -> None:
        if "..." in words:  # what every command for one's own data says
            place = words.index("...")
            words[place : place + 1] = DATA
        arguments = train.parse_arguments(words)
        if arguments.resume is None:  # what is written is valid as it stands
            check_trainable(starting_config(arguments.config, arguments.overrides))
        own = ["model.weights=runs/run_001"] if "zoo/" in str(arguments.config) else []
        steps = ["train.steps=4"] if arguments.resume is not None else []
        written = [item.partition("=")[0] for item in arguments.overrides if item.startswith("model.")]
        tiny = [item for item in TINY if item.partition("=")[0] not in written]
        train.main([*words, *tiny, *own, *steps])

    def evaluate(self, words: list[str]) -> None:
        tiny = [*TINY, "model.weights=runs/run_001"] if "--config" in words else []
        self.main_of("fastmrcnn.evaluate")([*words, *tiny])

    def predict(self, words: list[str]) -> None:
        # Which recipe weights are of, their sizes tell; of tiny ones it has to be told, by converting them.
        self.main_of("fastmrcnn.predict")(["converted.pt" if word == PUBLISHED else word for word in words])

    def convert(self, words: list[str]) -> None:
        recipe = ["--config", "RECIPE"] if PUBLISHED in words else []
        words = ["theirs.pkl" if word == PUBLISHED else word for word in words]
        self.main_of("fastmrcnn.convert")([*words, *recipe])

    def benchmark(self, words: list[str]) -> None:
        # One needs a CUDA build of torch, the other starts three processes; tests of their own run them.
        if "--schedule" in words or "--processes" in words:
            check_options("fastmrcnn.benchmark", words)
            return
        small = ["--shape", "64", "64", "--batch", "1", "--steps", "1", "--mask-slots", "16", *TINY]
        self.main_of("fastmrcnn.benchmark")([*words, *small])

    def experiments(self, words: list[str]) -> None:
        self.main_of("fastmrcnn.experiments")([*words, *([] if "--plan" in words else ["--plan"])])

    def compare(self, words: list[str]) -> None:
        check_options("fastmrcnn.kernels.check", words)
        assert self.main_of("fastmrcnn.kernels.check")() == (0 if HAS_TORCHVISION else 2)

    def table(self, words: list[str]) -> None:
        (file,) = words
        assert (ROOT / file).parent.is_dir()
        check_options("bench/table.py", words)

    def hub(self, words: list[str]) -> None:
        assert self.main_of("fastmrcnn.kernels.hub")(words) == 0

    def copy_kernels(self, words: list[str]) -> None:
        (target,) = words
        shutil.copytree(ROOT / "kernels", target, ignore=shutil.ignore_patterns("__pycache__"))

    def report_of_copy(self, words: list[str]) -> None:
        self.monkeypatch.syspath_prepend(str(Path.cwd()))
        check_options("YOUR_PACKAGE.roi_kernels.report", words)

    def new_environment(self, words: list[str]) -> None:
        assert importlib.util.find_spec("venv") is not None
        self.made.update(words)

    def enter_environment(self, words: list[str]) -> None:
        assert words == [f"{name}/bin/activate" for name in self.made]


def script(path: str) -> dict[str, Any]:
    """The names of a script of ours, which finds its neighbours."""
    sys.path.insert(0, str((ROOT / path).parent))
    try:
        return runpy.run_path(str(ROOT / path), run_name="script")
    finally:
        sys.path.remove(str((ROOT / path).parent))


def check_options(program: str, words: list[str]) -> None:
    """A program that takes long: its parser takes the values that are given, and its help has the options."""
    main = script(program)["main"] if program.endswith(".py") else importlib.import_module(program).main
    options = [word for word in words if word.startswith("-")]
    if program in WITHOUT_OPTIONS:
        assert not options, words
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0, words
    for option in options:
        assert re.search(rf"(?<![\w-]){option}\b", printed.getvalue()), f"{program} has no {option}"


def check_pytest(words: list[str], config: pytest.Config) -> None:
    """Its paths, options and markers are there."""
    words, own = list(words), (ROOT / "bench" / "conftest.py").read_text(encoding="utf-8")
    markers = {line.partition(":")[0] for line in config.getini("markers")}
    while words:
        word = words.pop(0)
        if word == "-m":
            assert set(re.findall(r"\w+", words.pop(0))) - {"and", "or", "not"} <= markers
        elif word.startswith("--"):
            option = word.partition("=")[0]
            assert f'"{option}"' in own or config.getoption(option, default=None) is not None, option
        else:
            assert (ROOT / word).exists(), word


def check_request(words: list[str]) -> None:
    """Its files are on the desk, and the service has its path and its query."""
    for word in words:
        if "@" in word:
            assert Path(word.partition("@")[2]).is_file(), word
    (url,) = (urlsplit(word) for word in words if word.startswith("http://"))
    assert url.path == PREDICT
    Options.model_validate(dict(parse_qsl(url.query, strict_parsing=True)))


def check_container(words: list[str]) -> None:
    """Its recipe and its volumes are there."""
    action, *words = words
    assert action in ("build", "run")
    if action == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    else:
        folder, inside, mode = words[words.index("-v") + 1].split(":")
        assert Path(folder).is_dir()
        assert (inside, mode) == ("/model", "ro")


def check_launch(words: list[str]) -> None:
    """What a launcher is to start: its own options are torchrun's, and those of the program the program's."""
    if words[:2] == ["bash", "-c"]:
        words = shlex.split(words[2].replace("\\\n", " "))
        names = {word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)}
        assert names == {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
        words = words[words.index("exec") + 1 :]
        assert words[0] == "python"
        program, own = words[2], words[3:]
    else:
        launcher = launcher_parser().parse_args(words[words[0] == "torchrun" :])
        assert launcher.module
        program, own = launcher.training_script, launcher.training_script_args
    own = [word for word in own if word != "..."]
    check_options(program, own)
    if program == "fastmrcnn.train" and "--config" in own:
        check_trainable(starting_config(own[own.index("--config") + 1], DATA))


def check_installation(words: list[str]) -> None:
    """What is installed is this tree, and its extras are declared."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    option, what = words
    tree = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
    assert option == "-e", words
    assert tree is not None, words
    for extra in filter(None, (tree[1] or "").split(",")):
        assert re.search(rf"^{extra} = \[$", project, re.MULTILINE), f"no extra {extra}"
