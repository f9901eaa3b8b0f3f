"""The step taken apart: which part of the model an operation belongs to, and what it must cost at least.

The model knows nothing of this. Its submodules and methods are wrapped from outside, for a profiled step.
A backward operation belongs to the part whose forward pass made its node: autograd numbers the nodes in the
order in which they are made, so a part owns the numbers between its beginning and its end.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastmrcnn.model import mask_rcnn
from fastmrcnn.model.cascade import CascadeBoxHead
from fastmrcnn.model.mask_head import FcnMaskHead
from fastmrcnn.speed.timing import Ceilings
from fastmrcnn.training.step import TrainingStep

PREFIX = "part: "
OTHER = "other"
SAMPLING = "sampling"
OPTIMIZER = "check, clip and optimizer"

# Where a part lives in the model, by attribute. Where the model has None, it has no such part.
_PLACES = {
    "normalize": "pixels",
    "backbone.forward": "backbone",
    "fpn.forward": "FPN",
    "rpn.head.forward": "RPN head",
    "rpn.anchors.forward": "anchors",
    "rpn.losses": "RPN losses",
    "rpn.propose": "proposals",
    "sampler": SAMPLING,
    "pooler": "RoIAlign",
    "pooler.together": "RoIAlign",
    "res5.forward": "res5",
    "box_head.forward": "box head",
    "box_head.losses": "box losses",
    "mask_head.forward": "mask head",
    "mask_head.loss_of_rois": "mask loss",
    "keypoint_head.forward": "keypoint head",
    "keypoint_head.loss": "keypoint loss",
}
PARTS = [*dict.fromkeys(_PLACES.values()), OPTIMIZER, OTHER]


class Place(NamedTuple):
    part: str
    backward: bool


class Parts:
    """Knows in a step, as it runs and afterwards, which part is at work."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.ranges: list[tuple[int, int, str]] = []  # of node numbers; inner ones before outer ones

    @contextlib.contextmanager
    def at_work(self, part: str) -> Iterator[None]:
        first = _next_node()
        self.stack.append(part)
        try:
            with record_function(PREFIX + part):
                yield
        finally:
            self.stack.pop()
            self.ranges.append((first, _next_node(), part))

    def backward_of(self, node: int) -> Place:
        """Where the backward pass of the autograd node of that number belongs."""
        part = next((part for first, last, part in self.ranges if first < node < last), OTHER)
        return Place(part, part != OPTIMIZER)  # whose only node scales the loss

    @contextlib.contextmanager
    def watching(self, make_step: TrainingStep) -> Iterator[Parts]:
        """The step's parts are known within the block; afterwards the model is as it was."""
        self.ranges.clear()
        with contextlib.ExitStack() as undo:
            for owner, name, part in places(make_step):
                undo.enter_context(_replaced(owner, name, _Watched(getattr(owner, name), part, self)))
            yield self


def places(make_step: TrainingStep) -> Iterator[tuple[Any, str, str]]:
    """The object, the attribute and the part of all that is watched."""
    model = make_step.model
    places: list[tuple[Any, str, str]] = [(model, path, part) for path, part in _PLACES.items()]
    if isinstance(model.mask_head, FcnMaskHead):  # whose loss calls them without its forward
        places.append((model, "mask_head.features", "mask head"))
    if isinstance(model.box_head, CascadeBoxHead):
        count = len(model.box_head.stages)
        places += [(model, f"box_head.stages.{stage}.forward", "box head") for stage in range(count)]
    places += [(make_step, f"update.{part}", OPTIMIZER) for part in ("differentiate", "apply")]
    places.append((make_step, "draw_keys", SAMPLING))
    places.append((mask_rcnn, "pack_foreground", SAMPLING))
    for start, path, part in places:
        owner, name, value = None, "", start
        for name in path.split("."):
            if value is None:
                break
            owner = value
            if not hasattr(owner, name):
                raise AttributeError(
                    f"the part '{part}' is not at {path}: {type(owner).__name__} has no {name}"
                )
            value = getattr(owner, name)
        if value is not None:
            yield owner, name, part


class _Watched:
    """A function, or an object that is called like one, under the name of a part."""

    def __init__(self, inner: Any, part: str, parts: Parts) -> None:
        self.inner = inner
        self.part = part
        self.parts = parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.parts.at_work(self.part):
            return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an instance that hides the class's, or the one that stood there."""
    own = vars(owner)
    before = own.get(name)
    # A module's children are found in another dictionary, and its __setattr__ takes nothing else for them.
    own[name] = value
    try:
        yield
    finally:
        if before is None:
            del own[name]
        else:
            own[name] = before


def _next_node() -> int:
    """Number of a node that is made here; those made before have smaller ones."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).view(1).grad_fn
    assert node is not None
    return node._sequence_nr()


class Cost(NamedTuple):
    flops: float = 0.0
    bytes: float = 0.0
    floor_s: float = 0.0


class Costs(TorchDispatchMode):
    """Counts what the operations of each part cost at least, on a device of the given ceilings.

    An operation reads each of its inputs once, writes each of its outputs once, and does its products; the
    longer of the two times is its floor. What it reads in places only, as RoIAlign does, counts whole. So
    the floor of a part is that of its operations as they are: what fusing them would save is not in it. Of
    custom operators only the bytes are known.
    """

    def __init__(self, parts: Parts, ceilings: Ceilings) -> None:
        super().__init__()
        self.parts = parts
        self.ceilings = ceilings
        self.found: dict[Place, Cost] = defaultdict(Cost)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "is_view", False):
            return out
        flops = 0.0
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            flops = float(flop_registry[packet](*args, **(kwargs or {}), out_val=out))
        moved = float(sum(_bytes((args, kwargs))) + sum(_bytes(out)))
        floor = max(flops / self.ceilings.flops, moved / self.ceilings.bytes)
        place = self._place()
        before = self.found[place]
        self.found[place] = Cost(before.flops + flops, before.bytes + moved, before.floor_s + floor)
        return out

    def _place(self) -> Place:
        node = torch._C._current_autograd_node()
        if node is not None:
            return self.parts.backward_of(node._sequence_nr())
        return Place(self.parts.stack[-1] if self.parts.stack else OTHER, False)


def _bytes(structure: Any) -> Iterator[int]:
    """Of each tensor once. An expanded one is as large as its memory."""
    seen = set()
    for leaf in tree_leaves(structure):
        if isinstance(leaf, Tensor) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield min(leaf.nbytes, leaf.untyped_storage().nbytes())
