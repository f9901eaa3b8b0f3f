"""Promise 1: a step on a padded batch is one graph, never recompiles within a bucket, never syncs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from batches import random_batch, small_config, small_model
from nosync import NoSync
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastmrcnn.structures import Batch, Counts, Losses, present


@contextmanager
def counted() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def step(model: Any, batch: Batch, seed: int) -> tuple[Losses, Counts]:
    return model(batch, model.draw_keys(batch, torch.Generator().manual_seed(seed)))


def test_step_is_one_graph_and_a_second_batch_reuses_it() -> None:
    model = small_model().train()
    with counted() as counter:
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        for seed, counts in ((1, (3, 0)), (2, (0, 5))):
            batch = random_batch(seed, counts)
            keys = model.draw_keys(batch, torch.Generator().manual_seed(seed))
            compiled(batch, keys)[0].total().backward()
        assert counter.frame_count == 1


def test_compiled_step_agrees_with_eager() -> None:
    torch._dynamo.reset()
    model = small_model().train()
    batch = random_batch(3)
    eager, counts = step(model, batch, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    keys = model.draw_keys(batch, torch.Generator().manual_seed(3))
    losses, again = compiled(batch, keys)
    torch.testing.assert_close(present(losses, again), present(eager, counts), rtol=1e-4, atol=1e-5)
    eager.total().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses.total().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("agnostic", [False, True])
def test_eager_step_never_syncs(adaptive: bool, agnostic: bool) -> None:
    config = small_config()
    ratio = 0 if adaptive else 2
    model_config = config.model.model_copy(
        update={
            "roi": config.model.roi.model_copy(update={"sampling_ratio": ratio}),
            "mask_head": config.model.mask_head.model_copy(
                update={"target_sampling_ratio": ratio, "class_agnostic": agnostic}
            ),
            "box_head": config.model.box_head.model_copy(update={"class_agnostic": agnostic}),
        }
    )
    model = small_model(config=config.model_copy(update={"model": model_config})).train()
    batch = random_batch(4)
    keys = model.draw_keys(batch, torch.Generator().manual_seed(4))
    with NoSync():
        model(batch, keys)[0].total().backward()


def test_detection_never_syncs_and_is_one_graph() -> None:
    model = small_model().eval()
    batch = random_batch(5)._replace(targets=None)
    with NoSync():
        eager = model(batch)
    with counted() as counter:
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        again = compiled(batch)
        compiled(random_batch(6)._replace(targets=None))
        assert counter.frame_count == 1
    torch.testing.assert_close(again.scores, eager.scores)


@torch.library.custom_op("nosync_test::run", mutates_args=())
def inside_an_operator(x: Tensor, number: int) -> Tensor:
    SYNCS[number](x)
    return x.clone()


@inside_an_operator.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)


SYNCS = (
    lambda x: x.sum().item(),
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    lambda x: x.unique(),
    lambda x: x.masked_select(x > 0),
    lambda x: x.tolist(),
    lambda x: x.cpu(),
    lambda x: bool(x.sum()),
)


def test_the_guard_sees_numbers_that_are_copied_to_the_device() -> None:
    x = torch.ones(3)
    with NoSync(), pytest.raises(AssertionError, match="copies numbers"):
        x.new_tensor([1.0, 2.0])
    with NoSync():
        torch.full((2,), 1.0)


@pytest.mark.parametrize("number", range(len(SYNCS)))
def test_the_guard_itself_bites(number: int) -> None:
    """A sync inside a custom operator is invisible to fullgraph=True, so the mode has to see it."""
    x = torch.ones(3)
    with NoSync(), pytest.raises(AssertionError):
        SYNCS[number](x)
    with NoSync(), pytest.raises(AssertionError):
        inside_an_operator(x, number)
    with NoSync():
        x.sum().clone()
    assert torch.compile(inside_an_operator, backend="eager", fullgraph=True)(x, number).equal(x)
