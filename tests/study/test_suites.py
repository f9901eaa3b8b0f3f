"""Both suites answer every question of the paper, with cells that differ in what is asked alone."""

from __future__ import annotations

from typing import Any

import pytest

from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.study.coco import COCO, expected_seconds, operations
from fastmrcnn.study.paper import COMPARISONS
from fastmrcnn.study.runs import CONFIGS
from fastmrcnn.study.scenes import SETS
from fastmrcnn.study.sets import COCO_FILES
from fastmrcnn.study.small import SMALL
from fastmrcnn.study.suite import Cell, Suite

SUITES = [SMALL, COCO]


def config_of(cell: Cell) -> Config:
    return load_config(CONFIGS / f"{cell.recipe}.yaml", cell.settings)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_every_cell_loads_and_has_data(suite: Suite) -> None:
    for cell in suite.cells.values():
        config_of(cell)
        assert cell.data in {*SETS, *COCO_FILES}
        assert cell.proposals_of is None or cell.proposals_of in suite.cells


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_cells_measure_what_is_reported_of_them(suite: Suite) -> None:
    for comparison in COMPARISONS:
        for claim in comparison.claims:
            assert {claim.one, claim.other} <= comparison.cells.keys()
            for name in (claim.one, claim.other):
                model = config_of(suite.cells[name]).model
                has = {
                    "bbox": model.box_head.enabled,
                    "segm": model.mask_head.enabled,
                    "keypoints": model.keypoint_head.enabled,
                }
                assert has[claim.metric.partition("/")[0]], f"{name} has no {claim.metric}"
        assert comparison.paper.keys() <= comparison.cells.keys()


def changed(one: Cell, other: Cell) -> set[str]:
    """Dotted keys under model in which two cells differ."""

    def walk(a: dict[str, Any], b: dict[str, Any], place: str) -> set[str]:
        found = set()
        for key in a.keys() | b.keys():
            if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
                found |= walk(a[key], b[key], f"{place}{key}.")
            elif a.get(key) != b.get(key):
                found.add(f"{place}{key}")
        return found

    return walk(config_of(one).model_dump(), config_of(other).model_dump(), "")


ONE_THING = {
    ("c4", "c4_softmax"): {"mask_head.loss"},
    ("c4", "c4_pool"): {"roi.op", "roi.mode"},
    ("c4", "c4_warp"): {"roi.op"},
    ("c4", "c4_align_max"): {"roi.mode"},
    ("c5", "c5_pool"): {"roi.op", "roi.mode"},
    ("c4", "c4_agnostic"): {"mask_head.class_agnostic"},
    ("figures_keypoint", "figures_keypoint_pool"): {"roi.op", "roi.mode"},
    ("figures_mask", "figures_box"): {"mask_head.enabled"},
    ("figures_both", "figures_keypoint"): {"mask_head.enabled"},
    ("figures_mask", "figures_both"): {"keypoint_head.enabled"},
    ("fpn", "fpn_separate"): {"rpn.enabled"},
    ("r101_fpn", "r50_fpn"): {"backbone.name"},
    ("r101_c4", "r50_c4"): {"backbone.name"},
}


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
@pytest.mark.parametrize(("one", "other"), ONE_THING)
def test_compared_cells_differ_in_one_thing(suite: Suite, one: str, other: str) -> None:
    keys = {key.removeprefix("model.") for key in changed(suite.cells[one], suite.cells[other])}
    keys -= {"backbone.weights"}  # each network has its own
    assert keys == ONE_THING[one, other]


def test_a_run_that_stands_on_another_comes_after_it() -> None:
    names = [cell.name for cell in SMALL.needed(SMALL.chosen(("sharing",)))]
    assert names.index("rpn") < names.index("fpn_separate")
    assert len(names) == len(set(names))


def test_an_unknown_comparison_is_named() -> None:
    with pytest.raises(ValueError, match=r"no comparison poses; there are backbone, .*pose"):
        SMALL.chosen(("poses",))


def test_operations_are_those_of_the_literature() -> None:
    """277 thousand million multiply-adds of R50-FPN at 800x1344 with 128 masks; here there are 100."""
    section = config_of(COCO.cells["r50_fpn"]).model
    assert operations(section.model_dump_json()) / 2e9 == pytest.approx(267, rel=0.02)
    config = config_of(COCO.cells["r50_fpn"])
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 320_000})})
    assert expected_seconds(longer) == pytest.approx(2 * expected_seconds(config))
