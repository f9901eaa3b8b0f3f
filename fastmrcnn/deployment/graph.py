"""The graph that an exported file holds: from whole images to detections, in tensors of fixed shape.

It is the model's own `detect`, that of evaluation and prediction. Around it stand the order of the pixels
that servers have, and outputs that need nothing of this program to be read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.model.box_head import BoxHead
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.norms import FrozenBatchNorm2d
from fastmrcnn.structures import Batch
from fastmrcnn.weights.trained import TrainedModel

INPUTS = ("pixels", "sizes")
MULTIPLE = 32  # stride of the coarsest map that the pyramid adds up
FINER = 8  # places per cell of a heatmap where a keypoint may be


class ServingGraph(nn.Module):
    """From images and their true sizes to detections, in tensors of fixed shape.

    Pixels are NHWC, as decoders of images give them: a server copies rows into the padded array and turns
    nothing around.

    Args:
        trained: its model is copied; frozen and running batch norms are folded into their convolutions.
        half: weights and activations in fp16; boxes, scores, masks and norms stay in fp32.
        paste: give bitmaps in the size of the images too.

    Raises:
        UserError: the model finds no objects by itself (half a detector).
    """

    def __init__(self, trained: TrainedModel, *, half: bool = False, paste: bool = False) -> None:
        super().__init__()
        config = trained.card.config
        check_detects(config)
        masks = config.model.mask_head.enabled
        if paste and not masks:
            raise UserError("--paste is for masks, and this model has no mask head")
        if not isinstance(trained.model, MaskRCNN):
            raise UserError(
                "the model is exported already; give the run or the checkpoint that it was made of"
            )
        self.model = prepared(trained.model, half)
        self.threshold = config.model.mask_head.threshold
        self.paste = paste
        keypoints = ("keypoints", "heatmaps") if config.model.keypoint_head.enabled else ()
        self.outputs = (
            *("boxes", "scores", "classes", "valid"),
            *(("masks",) if masks else ()),
            *(("bits",) if paste else ()),
            *keypoints,
        )

    @torch.no_grad()
    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """The best D detections of each image, by falling score.

        Args:
            pixels: (N, H, W, 3) uint8, RGB; zero beyond the image, which lies at the top left.
            sizes: (N, 2) int32, height and width of each image within H and W.
        Returns:
            As `outputs` names them:
            boxes: (N, D, 4) float32 xyxy in pixels of the input.
            scores: (N, D) float32 in 0..1.
            classes: (N, D) int64 in 0..K-1.
            valid: (N, D) bool, which slots hold a detection: the first ones. The others are zero.
            masks: (N, D, M, M) float32, probabilities within the box.
            bits: (N, D, H, W / 8) uint8, of the pixels at or above the threshold of masks, the first in the
                highest bit (`numpy.unpackbits(bits, axis=-1)`).
            keypoints: (N, D, J, 3) float32 x, y in pixels of the input, and score.
            heatmaps: (N, D, J, M', M') float32 logits within the box, for those who read them more finely.
        """
        found = self.model.detect(Batch(pixels.permute(0, 3, 1, 2), sizes))
        valid = found.valid
        outputs = [found.boxes, found.scores, found.classes, valid]
        if found.masks is not None:
            # What a pooled box without area gives is not the same everywhere, nor always finite.
            masks = torch.where(valid[..., None, None], found.masks, 0.0)
            outputs.append(masks)
            if self.paste:
                height, width = pixels.shape[1:3]
                outputs.append(paste_bits(masks, found.boxes, height, width, self.threshold))
        if found.heatmaps is not None:
            heatmaps = torch.where(valid[..., None, None, None], found.heatmaps, 0.0)
            keypoints = highest_places(heatmaps, found.boxes)
            outputs += [torch.where(valid[..., None, None], keypoints, 0.0), heatmaps]
        return tuple(outputs)


def check_detects(config: Config) -> None:
    """UserError for a model that is half a detector."""
    model = config.model
    if not model.rpn.enabled:
        raise UserError(
            "this model reads its proposals from a file (model.rpn.enabled=false): no file can hold it"
        )
    if not model.box_head.enabled:
        raise UserError("this model is an RPN alone (model.box_head.enabled=false) and finds no objects")


def prepared(model: MaskRCNN, half: bool) -> MaskRCNN:
    """A copy to be exported: in eval mode, without gradients, batch norms folded, in fp16 if `half`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    take_ties_by_index(model)
    fold_batch_norms(model)
    if half:
        to_half(model)
    return model


def take_ties_by_index(model: nn.Module) -> None:
    """Let the box heads take candidates of equal scores by rising index, as formats other than torch do."""
    for head in model.modules():
        if isinstance(head, BoxHead):
            head.stable = True


