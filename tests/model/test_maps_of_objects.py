"""Objects with maps of their own, as samples of several images have them, in the whole step."""

from __future__ import annotations

import torch
from batches import random_batch, small_model
from nosync import NoSync
from torch._dynamo.testing import CompileCounter

from fastmrcnn.structures import Batch, present


def with_maps_of_objects(batch: Batch) -> Batch:
    targets = batch.targets
    assert targets is not None
    slots = targets.valid.shape[1]
    masks = targets.masks._replace(
        to_annotation=targets.masks.to_annotation[:, None].repeat(1, slots, 1, 1),
        size=targets.masks.size[:, None].repeat(1, slots, 1),
    )
    return batch._replace(targets=targets._replace(masks=masks))


def test_the_same_maps_give_the_same_losses_in_one_graph() -> None:
    model, batch = small_model().train(), random_batch(1, (3, 2))
    keys = model.draw_keys(batch, torch.Generator().manual_seed(1))
    own = with_maps_of_objects(batch)
    expected, found = model(batch, keys), model(own, keys)
    assert present(*expected).keys() == present(*found).keys()
    assert all(torch.equal(present(*expected)[name], value) for name, value in present(*found).items())
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    compiled(own, keys)[0].total().backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_step_never_syncs() -> None:
    model, batch = small_model().train(), with_maps_of_objects(random_batch(1, (3, 2)))
    keys = model.draw_keys(batch, torch.Generator().manual_seed(1))
    model(batch, keys)[0].total().backward()
    with NoSync():
        model(batch, keys)[0].total().backward()


def test_each_object_is_read_through_its_own_map() -> None:
    model, batch = small_model().train(), random_batch(1, (3, 2))
    keys = model.draw_keys(batch, torch.Generator().manual_seed(1))
    own = with_maps_of_objects(batch)
    assert own.targets is not None
    own.targets.masks.to_annotation[0, :, :, 2] += 5
    losses = [model(each, keys)[0].loss_mask.item() for each in (batch, own)]
    assert losses[0] != losses[1]
