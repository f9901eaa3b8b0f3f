"""Two processes with half of a step's images each make the step that one makes with all of them.

They are equal but for the order of sums: in one process a gradient is summed over both images by one kernel,
in two each one's is rounded first. Float32 rounds by 6e-8, some hundred values are summed in turn, and 20
steps add up what that does to the weights: 3e-6 of the losses, 4e-6 of the gradient and 2e-6 of the way that
the weights went were seen. The bounds leave room for other processors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import group_runs
import pytest
import torch
from group_runs import TRIALS, Trial, batch_of, cut, made, make_step, run_together
from torch import Tensor

from fastmrcnn.group import ALONE

LOSSES = 1e-4  # of each
GRADIENTS = 1e-4  # of the norm of the whole
WEIGHTS = 1e-4  # of the way that they have gone
FAST = [name for name in TRIALS if name != "compiled"]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What each of two processes made of all trials."""
    return run_together(tmp_path_factory.mktemp("two"), FAST)


def both(two: list[dict[str, Found]], name: str) -> Found:
    """What the first made of a trial, once it is sure that the second has the same to the last bit."""
    first, second = (one[name] for one in two)
    assert str(first["rows"]) == str(second["rows"]), name  # a NaN is not equal to itself
    for part in ("model", "ema"):
        for key, value in first[part].items():
            assert value.equal(second[part][key]) or not value.isfinite().all(), f"{name}: {part}.{key}"
    assert (first["bad"], first["scale"], first["phase"]) == (second["bad"], second["scale"], "whole")
    return first


def distances(found: Found, wanted: Found) -> dict[str, float]:
    """How far two runs are apart, each in the units of its bound."""
    rows = zip(found["rows"], wanted["rows"], strict=True)
    losses = [abs(a[k] - b[k]) / abs(b[k]) for a, b in rows for k in b if k.startswith("loss_") and b[k]]
    gradients = [apart(a, b) for a, b in zip(found["gradients"], wanted["gradients"], strict=True)]
    ways = [moved(found, part, wanted) for part in ("model", "ema")]
    return {
        "losses": max(losses) / LOSSES,
        "gradients": max(gradients) / GRADIENTS,
        "weights": max(ways) / WEIGHTS,
    }


def moved(found: Found, part: str, wanted: Found) -> float:
    ways = [
        {key: value.float() - one["began"][key].float() for key, value in one[part].items()}
        for one in (found, wanted)
    ]
    return apart(*ways)


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    a, b = (torch.cat([one[key].double().flatten() for key in wanted]) for one in (found, wanted))
    return float((a - b).norm() / b.norm())


def counts(found: Found) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("loss_")} for row in found["rows"]]


@pytest.mark.parametrize("name", ["frozen_bn", "gn", "sync_bn"])
def test_twenty_steps_are_those_of_one_process(two: list[dict[str, Found]], name: str) -> None:
    """FPN with masks and keypoints, clipped, with an average."""
    found, wanted = both(two, name), made(TRIALS[name])
    assert len(found["rows"]) == 20
    assert max(distances(found, wanted).values()) < 1, distances(found, wanted)
    assert counts(found) == counts(wanted)
    limit = TRIALS[name].optim.clip_norm
    assert limit is not None
    norms = [torch.cat([g.flatten() for g in one.values()]).norm() for one in wanted["gradients"]]
    assert max(norms) > limit  # it was clipped


@pytest.mark.parametrize(
    "name", ["plain", "counted", "cascade", "softmax", "mlp", "rpn", "given", "accumulate"]
)
def test_every_head_and_normaliser(two: list[dict[str, Found]], name: str) -> None:
    found, wanted = both(two, name), made(TRIALS[name])
    assert max(distances(found, wanted).values()) < 1, distances(found, wanted)
    assert counts(found) == counts(wanted)


def test_adamw(two: list[dict[str, Found]]) -> None:
    """It divides each weight's gradient by its size: one that is zero but for rounding, as of a bias before a
    norm, moves its weight as far as any other. So the weights are nearly equal, what they compute is."""
    apart_by = distances(both(two, "adamw"), made(TRIALS["adamw"]))
    assert max(apart_by["losses"], apart_by["gradients"], apart_by["weights"] / 100) < 1, apart_by


def test_the_mean_of_the_means_is_another_loss(two: list[dict[str, Found]]) -> None:
    """As a step would have it that averaged over processes: these tests would see it."""
    apart_by = distances(both(two, "means"), made(TRIALS["plain"]))
    assert min(apart_by.values()) > 100, apart_by


