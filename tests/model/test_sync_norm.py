"""Batch norm over several processes. That two of them train as one does, training/test_group_step.py sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nosync import NoSync
from torch import Tensor, nn

from fastmrcnn.model import sync_norm
from fastmrcnn.model.norms import make_norm
from fastmrcnn.model.sync_norm import SyncBatchNorm2d, synchronise_norms


def norms(dtype: torch.dtype = torch.float64) -> tuple[SyncBatchNorm2d, nn.BatchNorm2d]:
    """Ours and torch's, in the same state."""
    torch.manual_seed(0)
    own, plain = make_norm("sync_bn", 1e-3)(3), nn.BatchNorm2d(3, 1e-3)
    assert isinstance(own, SyncBatchNorm2d)
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    nn.init.normal_(plain.running_mean)
    own.load_state_dict(plain.state_dict())
    return own.to(dtype), plain.to(dtype)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has the same images."""
    monkeypatch.setattr(sync_norm, "_over_processes", lambda values, processes: 2 * values)


def test_its_state_has_the_names_of_torch() -> None:
    own, _ = norms()
    assert own.state_dict().keys() == nn.SyncBatchNorm(3).state_dict().keys()


def test_alone_it_is_a_batch_norm() -> None:
    own, plain = norms()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for _ in range(2):
        assert own(x).equal(plain(x))
    assert own.eval()(x).equal(plain.eval()(x))
    assert all(value.equal(plain.state_dict()[name]) for name, value in own.state_dict().items())


@pytest.mark.usefixtures("twins")
def test_it_normalises_over_all_processes() -> None:
    own, plain = norms()
    assert synchronise_norms(nn.Sequential(own, nn.ReLU()), "both") == 1
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    both = torch.cat([x, x])
    with NoSync():
        found = own(x)
    torch.testing.assert_close(found, plain(both)[:2])
    for name, value in own.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])
    # What both processes make of their loss, which is twice this one's: the gradients are this one's part.
    parts = torch.autograd.grad((found * goal).sum(), [x, own.weight, own.bias])
    plain.running_mean.copy_(own.running_mean)
    whole = torch.autograd.grad((plain(both) * torch.cat([goal, goal])).sum(), [x, plain.weight, plain.bias])
    for part, total in zip(parts, whole, strict=True):
        torch.testing.assert_close(2 * part, total)
    own.eval()
    plain.load_state_dict(own.state_dict())
    assert own(x).equal(plain.eval()(x))


def test_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_norm, "_over_processes", lambda values, processes: values.clone())
    torch.manual_seed(1)

    def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shift = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
        return sync_norm._Normalised.apply(x, weight, bias, shift, 1e-3, "one")[0]

    inputs = (torch.randn(2, 3, 3, 2), torch.rand(3) + 0.5, torch.randn(3))
    assert torch.autograd.gradcheck(normalised, [t.double().requires_grad_() for t in inputs])


@pytest.mark.usefixtures("twins")
def test_a_far_mean_does_not_eat_the_variance() -> None:
    """In float32, once the running mean is near."""
    own, plain = norms(torch.float32)
    synchronise_norms(own, "both")
    x = torch.randn(2, 3, 16, 16) + 3000
    for norm in (own, plain):
        norm.running_mean.fill_(2999.0)
    torch.testing.assert_close(own(x), plain(torch.cat([x, x]))[:2], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("twins")
def test_bf16_maps_are_summed_in_float32() -> None:
    own, _ = norms(torch.float32)
    synchronise_norms(own, "both")
    x = torch.randn(2, 3, 32, 32).bfloat16()
    found = own(x)
    assert found.dtype == torch.bfloat16
    mean = x.float().mean((0, 2, 3))
    began = norms(torch.float32)[1].running_mean
    torch.testing.assert_close(own.running_mean, 0.9 * began + 0.1 * mean, rtol=1e-5, atol=1e-6)


def test_compiled_it_has_the_same_gradients(tmp_path: Path) -> None:
    """In a group of one, whose sums are the operators that a graph holds. A compiler may compute anew in the
    backward pass what the forward pass made of the running mean, which is another one by then."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/it", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert group is not None
        x, goal = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
        found = []
        for compiled in (False, True):
            norm, _ = norms(torch.float32)
            synchronise_norms(norm, group.group_name)
            run = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
            (run(x) * goal).sum().backward()
            found.append([norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
        torch.testing.assert_close(*found)
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()
