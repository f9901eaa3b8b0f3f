"""What the documentation says to type runs, what it names is there, and it says nothing twice."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from desk import Performer, check_options, check_pytest, furnish
from pages import PAGES, ROOT, Block, anchors, blocks, commands, links, read, sentences, spans

from fastmrcnn.config.file import known_keys
from fastmrcnn.config.schema import RENAMED
from fastmrcnn.kernels import unpatch

BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
BASH = [block for block in BLOCKS if block.language == "bash"]
PROGRAMS = re.compile(r"(?:\w+=\S+ )?(python -m fastmrcnn\.[\w.]+|python bench/\w+\.py|pytest)(?= |$)(.*)")


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk") / "desk"
    folder.mkdir()
    furnish(folder)
    return folder


@pytest.fixture
def desk(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A desk of one's own, where we are."""
    folder = shutil.copytree(furnished, tmp_path / "desk", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} == {"bash", "python", "text"}


@pytest.mark.parametrize("block", BASH, ids=str)
def test_commands_run(
    block: Block, desk: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    performer = Performer(str(block), pytestconfig, monkeypatch)
    for words in commands(block.text):
        performer.perform(words)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            id=str(block),
            marks=pytest.mark.torchvision if "torchvision" in block.text else (),
        )
        for block in PYTHON
    ],
)
def test_python_runs(block: Block, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "detectron2" in block.text and importlib.util.find_spec("detectron2") is None:
        from torchvision.ops import RoIAlign  # which detectron2's calls, with the same arguments

        layers = types.ModuleType("detectron2.layers")
        layers.ROIAlign = RoIAlign  # type: ignore[attr-defined]
        package = types.ModuleType("detectron2")
        package.layers = layers  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "detectron2", package)
        monkeypatch.setitem(sys.modules, "detectron2.layers", layers)
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    try:
        exec(code, {})
    finally:
        unpatch("torchvision")


def test_there_is_a_block_for_each_way_to_use_the_kernels() -> None:
    texts = [block.text for block in PYTHON]
    for word in (
        'patch("torchvision")',
        "detectron2.layers",
        "multilevel_roi_align",
        "padded_nms",
        "mask_loss",
    ):
        assert any(word in text for text in texts), word


def test_trees_show_what_is_there() -> None:
    shown = set()
    for block in (block for block in BLOCKS if block.language == "text"):
        above = ROOT
        for line in block.text.splitlines():
            names = list(itertools.takewhile(lambda word: word.endswith(("/", ".py")), line.split()))
            assert names, f"{block}: {line!r} begins with no path"
            if not line.startswith(" "):
                above = ROOT / names[0]
            paths = [above / name if line.startswith(" ") else ROOT / name for name in names]
            missing = [path for path in paths if not path.exists()]
            assert not missing, f"{block}: {missing}"
            shown.update(paths)
    package = ROOT / "fastmrcnn"
    rooms = {path.parent for path in package.glob("*/__init__.py") if not path.parent.is_symlink()}
    assert rooms <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_no_sentence_is_in_two_pages() -> None:
    said = [(page, sentences(page)) for page in PAGES]
    assert all(found for _, found in said)
    for (one, first), (other, second) in itertools.combinations(said, 2):
        assert not first & second, f"{one.relative_to(ROOT)} and {other.relative_to(ROOT)}"


def test_programs_in_the_text_have_the_options_that_are_named(pytestconfig: pytest.Config) -> None:
    found = [match for page in PAGES for span in spans(page) if (match := PROGRAMS.match(span))]
    assert found
    for match in found:
        program, words = match[1].removeprefix("python -m ").removeprefix("python "), match[2].split()
        if program == "pytest":
            check_pytest(words, pytestconfig)
        else:
            check_options(program, words)


def test_settings_in_the_text_are_known() -> None:
    keys = {*known_keys(), *RENAMED}
    keys |= {key.rsplit(".", count)[0] for key in keys for count in range(1, key.count(".") + 1)}
    sections = sorted({key.split(".")[0] for key in keys if "." in key})
    setting = re.compile(rf"(?<![\w./])(?:{'|'.join(sections)})(?:\.[a-z]\w*)+(?![\w./])")
    named = {
        (page.name, key)
        for page in PAGES
        for text in [*spans(page), *(block.text for block in blocks(page))]
        for key in setting.findall(text)
        if not key.endswith((".py", ".json", ".yaml", ".npz", ".onnx", ".pt2"))
    }
    assert len(named) > 20
    assert not {(page, key) for page, key in named if key not in keys}


def test_paths_in_the_text_are_there(desk: Path) -> None:
    recipes = {path.name for path in (ROOT / "configs").rglob("*.yaml")}
    places = [ROOT, ROOT / "fastmrcnn", ROOT / "kernels", desk, desk / "runs" / "run_001"]
    path = re.compile(r"[\w./-]*/|[\w.-]+/[\w./-]+\.(?:py|md|yaml|json|pt)|[\w-]+_\w+\.yaml")
    for page in PAGES:
        for span in spans(page):
            if path.fullmatch(span) and span not in recipes:
                assert any((place / span).exists() for place in places), f"{page.name}: {span}"


def test_readme_is_short_and_leads_to_every_page() -> None:
    readme = ROOT / "README.md"
    assert len(read(readme).encode()) < 8_000
    assert {f"docs/{page.name}" for page in PAGES if page.parent == ROOT / "docs"} <= set(links(readme))


@pytest.mark.slow
def test_the_new_head_can_be_made_as_the_page_says(tmp_path: Path) -> None:
    """In a copy of what is tracked: the change applies, touches the files that the page names, and works."""
    change = ROOT / "docs" / "new-head.diff"
    touched = re.findall(r"^\+\+\+ b/(.+)$", change.read_text(encoding="utf-8"), flags=re.MULTILINE)
    page = read(ROOT / "docs" / "design.md")
    assert f"{len(touched)} files" in page
    for path in touched:
        assert f"`{path}`" in page or f"`{Path(path).parent}/`" in page, path

    def run(*words: str) -> None:
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

    copy = tmp_path / "copy"
    environment = os.environ | {"PYTHONPATH": str(copy)}
    shutil.copytree(
        ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "runs")
    )
    run("git", "apply", str(change))
    (tests,) = (path for path in touched if path.startswith("tests/"))
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=0", tests)
