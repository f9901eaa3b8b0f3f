"""The operation with which numbers that are not finite begin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastmrcnn.training.finite import FiniteWatch, Record, described


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        with torch.no_grad():
            self.first.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """With infinities that are meant, and go away again."""
        y = self.first(x).relu_()
        masked = torch.where(y > 100, y, -torch.inf)
        masked[:, 0] = 0
        top = torch.full_like(masked, -torch.inf)
        top = top.maximum(masked).masked_fill(y < -1, -torch.inf)
        return self.second(top.softmax(1) + masked.exp())


def origin_of(loss: Callable[[Net], Tensor], model: Net | None = None) -> Record | None:
    """Of the loss if it is not finite, else of the gradient."""
    model = model or Net()
    watch = FiniteWatch(model)
    for name, parameter in model.named_parameters():
        watch.given(parameter.data, name)
    with watch:
        total = loss(model)
        record = watch.record_of(total)
        if record is None:
            total.backward()
            record = watch.record_of(next(model.parameters()).grad)
    return record and record.origin()


X = torch.ones(5, 3)


def test_infinities_that_do_not_reach_the_loss_are_nobodys_fault() -> None:
    assert origin_of(lambda model: model(X).sum()) is None


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(lambda model: (model(X) / 0).sum(), "aten.div.Tensor", id="division"),
        pytest.param(lambda model: (model(X) * 1e38 * 1e38).mean() * 0, "aten.mul.Tensor", id="overflow"),
        pytest.param(lambda model: (-model(X).exp()).log().sum(), "aten.log.default", id="logarithm"),
        pytest.param(lambda model: model(X).div_(0).add_(1).sum(), "aten.div_.Tensor", id="in place"),
        pytest.param(
            lambda model: (model(X) - 1e30).half().float().sum(), "aten._to_copy.default", id="narrowed"
        ),
        pytest.param(
            lambda model: torch.where(model(X)[:, :1] > 1e9, 1.0, -torch.inf).softmax(0).sum(),
            "aten._softmax.default",
            id="all of them left out",
        ),
    ],
)
def test_of_a_loss(loss: Callable[[Net], Tensor], name: str) -> None:
    found = origin_of(loss)
    assert found is not None
    assert found.name == name
    assert found.backward is None
    assert any(word in found.result for word in ("NaN", "inf"))


def test_of_a_gradient_that_comes_of_a_finite_loss() -> None:
    """The root of zero has no derivative: infinity times zero."""
    found = origin_of(lambda model: (model.first(X) - model.first(X).detach()).square().sum().sqrt())
    assert found is not None
    assert found.name == "aten.div.Tensor"
    assert found.backward is not None
    assert found.backward.startswith("SqrtBackward")
    assert found.inputs == ["() float32 of 1", "() float32 of 0"]


def test_the_module_is_named_in_both_directions() -> None:
    model = Net()
    with torch.no_grad():
        model.second.weight.fill_(3e38)
    forward = origin_of(lambda model: model(X).sum(), model)
    assert forward is not None
    assert (forward.name, forward.place.module) == ("aten.addmm.default", "second")
    assert forward.inputs[-1] == "(4, 2) float32 of 3e+38"

    def flat(model: Net) -> Tensor:
        y = model.second(model.first(X))
        return ((y - y.detach()) * 1e9).sum()

    with torch.no_grad():
        model.second.weight.fill_(1e30)
    backward = origin_of(flat, model)
    assert backward is not None
    assert (backward.name, backward.place.module) == ("aten.mm.default", "second")
    assert backward.backward is not None


def test_weights_that_were_not_finite_before() -> None:
    model = Net()
    with torch.no_grad():
        model.second.bias[0] = torch.nan
    found = origin_of(lambda model: model(X).sum(), model)
    assert found is not None
    assert (found.number, found.name) == (-1, "second.bias")
    assert found.result.endswith("(1 NaN)")


def test_what_was_written_over_is_forgotten() -> None:
    def loss(model: Net) -> Tensor:
        y = model(X).detach().div_(0)
        y.zero_()
        return (model(X) + y).sum()

    assert origin_of(loss) is None


def test_ranges() -> None:
    values = torch.tensor([[1.0, -2.5], [torch.nan, torch.inf]])
    assert described(values) == "(2, 2) float32 from -2.5 to 1 (1 NaN, 1 inf)"
    assert described(torch.full((3,), torch.nan)) == "(3,) float32, none finite (3 NaN)"
    assert described(torch.zeros(2, dtype=torch.bfloat16)) == "(2,) bfloat16 of 0"
