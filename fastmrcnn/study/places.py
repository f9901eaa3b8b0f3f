"""Where a suite keeps what its report is made of, in the report's folder."""

from __future__ import annotations

from pathlib import Path


def metrics_file(folder: Path, suite: str, cell: str, seed: int) -> Path:
    return folder / "metrics" / suite / cell / f"seed_{seed}.json"


def truth_folder(folder: Path, suite: str, data: str) -> Path:
    """Of pictures of the ground truth."""
    return folder / "metrics" / suite / "truth" / data


def picture_folder(folder: Path, suite: str, cell: str) -> Path:
    """Of pictures of what a cell finds."""
    return folder / "metrics" / suite / cell / "pictures"


def features_file(folder: Path, suite: str) -> Path:
    """Of a map of features."""
    return folder / "metrics" / suite / "features.json"


def race_file(folder: Path, data: str, contender: str, seed: int) -> Path:
    """Metrics of a contender of the race on a set."""
    return folder / "metrics" / "race" / data / f"{contender}_seed_{seed}.json"


def per_image_file(folder: Path, suite: str) -> Path:
    """Of the time per image of the paper's networks."""
    return folder / "metrics" / suite / "per_image.json"