def test_what_finds_no_slot_is_counted_over_all(two: list[dict[str, Found]]) -> None:
    """Each process has its own images' slots."""
    trial = TRIALS["slots"]
    step, batch = make_step(trial, ALONE), batch_of(trial, 0)
    alone = [step(cut(batch, image, 1), 0, 0.0)[1] for image in range(2)]
    (row,) = counts(both(two, "slots"))
    assert row["num_fg"] == sum(int(one.num_fg) for one in alone)
    assert row["masks_dropped"] == sum(int(one.masks_dropped) for one in alone) > 0


def test_a_bad_image_of_one_process_stops_all(two: list[dict[str, Found]]) -> None:
    found, wanted = both(two, "bad"), made(TRIALS["bad"])
    assert found["bad"] == wanted["bad"] == 1
    for part in ("model", "ema"):  # statistics too
        assert all(value.isfinite().all() for value in found[part].values())
        assert moved(found, part, wanted) < WEIGHTS


def test_an_infinite_loss_stops_all_though_its_gradient_is_finite(two: list[dict[str, Found]]) -> None:
    found, wanted = both(two, "bad loss"), made(Trial(steps=1))
    assert found["bad"] == 1
    assert moved(found, "model", wanted) < WEIGHTS


def test_an_overflow_of_one_process_halves_the_scale_of_all(two: list[dict[str, Found]]) -> None:
    found, undisturbed = both(two, "overflow"), made(Trial(precision="fp16", steps=3))
    assert found["bad"] == undisturbed["bad"] == -1
    assert found["scale"] == undisturbed["scale"] / 2
    assert all(value.isfinite().all() for value in found["model"].values())


@pytest.mark.parametrize(("name", "exact"), [("bf16", "plain"), ("accumulate bf16", "accumulate")])
def test_gradients_may_travel_in_bf16(two: list[dict[str, Found]], name: str, exact: str) -> None:
    found, wanted = both(two, name), both(two, exact)
    assert found["rows"][0] == wanted["rows"][0]
    for key, gradient in wanted["gradients"][0].items():
        own = found["gradients"][0][key]
        assert own.dtype == torch.float32
        # Both parts are rounded, and so is their sum: 2^-9 each. They may be larger than it.
        assert (own - gradient).norm() <= 2**-7 * gradient.norm() + 1e-6, key
    assert not found["gradients"][0]["box_head.classes.weight"].equal(
        wanted["gradients"][0]["box_head.classes.weight"]
    )


@pytest.mark.parametrize("name", ["whole", "parts"])
@pytest.mark.parametrize("kind", ["plain", "accumulate"])
def test_recorded_steps_are_the_steps(two: list[dict[str, Found]], name: str, kind: str) -> None:
    """With the sums in the recording, and between its parts."""
    found = both(two, name if kind == "plain" else f"{kind} {name}")
    wanted = both(two, kind)
    assert found["rows"] == wanted["rows"]
    for part in ("model", "ema"):
        assert all(value.equal(wanted[part][key]) for key, value in found[part].items())


@pytest.mark.slow
def test_a_step_with_synchronised_norms_is_one_graph(tmp_path: Path) -> None:
    two = run_together(tmp_path, ["compiled"])
    found, wanted = both(two, "compiled"), made(TRIALS["compiled"])
    assert max(distances(found, wanted).values()) < 1, distances(found, wanted)


def test_several_batches_average_their_gradients() -> None:
    trial = Trial(images=4, accumulate=2, steps=1)
    found, batch = made(trial), batch_of(trial, 0)
    parts = []
    for first in (0, 2):  # of the same keys, which are the whole step's
        step = make_step(Trial(images=4), ALONE)
        keys = step.draw_keys([batch], 0)[0]
        own = type(keys)(*(None if key is None else key[first : first + 2] for key in keys))
        losses, _ = step.model(cut(batch, first, 2), own)
        losses.total().backward()
        parts.append({name: p.grad for name, p in step.model.named_parameters() if p.grad is not None})
    mean = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert apart(found["gradients"][0], mean) < 1e-6


@pytest.mark.parametrize("recorded", [None, "whole", "parts"])
def test_several_batches_are_one_where_divisors_are_fixed(recorded: str | None) -> None:
    """Anchors are asked for by image."""
    wanted = made(Trial(model=group_runs.RPN_ALONE, images=4))
    found = made(Trial(model=group_runs.RPN_ALONE, images=4, accumulate=4, recorded=recorded))
    assert max(distances(found, wanted).values()) < 1, distances(found, wanted)


def test_several_batches_stop_at_a_bad_one() -> None:
    """With statistics that each of them changes."""
    found = made(Trial("bn", images=4, accumulate=2, bad=(1, 0), steps=3))
    wanted = made(Trial("bn", images=4, accumulate=2, steps=1))
    assert found["bad"] == 1
    assert all(value.equal(wanted["model"][key]) for key, value in found["model"].items())
