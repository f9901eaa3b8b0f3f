"""Settings that hold text: taken letter for letter on the command line, and from YAML as they stand there."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from fastmrcnn.config.file import dump_config, known_keys, load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.config.text import holds_text, type_of
from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded, new_run_folder, to_write
from fastmrcnn.weights.checkpoint import find_checkpoint
from fastmrcnn.weights.sources import find_weights

TEXT = {
    *(
        f"data.{split}.{part}"
        for split in ("train", "val")
        for part in ("images", "annotations", "proposals")
    ),
    *(f"model.{part}{end}" for part in ("weights", "backbone.weights") for end in ("", "_sha256")),
    "data.augment.albumentations",
    "train.keep_best",
    "data.cache",
    "runtime.device",
    "output",
}
REQUIRED = {"data.cache", "runtime.device", "output"}
# What YAML takes for a comment, a mapping, a number, a date, nothing, a list, an alias, a tag, layout, ...
ODD = [
    "imgs #2",
    "a: b",
    "a:",
    "2024",
    "2024-01-01",
    "1e5",
    "0x10",
    "1_000",
    "1:30",
    ".5",
    ".inf",
    "yes",
    "true",
    "on",
    "[x] y",
    "[x]",
    "{a}",
    "@x",
    "%x",
    "&x",
    "*x",
    "!x",
    "- x",
    "?",
    ",",
    "x, y",
    "'x",
    "it's",
    '"x',
    "a=b",
    "key=",
    "#",
    "`",
    "Null",
    "NULL",
    "None",
    "none",
    "x\\n",
    "ä ö",
    " x",
    "x ",
    "\t",
    "a  b",
    "=",
    "<<",
    ".",
    "..",
    "---",
    "'x'",
    '"a: b"',
]


def get(config: Config, key: str) -> object:
    return functools.reduce(getattr, key.split("."), config)


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def nested(key: str, value: str) -> str:
    return "{" + ": {".join(key.split(".")) + f": {value}" + "}" * (key.count(".") + 1)


def test_which_settings_are_text() -> None:
    assert {key for key in known_keys() if holds_text(type_of(key, Config))} == {
        *TEXT,
        "model.backbone.name",  # text too, of which not all is taken
    }
    assert type_of("data.train.imgs", Config) is None
    assert type_of("output.x", Config) is None


@pytest.mark.parametrize("text", ODD)
def test_on_the_command_line_text_is_what_it_says(text: str) -> None:
    config = load_config(overrides=[f"{key}={text}" for key in TEXT])
    assert {key: get(config, key) for key in TEXT} == dict.fromkeys(TEXT, text)


@pytest.mark.parametrize("key", sorted(TEXT))
def test_no_text(key: str, tmp_path: Path) -> None:
    if key in REQUIRED:
        assert get(load_config(overrides=[f"{key}=null"]), key) == "null"
        with pytest.raises(UserError, match=f"{key}: expected text, got None"):
            load_config(overrides=[f"{key}="])
        return
    path = write(tmp_path, nested(key, "there"))
    assert get(load_config(path), key) == "there"
    for text in ("", "null"):
        assert get(load_config(path, [f"{key}={text}"]), key) is None
    for text in ("", "~", "null"):
        assert get(load_config(write(tmp_path, nested(key, text))), key) is None


@pytest.mark.parametrize(
    "text", ["2024", "007", "2024-01-01", "2024-01-01 10:00:00", "1e5", "1_000", "yes", "true", ".5", "a b"]
)
def test_in_yaml_a_number_or_a_date_is_its_own_text(text: str, tmp_path: Path) -> None:
    for key in TEXT:
        assert get(load_config(write(tmp_path, nested(key, text))), key) == text
    config = load_config(overrides=[f"{key}={text}" for key in TEXT])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_in_sections_lists_aliases_and_merges(tmp_path: Path) -> None:
    config = load_config(overrides=["data.train={images: 2024, annotations: 1e5}"])
    assert (config.data.train.images, config.data.train.annotations) == ("2024", "1e5")
    pairs = load_config(
        overrides=["data.keypoint_flip_pairs=[[01, 02], [yes, 'no']]"]
    ).data.keypoint_flip_pairs
    assert pairs == [("01", "02"), ("yes", "no")]
    text = (
        "train: {steps: &n 2024}\noutput: *n\ndata: {train: &t {images: 07}, val: {<<: *t, annotations: 1.0}}"
    )
    config = load_config(write(tmp_path, text))
    assert (config.train.steps, config.output) == (2024, "2024")
    assert (config.data.val.images, config.data.val.annotations) == ("07", "1.0")
    with pytest.raises(UserError, match=r"output: expected text, got \['a'\]"):
        load_config(write(tmp_path, "output: [a]"))
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(write(tmp_path, "train: &a {<<: *a}"))


def test_quotes_and_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(overrides=["output = some where "]).output == "some where"
    assert capsys.readouterr().err == ""
    assert load_config(overrides=["output='007'"]).output == "'007'"
    assert capsys.readouterr().err == "note: output: the quotes are taken for part of the text '007'\n"
    # Of what is not text they are YAML's, as ever.
    assert load_config(overrides=["optim.name='sgd'"]).optim.name == "sgd"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, work = tmp_path / "home", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(work)
    return folder


@pytest.mark.parametrize("key", sorted(TEXT - {"runtime.device", "train.keep_best"}))
def test_the_home_folder_in_every_path(key: str, home: Path, tmp_path: Path) -> None:
    expected = "~/x" if key.endswith("sha256") else f"{home}/x"
    (home / "c.yaml").write_text(nested(key, "~/x"), encoding="utf-8")
    for config in (load_config(overrides=[f"{key}=~/x"]), load_config("~/c.yaml")):
        assert get(config, key) == expected
        assert get(load_config(base=config.model_dump(mode="json")), key) == expected
    assert get(load_config(overrides=[f"{key}=a/~/x"]), key) == "a/~/x"


def test_files_of_the_home_folder(home: Path) -> None:
    (home / "weights.pt").touch()
    assert expanded("~/a") == to_write("~/a") == home / "a"
    assert find_weights("~/weights.pt") == find_checkpoint("~/weights.pt") == home / "weights.pt"
    assert new_run_folder("~/runs") == home / "runs" / "run_001"
    assert not Path("~").exists()


def test_the_home_folder_of_nobody(home: Path) -> None:
    """What is read may have that name; what is made gets it only if it was meant."""
    assert load_config(overrides=["output=~nobody_here/x"]).output == "~nobody_here/x"
    Path("~nobody_here").touch()
    assert find_checkpoint("~nobody_here") == Path("~nobody_here")
    for make in (to_write, new_run_folder):
        with pytest.raises(
            UserError, match=r"~nobody_here/x: there is no user nobody_here here; .*\./~nobody"
        ):
            make("~nobody_here/x")
    assert to_write("./~nobody_here/x") == Path("~nobody_here/x")
    with pytest.raises(UserError, match="~nowhere: no such"):
        find_checkpoint("~nowhere")
