"""Promise 1: a step on a padded batch is one graph, never recompiles within a bucket, never syncs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from batches import random_batch, small_config, small_model
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn.structures import Batch, Losses

FORBIDDEN = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::item",
}


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait or a shape depend on data, inside custom operators too.

    Only the CPU reference of NMS may: its greedy order is sequential.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exempt = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if not self.exempt:
            assert name not in FORBIDDEN, f"{name} makes the host wait or a shape depend on data"
            if name == "aten::repeat_interleave.Tensor":
                assert "output_size" in (kwargs or {}), f"{name} without an output_size reads the counts"
            if name.startswith("aten::index") and isinstance(args[1], (list, tuple)):
                kinds = [i.dtype for i in args[1] if isinstance(i, torch.Tensor)]
                assert torch.bool not in kinds, f"{name} with a boolean mask"
        is_nms = "padded_nms" in name
        self.exempt += is_nms
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.exempt -= is_nms


@contextmanager
def counted() -> Iterator[CompileCounter]:
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def step(model: Any, batch: Batch, seed: int) -> Losses:
    return model(batch, model.draw_keys(batch, torch.Generator().manual_seed(seed)))


def test_step_is_one_graph_and_a_second_batch_reuses_it() -> None:
    model = small_model().train()
    with counted() as counter:
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        for seed, counts in ((1, (3, 0)), (2, (0, 5))):
            batch = random_batch(seed, counts)
            keys = model.draw_keys(batch, torch.Generator().manual_seed(seed))
            compiled(batch, keys).total().backward()
        assert counter.frame_count == 1


def test_compiled_step_agrees_with_eager() -> None:
    torch._dynamo.reset()
    model = small_model().train()
    batch = random_batch(3)
    eager = step(model, batch, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    keys = model.draw_keys(batch, torch.Generator().manual_seed(3))
    losses = compiled(batch, keys)
    for name, value in eager.present().items():
        torch.testing.assert_close(getattr(losses, name), value, rtol=1e-4, atol=1e-5)
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
        model(batch, keys).total().backward()


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


def test_the_guard_itself_bites() -> None:
    """A sync inside a custom operator is invisible to fullgraph=True, so the mode has to see it."""
    x = torch.ones(3)
    for forbidden in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.unique(),
        lambda: x.masked_select(x > 0),
    ):
        with NoSync(), pytest.raises(AssertionError):
            forbidden()
