"""Networks of timm as the backbone: their maps, what is frozen, what is left out, and one graph still."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from batches import random_batch, small_config
from nosync import NoSync
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.model.backbone import ResNet
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.norms import make_norm
from fastmrcnn.model.timm_backbone import KeyedDropPath, TimmBackbone, _shift_mask

timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))

SWIN = "swin_tiny_patch4_window7_224"


def backbone(name: str, **changes: Any) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(timm, name, **{"norm": "bn", "frozen_stages": 0, "drop_path": 0.0, **changes})


def config_of(name: str, **changes: Any) -> Config:
    tree = small_config().model_dump()
    tree["model"]["backbone"] = {"name": f"timm:{name}", "norm": "bn", "frozen_stages": 0, **changes}
    del tree["model"]["pixel_mean"], tree["model"]["pixel_std"]
    return Config.model_validate(tree)


def model_of(name: str, **changes: Any) -> MaskRCNN:
    torch.manual_seed(0)
    return build_model(config_of(name, **changes).model, 3).train()


@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto",
        "mobilenetv3_small_050",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (SWIN, "efficientnet_b0", "regnetx_002", "hrnet_w18_small", "swinv2_tiny_window8_256")
        ),
    ],
)
def test_maps_are_those_of_the_classifier_at_four_strides(name: str) -> None:
    net = backbone(name).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = net(image)
    assert [one.shape for one in maps] == [
        (1, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(net.out_channels, (4, 8, 16, 32), strict=True)
    ]
    assert set(net.whole_names()) == {key for key in net.state_dict() if key.startswith("timm.")}
    # The classifier itself, on the same weights, is timm's own judge of what its maps are.
    whole = timm.create_model(name, **net.options).eval()
    own = net.state_dict()
    weights = {key: own[ours] for ours, key in net.whole_names().items()}
    assert whole.load_state_dict(weights, strict=False).unexpected_keys == []
    with torch.no_grad():
        theirs = {one.shape[1]: one for one in whole.forward_intermediates(image, intermediates_only=True)}
        plain = net.timm(image)
        if name.startswith("swin"):
            plain = [one.permute(0, 3, 1, 2) for one in plain]
        for one, normed in zip(plain, maps, strict=True):
            torch.testing.assert_close(one, theirs[one.shape[1]], rtol=1e-4, atol=1e-4)
            assert torch.equal(one, normed) != bool(net.norms)


def test_resnet_gives_the_maps_of_ours() -> None:
    theirs = backbone("resnet50").eval()
    ours = ResNet(
        "resnet50", make_norm("bn"), width=64, stride_in_1x1=False, stages=4, frozen_stages=0
    ).eval()
    for module in ours.modules():  # statistics that are not those of a new network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    theirs.timm.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    ours, theirs = ours.double(), theirs.double()
    with torch.no_grad():
        for own, other in zip(ours(image), theirs(image), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    layers = {key.removeprefix("timm."): layer for key, layer in theirs.layers().items()}
    assert layers == ours.layers()


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "resnet18"])
def test_frozen_stages_are_stem_and_first_maps(name: str) -> None:
    def learns(stages: int, norm: str = "bn") -> list[bool]:
        net = backbone(name, frozen_stages=stages, norm=norm).train()
        maps = net(torch.rand(2, 3, 64, 64))
        found = []
        for one in maps:
            trained = [p for p in net.timm.parameters() if p.requires_grad]
            grads = (
                torch.autograd.grad(one.sum(), trained, retain_graph=True, allow_unused=True)
                if one.requires_grad
                else ()
            )
            found.append(any(g is not None for g in grads))
        return found

    assert learns(0) == [True, True, True, True]
    assert learns(2) == [False, True, True, True]
    assert learns(4) == [False, False, False, True]
    net = backbone(name, frozen_stages=1)
    assert {net.layers()[key] for key, p in net.named_parameters() if not p.requires_grad} == {0}
    frozen = backbone(name, frozen_stages=5)
    assert not any(p.requires_grad for p in frozen.timm.parameters())


def test_batch_norms_keep_their_statistics_where_they_are_frozen() -> None:
    def moved(**changes: Any) -> set[str]:
        net = backbone("mobilenetv3_small_050", **changes).train()
        before = copy.deepcopy(net.state_dict())
        net(torch.rand(2, 3, 64, 64))
        return {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}

    every = moved()
    assert len(every) == 3 * len([key for key in every if key.endswith("running_mean")]) > 0
    assert moved(norm="frozen_bn") == set()
    some = moved(frozen_stages=2)
    assert some < every
    assert not any(key.startswith(("timm.bn1", "timm.blocks.0")) for key in some)
    net = backbone("mobilenetv3_small_050", norm="frozen_bn")
    scales = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(scale.requires_grad for scale in scales)


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("vit_tiny_patch16_224", {}, "stride 16 only"),
        ("maxvit_tiny_tf_224", {}, "does not take images of every size"),
        ("hrnet_w18_small", {"drop_path": 0.1}, "drop_path"),
        ("hrnet_w18_small", {"frozen_stages": 2}, "0 or 1, or to 5"),
        ("densenet121", {"drop_path": 0.1}, "drop_path"),
        ("mobilevit_xxs", {"drop_path": 0.1}, "an image in each row"),
    ],
)
def test_a_network_that_does_not_serve_is_refused_by_name(
    name: str, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word) as told:
        backbone(name, **changes)
    assert name in str(told.value)
    assert "\n" not in str(told.value)


def test_what_is_left_out_follows_from_the_keys_alone() -> None:
    net = backbone("convnext_atto", drop_path=0.5).train()
    for layer in net.modules():
        if hasattr(layer, "gamma"):
            nn.init.ones_(layer.gamma)  # or else a branch hardly counts
    image = torch.rand(2, 3, 64, 64)
    keys = torch.rand(2, len(net.drops), generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first, again = net(image, keys), net(image, keys)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = net(image, keys.flip(1))
    assert not torch.equal(first[-1], other[-1])
    rates = [drop.rate for drop in net.drops]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="keys"):
        net(image)
    with torch.no_grad():
        everything = net.eval()(image)
        assert torch.equal(everything[0], net(image, keys)[0])


def test_a_branch_is_left_out_with_its_probability_and_scaled_by_it() -> None:
    drop = KeyedDropPath(0.25).train()
    drop.keys = torch.tensor([0.2, 0.25, 0.9])
    x = torch.ones(3, 2, 1)
    expected = torch.tensor([0.0, 4 / 3, 4 / 3])[:, None, None].expand(3, 2, 1)
    torch.testing.assert_close(drop(x), expected)
    assert torch.equal(drop.eval()(x), x)


def test_frozen_blocks_leave_nothing_out() -> None:
    free = len(backbone("convnext_atto", drop_path=0.5).drops)
    assert len(backbone("convnext_atto", drop_path=0.5, frozen_stages=3).drops) == free - 3


@pytest.mark.parametrize("shift", [(3, 3), (2, 0), (0, 3), (0, 0)])
def test_mask_of_shifted_windows_is_timms(shift: tuple[int, int]) -> None:
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(
        8,
        (56, 56),
        num_heads=1,
        window_size=(7, 4),
        shift_size=shift,
        always_partition=True,
        dynamic_mask=True,
    )
    x = torch.rand(1, 21, 8, 8)
    want, got = block.get_attn_mask(x), _shift_mask(block, x)
    assert (want is None and got is None) or torch.equal(want, got)


GRAPHS = [
    ("convnext_atto", {"drop_path": 0.3}),
    pytest.param("resnet18", {}, marks=pytest.mark.slow),
    pytest.param(SWIN, {"drop_path": 0.2}, marks=pytest.mark.slow),
    pytest.param("efficientnet_b0", {"drop_path": 0.2, "frozen_stages": 2}, marks=pytest.mark.slow),
    pytest.param("hrnet_w18_small", {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "changes"), GRAPHS)
def test_step_is_one_graph_and_never_syncs(name: str, changes: dict[str, Any]) -> None:
    model = model_of(name, **changes)
    batches = [random_batch(1, (3, 0)), random_batch(2, (0, 5))]
    keys = [model.draw_keys(batch, torch.Generator().manual_seed(1)) for batch in batches]
    drops = len(model.backbone.drops)
    assert (keys[0].drop_path is None) if not drops else (keys[0].drop_path.shape == (2, drops))
    with NoSync():
        model(batches[0], keys[0])[0].total().backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    model.zero_grad()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for batch, one in zip(batches, keys, strict=True):
        compiled(batch, one)[0].total().backward()
    assert counter.frame_count == 1
    if name == SWIN:  # its windows hang on the padded shape: another one is another graph, and no more
        compiled(random_batch(3, (1, 1), shape=(96, 128)), one)
        assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_step_agrees_with_eager() -> None:
    torch._dynamo.reset()
    model = model_of("convnext_atto", drop_path=0.3)
    batch = random_batch(3)
    keys = model.draw_keys(batch, torch.Generator().manual_seed(3))
    eager = model(batch, keys)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    losses = compiled(batch, keys)[0]
    for own, other in zip(eager, losses, strict=True):
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_bf16_and_channels_last() -> None:
    model = model_of("convnext_atto").to(memory_format=torch.channels_last)
    batch = random_batch(3)
    keys = model.draw_keys(batch, torch.Generator().manual_seed(3))
    plain = model(batch, keys)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch, keys)[0]
    losses.total().backward()
    assert losses.total().isfinite()
    torch.testing.assert_close(losses.total(), plain.total(), rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_pixel_statistics_are_timms_unless_they_are_given() -> None:
    def loaded(*changes: str) -> Any:
        return load_config(overrides=["model.backbone.name=timm:mixer_s16_224", *changes]).model

    assert (loaded().pixel_mean, loaded().pixel_std) == ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
    given = loaded("model.pixel_mean=[1, 2, 3]")
    assert (given.pixel_mean, given.pixel_std) == ((1, 2, 3), (127.5, 127.5, 127.5))


def test_a_name_that_timm_does_not_know_gets_the_nearest() -> None:
    for name, word in (("convnext_tny", "convnext_tiny"), ("resnet50.a1_in1", "a1_in1k")):
        with pytest.raises(UserError, match=word):
            load_config(overrides=[f"model.backbone.name=timm:{name}"])
