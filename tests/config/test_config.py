"""The configuration: strict about keys and values, and helpful about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastmrcnn.config.file import (
    differing_keys,
    dump_config,
    known_keys,
    load_config,
    nearest_key,
    parse_config,
)
from fastmrcnn.config.model import FpnConfig
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(path: Path | None = None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    assert load_config() == Config()


def test_file_over_defaults_and_command_line_over_file(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 10\n  batch: 4\noptim: {lr: 0.5}\n")
    config = load_config(path, ["train.steps=20", "model.backbone.name=resnet18"])
    assert (config.train.steps, config.train.batch, config.optim.lr) == (20, 4, 0.5)
    assert config.model.backbone.name == "resnet18"
    assert config.optim.momentum == Config().optim.momentum


def test_last_override_counts() -> None:
    assert load_config(overrides=["train.steps=1", "train.steps=2"]).train.steps == 2


def test_base_tree_is_overridden_and_left_alone() -> None:
    base = {"train": {"steps": 7}}
    assert load_config(overrides=["train.steps=8"], base=base).train.steps == 8
    assert load_config(base=base).train.steps == 7
    assert base == {"train": {"steps": 7}}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2E+1", 20.0), ("1.e-2", 0.01), ("0.25", 0.25), ("3", 3.0)]
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    assert load_config(overrides=[f"optim.lr={text}"]).optim.lr == value
    assert load_config(write(tmp_path, f"optim: {{lr: {text}}}")).optim.lr == value


def test_values_of_other_types() -> None:
    config = load_config(
        overrides=[
            "data.short_side=[640, 800]",
            "data.buckets=[[256, 256], [128, 256]]",
            "model.anchors.sizes=[[8],[16],[32],[64],[128, 192]]",
            "model.mask_head.enabled=false",
            "optim.clip_norm=null",
            "output=some where",
            "data.train.images=/a=b",
        ]
    )
    assert config.data.short_side == [640, 800]
    assert config.data.buckets == [(256, 256), (128, 256)]
    assert config.model.anchors.sizes[4] == [128, 192]
    assert not config.model.mask_head.enabled
    assert config.optim.clip_norm is None
    assert (config.output, config.data.train.images) == ("some where", "/a=b")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.step", "train.steps"),
        ("model.backbon.name", "model.backbone"),
        ("trian.steps", "train"),
        ("optim.learning", "optim.lr"),
        ("optim.clipnorm", "optim.clip_norm"),
        ("lr", "optim.lr"),
        ("zzz", None),
    ],
)
def test_unknown_key_names_the_nearest(key: str, near: str | None) -> None:
    text = mistakes(None, f"{key}=1")
    assert "unknown key" in text
    if near is not None:
        assert f"did you mean '{near}'" in text
    else:
        assert "did you mean" not in text


def test_nearest_key_of_every_known_key_is_a_known_place() -> None:
    places = list(known_keys())
    assert len(places) == len(set(places)) > 80
    for place in places:
        assert nearest_key(place + "x") is not None


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {stpes: 1, batch: none}\nmodle: {}\n")
    text = mistakes(path, "optim.lr=-1", "nonsense", "train.seed=[", "output.x=1", "data.workers=two")
    assert text.startswith(f"configuration from {path} and the command line: ")
    for part in (
        "unknown key 'train.stpes' (did you mean 'train.steps'?)",
        "train.batch: ",
        "unknown key 'modle' (did you mean 'model'?)",
        "optim.lr: ",
        "'nonsense' is not key=value",
        "train.seed: '[' is not a YAML value",
        "data.workers: ",
    ):
        assert part in text, part


def test_a_value_is_not_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, "output: runs\n")
    assert "output.x: 'output' is a value, not a section" in mistakes(path, "output.x=1")


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0",
        "train.steps=many",
        "train.steps=1.5",
        "train.batch=-1",
        "optim.momentum=1",
        "model.backbone.name=resnet51",
        "data.augment.flip_horizontal=1.5",
        "model.mask_head.threshold=1",
        "data.buckets=[[1, 2, 3]]",
        "model.box_head.delta_weights=[1, 1]",
        "train=3",
    ],
)
def test_value_out_of_range_is_named_with_what_came(override: str) -> None:
    key, _, value = override.partition("=")
    text = mistakes(None, override)
    assert f"{key}" in text
    assert value.strip("[]").split(",")[0] in text


def test_values_that_do_not_go_together() -> None:
    sizes = mistakes(None, "model.anchors.sizes=[[32]]")
    assert sizes.endswith("model.anchors.sizes must have 5 list(s), per level p2..p6, got 1")
    assert "must not exceed" in mistakes(None, "model.rpn.background_iou=0.8")


def test_mistakes_are_put_in_plain_words(tmp_path: Path) -> None:
    assert "train.steps: expected a whole number, got 'many'" in mistakes(None, "train.steps=many")
    assert "optim.lr: expected a number, got 'fast'" in mistakes(None, "optim.lr=fast")
    assert "data.shapes: expected true or false, got 'perhaps'" in mistakes(None, "data.shapes=perhaps")
    assert "train: expected a section, got 5" in mistakes(None, "train=5")
    file = write(tmp_path, "train: {steps: 3}\n")
    assert mistakes(file, "train.step=5").startswith(f"configuration from {file} and the command line: ")
    assert f"(did you mean {file}?)" in mistakes(file.with_name(file.name.replace(".", "e.", 1)))


def test_which_keys_differ() -> None:
    one, other = load_config(), load_config(overrides=["train.steps=5", "model.fpn.channels=32"])
    assert differing_keys(one, other) == ["model.fpn.channels", "train.steps"]


def test_files_that_are_none(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert mistakes(missing) == f"{missing}: no such configuration file"
    assert f"{tmp_path}: cannot be read" in mistakes(tmp_path)
    assert "expected sections" in mistakes(write(tmp_path, "- 1\n- 2\n"))
    assert "expected sections" in mistakes(write(tmp_path, "just words\n"))
    assert "not valid YAML" in mistakes(write(tmp_path, "train: [1, 2\n"))
    assert "not valid YAML" in mistakes(write(tmp_path, "train:\n\tsteps: 1\n"))
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert str(tmp_path / "c.yaml") in mistakes(tmp_path / "c.yaml")


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == Config()


def test_duplicate_key_is_a_mistake(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n  steps: 1\n  batch: 2\n  steps: 3\n")
    text = mistakes(path)
    assert str(path) in text
    assert "duplicate key steps" in text


def test_python_tags_are_not_run(tmp_path: Path) -> None:
    path = write(tmp_path, "output: !!python/object/apply:os.getcwd []\n")
    assert "not valid YAML" in mistakes(path)


def test_round_trip(tmp_path: Path) -> None:
    config = load_config(
        overrides=[
            "optim.lr=1e-7",
            "data.buckets=[[64, 96]]",
            "data.train.images=ä/ö",
            "optim.ema=0.99",
            "model.mask_head.enabled=no",
            "data.short_side=[100]",
            "output='007'",
        ]
    )
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(write(tmp_path, dump_config(Config()))) == Config()
    assert parse_config(config.model_dump(mode="json"), source="test") == config


def test_dump_names_every_key() -> None:
    def leaves(tree: dict[str, object], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in tree.items():
            if isinstance(value, dict):
                found |= leaves(value, f"{prefix}{key}.")
            else:
                found.add(prefix + key)
        return found

    assert leaves(yaml.safe_load(dump_config(Config()))) == set(known_keys())


def test_fields_of_a_section_by_name() -> None:
    section = FpnConfig(channels=8)
    assert section.values("channels") == {"channels": 8}
    assert section.without("channels") == {"norm": "none"}
    assert section.values() == section.without() == {"channels": 8, "norm": "none"}
    for ask in (section.values, section.without):
        with pytest.raises(KeyError, match="chanels"):
            ask("chanels")


def test_configuration_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Config().train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "override",
    [
        "data.short_side=[]",
        "data.short_side=[0]",
        "data.buckets=[[-32, 64]]",
        "model.anchors.aspect_ratios=[]",
        "model.anchors.sizes=[[32], [], [128], [256], [512]]",
        "optim.lr=.inf",
        "optim.lr=.nan",
        "train={steps: 1, steps: 2}",
        "data.short_side=" + "[" * 3000,
    ],
)
def test_values_that_cannot_be_meant(override: str) -> None:
    assert override.split("=")[0] in mistakes(None, override)


def test_section_without_a_line_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "train:\n  # steps: 3\nmodel:\n  backbone:\n")) == Config()


@pytest.mark.parametrize("text", ["on", "off", "auto"])
def test_on_and_off_are_words(text: str, tmp_path: Path) -> None:
    """YAML 1.1 would read them as true and false."""
    assert load_config(overrides=[f"train.compile={text}"]).train.compile == text
    (tmp_path / "c.yaml").write_text(f"train: {{compile: {text}}}\ndata: {{shapes: yes}}\n")
    config = load_config(tmp_path / "c.yaml", ["model.mask_head.enabled=off"])
    assert config.train.compile == text
    assert config.data.shapes is True
    assert config.model.mask_head.enabled is False
    (tmp_path / "d.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "d.yaml") == config


def test_keys_of_earlier_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("train: {threads: 3, precision: bf16, steps: 7}\n", encoding="utf-8")
    config = load_config(path, ["runtime.threads=2", "train.device=cpu"])
    assert (config.runtime.threads, config.runtime.precision, config.runtime.device) == (2, "bf16", "cpu")
    assert config.train.steps == 7
    notes = sorted(capsys.readouterr().err.splitlines())
    assert notes == [f"note: train.{key} is now runtime.{key}" for key in ("device", "precision", "threads")]


def test_a_checkpoint_of_an_earlier_version_is_read_without_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = {"train": {"threads": 3, "device": "cpu"}}
    assert load_config(base=old).runtime.threads == 3
    assert parse_config(old, "a checkpoint").runtime.threads == 3
    assert load_config(base=old, overrides=["runtime.threads=1"]).runtime.threads == 1
    assert old == {"train": {"threads": 3, "device": "cpu"}}
    assert capsys.readouterr().err == ""


def test_an_old_key_beside_its_new_name(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("train: {threads: 3}\nruntime: {threads: 2}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.threads is now runtime\.threads, and both are given"):
        load_config(path)
