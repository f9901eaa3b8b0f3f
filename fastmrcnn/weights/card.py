"""What a model was trained with, and what its class numbers mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmrcnn.config.file import parse_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.keypoints import KeypointSchema


@dataclass(frozen=True)
class ModelCard:
    """What a model was trained with, and what its class numbers mean."""

    config: Config
    class_names: list[str]  # of classes 0..K-1
    category_ids: list[int]  # of the data set, by class
    keypoints: KeypointSchema | None = None  # of a model with a keypoint head

    @property
    def num_keypoints(self) -> int | None:
        return None if self.keypoints is None else len(self.keypoints.names)


def read_card(checkpoint: Mapping[str, Any], source: str | Path) -> ModelCard:
    """The card that a checkpoint carries; UserError if its configuration is not valid here."""
    config = parse_config(checkpoint["config"], source=str(source))
    known = checkpoint.get("keypoints")  # which checkpoints of earlier versions lack
    keypoints = None if known is None else KeypointSchema(**known)
    return ModelCard(config, list(checkpoint["class_names"]), list(checkpoint["category_ids"]), keypoints)
