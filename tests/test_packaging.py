"""What is installed is what is in the tree: from the wheel, from the sdist, and without triton."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from places import ROOT

INGREDIENTS = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "fastmrcnn", "kernels", "configs")


def python(*arguments: str, cwd: Path, executable: Path | str = sys.executable) -> str:
    done = subprocess.run([executable, *arguments], cwd=cwd, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """sdist; wheel, built from the tree; wheel_of_sdist. Built from a copy: building leaves files behind."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for name in INGREDIENTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copy(source, tree / name)
    build = ("-m", "build", "--no-isolation", "--outdir")
    python(*build, str(folder / "wheel"), "--wheel", ".", cwd=tree)
    shutil.rmtree(tree / "build", ignore_errors=True)
    python(*build, str(folder / "sdist"), ".", cwd=tree)  # the wheel is built from the sdist here
    return {
        "wheel": next((folder / "wheel").glob("*.whl")),
        "sdist": next((folder / "sdist").glob("*.tar.gz")),
        "wheel_of_sdist": next((folder / "sdist").glob("*.whl")),
    }


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def fields(wheel: Path) -> Message:
    text = next(data for name, data in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(text.decode())


def expected_files() -> dict[str, bytes]:
    """Every module and recipe of the tree, under the name it is installed as."""
    files = {}
    for folder, prefix, pattern in (
        (ROOT / "fastmrcnn", "fastmrcnn", "*.py"),
        (ROOT / "kernels", "fastmrcnn/kernels", "*.py"),
        (ROOT / "configs", "fastmrcnn/configs", "*.yaml"),
    ):
        for path in folder.rglob(pattern):
            inside = path.relative_to(folder).as_posix()
            if prefix != "fastmrcnn" or not inside.startswith(("kernels/", "configs/")):
                files[f"{prefix}/{inside}"] = path.read_bytes()
    return files


def test_tree_has_links_and_no_copies() -> None:
    for name in ("kernels", "configs"):
        link = ROOT / "fastmrcnn" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_every_folder_of_modules_is_a_package() -> None:
    """Discovery finds packages by their __init__.py; a folder without one would be left out."""
    for top in ("fastmrcnn", "kernels"):
        for path in (ROOT / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py"


@pytest.mark.parametrize("kind", ["wheel", "wheel_of_sdist"])
def test_wheel_holds_the_tree_and_nothing_else(distributions: dict[str, Path], kind: str) -> None:
    found = contents(distributions[kind])
    code = {name: data for name, data in found.items() if ".dist-info/" not in name}
    expected = expected_files()
    assert sorted(code) == sorted(expected)
    assert code == expected
    info = {name.split(".dist-info/")[1]: data for name, data in found.items() if ".dist-info/" in name}
    assert info["top_level.txt"].decode().split() == ["fastmrcnn"]
    assert info["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_wheel_says_what_it_needs(distributions: dict[str, Path]) -> None:
    found = fields(distributions["wheel"])
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.10"
    needs = found.get_all("Requires-Dist") or []
    assert any(need.startswith("torch<2.14,>=2.11") for need in needs)
    triton = [need for need in needs if need.startswith("triton")]
    assert triton == ['triton<3.8,>=3.6; sys_platform == "linux"']


def test_sdist_holds_files_and_no_links(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert names >= set(expected_files()) | {"pyproject.toml", "README.md", "LICENSE"}
    assert not {name for name in names if name.startswith(("kernels/", "tests/"))}


IMPORT_ALL = """
import importlib, importlib.util, pathlib, pkgutil, sys
import fastmrcnn, fastmrcnn.kernels
def broken(name):
    raise
for module in pkgutil.walk_packages(fastmrcnn.__path__, "fastmrcnn.", onerror=broken):
    if not (module.name.startswith("fastmrcnn.kernels.") and skip(module.name)):
        importlib.import_module(module.name)
print(pathlib.Path(fastmrcnn.__file__).parent)
print(pathlib.Path(fastmrcnn.kernels.__file__).parent)
print(importlib.util.find_spec("kernels"))
print(len(list(pathlib.Path(fastmrcnn.__file__).parent.glob("configs/*.yaml"))))
print(*(name for name in sys.modules if name.startswith("fastmrcnn.")))
"""


def test_wheel_imports_in_a_clean_environment(distributions: dict[str, Path], tmp_path: Path) -> None:
    """A new environment with the wheel, where torch and the rest are this environment's."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, symlinks=True)
    executable = home / "bin" / "python"
    pip = ("-m", "pip", "--python", str(executable), "install", "--no-deps", "--no-index", "--quiet")
    python(*pip, str(distributions["wheel"]), cwd=tmp_path)
    own = Path(
        python(
            "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home, executable=executable
        ).strip()
    )
    # Named in a .pth, a folder's packages are found, but its own .pth files (an editable install of
    # this very tree) are not read.
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "others.pth").write_text("".join(f"{path}\n" for path in sorted(others)))

    code = "skip = lambda name: False\n" + IMPORT_ALL
    place, kernels, top_level, recipes, modules = python(
        "-I", "-c", code, cwd=tmp_path, executable=executable
    ).splitlines()
    assert Path(place) == own / "fastmrcnn"
    assert Path(kernels) == own / "fastmrcnn" / "kernels"
    assert top_level == "None"
    assert int(recipes) == len(list((ROOT / "configs").glob("*.yaml")))
    assert "fastmrcnn.kernels.roi_align.cpu" in modules.split()


def test_everything_but_the_kernels_imports_without_triton() -> None:
    hide = textwrap.dedent("""
        import sys
        from importlib.machinery import PathFinder
        class WithoutTriton(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)
        sys.meta_path = [WithoutTriton if finder is PathFinder else finder for finder in sys.meta_path]
        sys.path.insert(0, ".")
        def skip(name):
            return name.split(".")[-1] not in ("op", "naive", "cpu", "reference")
    """)
    modules = python("-c", hide + IMPORT_ALL, cwd=ROOT).splitlines()[-1].split()
    assert "fastmrcnn.model.mask_rcnn" in modules
    assert "fastmrcnn.kernels.roi_align.op" in modules


def test_the_two_commands_and_the_extras() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -e . && python -m fastmrcnn.train\n" in readme
    assert "pip install -e '.[test]' && pytest\n" in readme
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    order = [
        "ruff check",
        "ruff format --check",
        "mypy",
        "command=$(readme_block pytest)",
        "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 pytest",
        "command=$(readme_block fastmrcnn.train)",
        "pytest -m 'torchvision",
        "FASTMRCNN_DATA=$data pytest -m 'slow",
    ]
    lines = ci.splitlines()
    places = [next(i for i, line in enumerate(lines) if line.startswith(step)) for step in order]
    assert places == sorted(places)


def imported(folder: Path) -> dict[str, Path]:
    """Top-level names that the modules under `folder` import, and where."""
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0]: path for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found[node.module.split(".")[0]] = path
    return found


def declared(wheel: Path, *extras: str) -> set[str]:
    """Names of the distributions that an installation with these extras asks for."""
    found = set()
    for need in fields(wheel).get_all("Requires-Dist") or []:
        extra = re.search(r'extra == "(\w+)"', need)
        if extra is None or extra[1] in extras:
            found.add(normalized(re.split(r"[^A-Za-z0-9_.-]", need)[0]))
    return found


def normalized(name: str) -> str:
    """Of a distribution, as all its spellings are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (("fastmrcnn", "kernels"), ("export", "serve", "demo", "timm", "albumentations")),
        (("tests", "bench"), ("test", "export", "timm", "albumentations")),
    ],
)
def test_what_is_imported_is_declared(
    distributions: dict[str, Path], folders: tuple[str, ...], extras: tuple[str, ...]
) -> None:
    peers = {"torchvision", "detectron2", "selenium"}  # where they are missing, their tests are skipped
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    here = {name for path in paths for name in (path.stem, path.parent.name)}
    own = {"fastmrcnn", *sys.stdlib_module_names, *peers, *here}
    known = declared(distributions["wheel"], *extras)
    sources = metadata.packages_distributions()
    for folder in folders:
        for name, path in imported(ROOT / folder).items():
            if name not in own:
                needed = {normalized(source) for source in sources.get(name, [name])}
                assert needed & known, f"{path} imports {name}, which pyproject.toml does not list"