def fold_batch_norms(model: nn.Module) -> int:
    """Multiply the scale of each frozen or running batch norm into the convolution before it.

    Returns:
        how many.
    """
    pairs = [(conv, norm, put) for module in model.modules() for conv, norm, put in _pairs(module)]
    for conv, norm, put in pairs:
        scale, shift = _affine(norm)
        bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        put(nn.Identity())
    return len(pairs)


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Module, Callable[[nn.Module], None]]]:
    """Convolutions of a module, each with the batch norm that follows it, and how to replace that.

    They stand in a row; or are called conv1 and bn1; or are the lists convs and norms.
    """
    children = dict(module.named_children())
    names = []
    if isinstance(module, nn.Sequential):
        names = list(zip(children, list(children)[1:], strict=False))
    names += [(name, f"bn{name.removeprefix('conv')}") for name in children if name.startswith("conv")]
    for first, second in names:
        conv, norm = children[first], children.get(second)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
            yield conv, norm, lambda new, name=second: setattr(module, name, new)  # type: ignore[misc]
    convs, norms = children.get("convs"), children.get("norms")
    if isinstance(convs, nn.ModuleList) and isinstance(norms, nn.ModuleList):
        for index, (conv, norm) in enumerate(zip(convs, norms, strict=False)):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
                yield conv, norm, lambda new, at=index: norms.__setitem__(at, new)  # type: ignore[misc]


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel in eval mode."""
    if isinstance(norm, FrozenBatchNorm2d):
        return norm.affine()
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class InHalf(nn.Module):
    """A backbone that gets fp32 and computes in fp16."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.inner(x.half())


class InFull(nn.Module):
    """A norm that gets fp16 and computes in fp32: squares pass the largest number of fp16 early."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.float()).to(x.dtype)


NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def to_half(model: MaskRCNN) -> None:
    """Parameters in fp16, but those of norms. Anchors and the statistics of pixels are no parameters."""
    for module in model.modules():
        if isinstance(module, NORMS):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.half()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NORMS):
                setattr(module, name, InFull(child))
    model.backbone = InHalf(model.backbone)  # type: ignore[assignment]


def paste_bits(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> Tensor:
    """(N, D, height, width / 8) uint8: masks (N, D, M, M) sampled at the pixels' centres, zeros around them.

    As `kernels.paste_masks`. Bilinear sampling is a product from both sides with the weights of the rows and
    of the columns, which every format has.

    Args:
        width: a multiple of 8.
    """
    rows = _tap_weights(boxes[..., 1], boxes[..., 3], height, masks.shape[-1])
    columns = _tap_weights(boxes[..., 0], boxes[..., 2], width, masks.shape[-1])
    inside = rows @ masks @ columns.transpose(-1, -2) >= threshold
    place = torch.tensor([128.0, 64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0], device=masks.device)
    return (inside.unflatten(-1, (-1, 8)).float() @ place).to(torch.uint8)


def _tap_weights(low: Tensor, high: Tensor, size: int, side: int) -> Tensor:
    """(N, D, size, side): the share of each cell of a mask in a pixel of the image, along one axis."""
    extent = (high - low)[..., None]
    real = extent > 0
    centres = torch.arange(size, device=low.device, dtype=torch.float32) + 0.5
    position = (centres - low[..., None]) / torch.where(real, extent, 1.0) * side - 0.5
    position = torch.where(real, position, -2.0)  # of a box without extent: beyond the mask
    cells = torch.arange(side, device=low.device, dtype=torch.float32)
    return (1 - (position[..., None] - cells).abs()).clamp(min=0)


def highest_places(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """The highest place of each heatmap (N, D, J, M, M), enlarged bicubically: (N, D, J, 3) x, y, score.

    Evaluation enlarges a heatmap to the pixels of its box, whose number differs from box to box, and takes
    the highest of those. Here it is the highest of FINER places a cell and axis, no more than a cell from the
    highest cell: the same surface, read at other places. The score is detectron2's: the exponential of the
    place over the sum of those of all cells.
    """
    side = heatmaps.shape[-1]
    flat = heatmaps.flatten(3)
    best = flat.argmax(-1)
    row, column = best.div(side, rounding_mode="floor"), best % side
    around = torch.arange(-3, 4, device=heatmaps.device)  # cells that have a part in the places
    rows = (row[..., None] + around).clamp(0, side - 1)
    columns = (column[..., None] + around).clamp(0, side - 1)
    cells = (rows[..., :, None] * side + columns[..., None, :]).flatten(3)
    patch = flat.gather(3, cells).unflatten(3, (7, 7))
    weights = _cubic_weights(heatmaps.device)  # (places, 7)
    places = weights.shape[0]
    surface = (weights @ patch @ weights.T).flatten(3)
    top, index = surface.max(-1)
    step = torch.arange(places, device=heatmaps.device, dtype=torch.float32) / FINER - 1
    y = row + 0.5 + step[index.div(places, rounding_mode="floor")]
    x = column + 0.5 + step[index % places]
    extent = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1)[..., None, :]
    at = torch.stack([x, y], -1).clamp(0, side) / side * extent + boxes[..., None, :2]
    score = (top - flat.logsumexp(-1)).exp()
    return torch.cat([at, score[..., None]], -1)


def _cubic_weights(device: torch.device) -> Tensor:
    """(2 * FINER + 1, 7): the weights of the cells -3..3 in the places -1, ..., 1, as in F.interpolate."""
    a = -0.75
    places = torch.arange(2 * FINER + 1, device=device, dtype=torch.float32) / FINER - 1
    distance = (places[:, None] - torch.arange(-3, 4, device=device, dtype=torch.float32)).abs()
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


def check_shape(height: int, width: int) -> None:
    """UserError unless the strides allow the shape; it names the nearest that they do."""
    if min(height, width) > 0 and height % MULTIPLE == 0 and width % MULTIPLE == 0:
        return
    near = [max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in (height, width)]
    over = [max(MULTIPLE, -(-side // MULTIPLE) * MULTIPLE) for side in (height, width)]
    others = "" if near == over else f" or {over[0]} {over[1]}"
    raise UserError(
        f"--shape {height} {width}: both must be multiples of {MULTIPLE}, the stride of the coarsest map; "
        f"the nearest is {near[0]} {near[1]}{others}"
    )
