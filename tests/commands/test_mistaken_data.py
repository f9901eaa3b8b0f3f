"""Random mistakes in an annotation file, through the commands: a run that ends well, or one line."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import yaml
from hypothesis import given
from mistakes import mistakes, quiet, write
from tiny import TREE

from fastmrcnn import train
from fastmrcnn.errors import UserError


@pytest.mark.slow
@quiet(max_examples=60)
@given(mistakes())
def test_two_steps_and_an_evaluation(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = write(folder, tree)
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TREE), encoding="utf-8")
    sets = [f"data.{name}.{key}" for name in ("train", "val") for key in ("images", "annotations")]
    paths = [f"{key}={file.parent / 'images' if key.endswith('images') else file}" for key in sets]
    common = ["--config", str(recipe), *paths, f"output={folder / 'runs'}", "train.steps=2"]
    for more in (["--dry-run"], []):
        with contextlib.suppress(UserError):
            train.main([*common, *more])
