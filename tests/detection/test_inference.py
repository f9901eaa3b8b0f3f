"""Detection on a GPU, with stand-ins for it: nothing waits, shapes are recorded, one copy comes back."""

from __future__ import annotations

import pickle
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batches import random_batch, small_config, small_model
from nosync import NoSync
from torch import Tensor, nn

from fastmrcnn import kernels
from fastmrcnn.detection import fetch, paste, recorded
from fastmrcnn.detection.detector import Detector
from fastmrcnn.detection.fetch import Fetched, packed, split_detections, unpacked
from fastmrcnn.detection.objects import all_pasted, coco_results, encoded, pasted
from fastmrcnn.detection.recorded import RecordedModel, Run
from fastmrcnn.detection.run import Inference, device_of, run_model
from fastmrcnn.graphs import leaves
from fastmrcnn.structures import Batch, Detections, tree_map
from fastmrcnn.weights.card import ModelCard

CPU = torch.device("cpu")
SIZES = [(64, 50), (120, 88)]  # of the original images
MAPS = torch.tensor([[[0.5, 0, 0.0], [0, 0.5, 0.0]], [[1.0, 0, -2.0], [0, 1.0, 1.0]]])
NAMES = ["ant", "bee", "cat"]
BEFORE = 1  # batches before a shape is recorded; fewer than usual, to be quick


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "BEFORE", BEFORE)


def batch_of(seed: int, shape: tuple[int, int] = (64, 64)) -> Batch:
    return random_batch(seed, counts=(0, 0), shape=shape)._replace(targets=None)


def found_at_random(seed: int = 0, slots: int = 9) -> Detections:
    """Of two images, as a model leaves them: boxes reach beyond, some have no area, some slots are empty."""
    r = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, slots, 4, generator=r) * 150 - 20
    boxes = torch.cat((corners[..., :2], corners[..., :2] + corners[..., 2:]), -1)
    return Detections(
        boxes=boxes,
        scores=torch.rand(2, slots, generator=r).sort(descending=True).values,
        classes=torch.randint(0, 3, (2, slots), generator=r),
        valid=torch.rand(2, slots, generator=r) < 0.8,
        cut=torch.tensor([3, 40]),
        masks=torch.rand(2, slots, 28, 28, generator=r),
    )


class Recorder:
    """Stands for CUDA graphs: `replay` runs on the very tensors that were recorded, into the same results."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.replays = 0

    def __call__(self, run: Run, batch: Batch) -> tuple[Detections, Callable[[], None]]:
        self.shapes.append(tuple(batch.pixels.shape))
        result = run(batch)

        def replay() -> None:
            self.replays += 1
            for own, new in zip(leaves(result), leaves(run(batch)), strict=True):
                own.copy_(new)

        return result, replay


def assert_same(found: Detections, expected: Detections) -> None:
    assert [leaf.equal(other) for leaf, other in zip(leaves(found), leaves(expected), strict=True)] == [
        True
    ] * len(leaves(expected))


def test_frequent_shapes_are_replayed_with_the_same_results() -> None:
    model, recorder = small_model().eval(), Recorder()
    infer = Inference(model, "fp32", record=recorder)
    seen = []
    for seed in range(2 * BEFORE + 3):
        batch = batch_of(seed, (96, 64) if seed % 2 else (64, 96))
        seen.append((infer(batch), run_model(model, batch, "fp32")))
    for found, expected in seen:  # no replay has written over what was handed out
        assert_same(found, expected)
    assert recorder.shapes == [(2, 3, 64, 96), (2, 3, 96, 64)]
    assert recorder.replays == 3
    infer(batch_of(1, (32, 64)))
    assert len(recorder.shapes) == 2


def planted_run(batch: Batch) -> Detections:
    total = batch.pixels.double().sum().reshape(1, 1).float()
    return Detections(total[..., None], total, total.long(), total > 0, total[0].long())


def test_only_so_many_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST", 2)
    recorder = Recorder()
    model = RecordedModel(planted_run, CPU, recorder)

    def use(width: int, times: int) -> None:
        for seed in range(times):
            pixels = torch.full((1, 3, 32, width), seed + 1, dtype=torch.uint8)
            assert model(Batch(pixels, torch.tensor([[32, width]]))).scores == 96 * width * (seed + 1)

    use(32, BEFORE + 1)
    use(64, BEFORE + 1)
    use(32, 1)  # so that 64 was needed longest ago
    use(96, BEFORE + 1)
    widths = [shapes[0][0][-1] for shapes in model.recordings]
    assert widths == [32, 96]
    use(64, BEFORE)  # it must become frequent again
    assert len(recorder.shapes) == 3
    use(64, 1)
    assert [shape[-1] for shape in recorder.shapes] == [32, 64, 96, 64]


def test_what_cannot_be_recorded_goes_on_without_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def record(run: Run, batch: Batch) -> Any:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    model = RecordedModel(planted_run, CPU, record)
    for seed in range(BEFORE + 3):
        pixels = torch.full((1, 3, 32, 32), seed, dtype=torch.uint8)
        assert model(Batch(pixels, torch.tensor([[32, 32]]))).scores == 3072 * seed
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "detection goes on without CUDA graphs, which cannot be recorded here: CUDA out of memory."
    ]


def test_a_model_that_moved_is_recorded_anew() -> None:
    """A graph would go on reading its old weights."""
    model, recorder = small_model().eval(), Recorder()
    infer = Inference(model, "fp32", record=recorder)
    for seed in range(BEFORE + 1):
        infer(batch_of(seed))
    with torch.no_grad():  # in place: the graph reads the new ones
        next(model.parameters()).mul_(1.5)
    assert_same(infer(batch_of(8)), run_model(model, batch_of(8), "fp32"))
    assert len(recorder.shapes) == 1
    model.double().float()
    for seed in range(BEFORE + 1):
        assert_same(infer(batch_of(seed)), run_model(model, batch_of(seed), "fp32"))
    assert len(recorder.shapes) == 2


def test_without_graphs_nothing_is_recorded() -> None:
    recorder = Recorder()
    infer = Inference(small_model().eval(), "fp32", graphs=False, record=recorder)
    for seed in range(BEFORE + 2):
        infer(batch_of(seed))
    assert not recorder.shapes
    config = small_config()
    detector = Detector(small_model().eval(), ModelCard(config, NAMES, [1, 2, 3]))
    assert detector._inference.graphs
    assert not detector.without_graphs()._inference.graphs


def test_a_model_without_parameters_is_on_the_cpu() -> None:
    """As one that another library runs; it is left as it is."""

    class Foreign(nn.Module):
        def forward(self, batch: Batch) -> Detections:
            return planted_run(batch)

    assert device_of(Foreign()) == CPU
    batch = batch_of(0)
    assert_same(Inference(Foreign(), "auto")(batch), planted_run(batch))


def test_a_detector_that_has_detected_can_be_pickled() -> None:
    detector = Detector(small_model().eval(), ModelCard(small_config(), NAMES, [1, 2, 3]))
    pixels = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    expected = detector(pixels, score=0.06)
    again = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(again(pixels, score=0.06).boxes, expected.boxes)


def test_threads_take_turns() -> None:
    model, recorder = small_model().eval(), Recorder()
    infer = Inference(model, "fp32", record=recorder)
    batches = [batch_of(seed) for seed in range(4)]
    found: dict[int, Detections] = {}
    threads = [threading.Thread(target=lambda k=k: found.setdefault(k, infer(batches[k]))) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, batch in enumerate(batches):
        assert_same(found[k], run_model(model, batch, "fp32"))


# What comes back


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """CPU tensors take the place of a GPU's; what is read from there."""
    seen: list[Tensor] = []

    def send_back(buffer: Tensor) -> Callable[[], Tensor]:
        sent = buffer.clone()  # now, as a stream would: what is written to it later does not count

        def arrive() -> Tensor:
            seen.append(sent)
            return sent

        return arrive

    for room in (fetch, paste):
        monkeypatch.setattr(room, "on_accelerator", lambda masks: True)
    monkeypatch.setattr(fetch, "send_back", send_back)
    return seen


def without_waits(monkeypatch: pytest.MonkeyPatch, guard: NoSync) -> None:
    """On the CPU the encoder is a loop in Python; what takes its place on a GPU does not wait."""
    real = kernels.mask_rle

    def mask_rle(*arguments: Any, **more: Any) -> Any:
        guard.exempt += 1
        with torch._C._DisableTorchDispatch():
            found = real(*arguments, **more)
        guard.exempt -= 1
        return found

    monkeypatch.setattr(paste, "kernels", types.SimpleNamespace(mask_rle=mask_rle))


@pytest.mark.parametrize("score", [0.0, 0.4])
def test_a_batch_comes_in_one_copy(
    score: float, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded, it is one copy; the host waits for nothing before, and then gets what it would make itself."""
    found = found_at_random()
    with monkeypatch.context() as on_host:
        for room in (fetch, paste):
            on_host.setattr(room, "on_accelerator", lambda masks: False)
        expected = encoded(split_detections(found, MAPS, SIZES, score), 0.5)
    reads.clear()
    guard = NoSync(host_tensors=True)
    with monkeypatch.context() as quiet:
        without_waits(quiet, guard)
        with guard:
            fetched = Fetched(found, MAPS, SIZES, score, encode=0.5)
    assert not reads
    objects = fetched.objects()
    assert fetched.cut.tolist() == [3, 40]
    assert len(reads) == 1
    assert sum(map(len, objects)) > 4
    for one, other in zip(objects, expected, strict=True):
        for name in ("boxes", "classes", "scores"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.rles == other.rles
        assert one.probabilities is None
    results = [coco_results(some, [4, 9], [7, 8, 9]) for some in (objects, expected)]
    assert results[0] == results[1]


def test_what_finds_no_room_is_encoded_by_the_host(
    reads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_at_random()
    expected = [one.rles for one in Fetched(found, MAPS, SIZES, encode=0.5).objects()]
    monkeypatch.setattr(paste, "ROOM", 1)
    by_host = []
    windows = fetch.runs_of_windows
    monkeypatch.setattr(fetch, "runs_of_windows", lambda *a: by_host.append(a) or windows(*a))
    assert [one.rles for one in Fetched(found, MAPS, SIZES, encode=0.5).objects()] == expected
    assert by_host


def test_bitmaps_of_a_batch_come_in_one_copy_more(
    reads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Fetched(found_at_random(), MAPS, SIZES).objects()
    assert len(reads) == 1
    copies = []
    real = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self) or real(self))
    together = all_pasted(objects, 0.5)
    assert len(copies) == 1
    monkeypatch.undo()
    for one, other in zip(together, objects, strict=True):
        alone = pasted(other, 0.5).masks
        assert alone is not None
        assert alone.any()
        np.testing.assert_array_equal(one.masks, alone)
        np.testing.assert_array_equal(pasted(encoded([other], 0.5)[0], 0.5).masks, alone)


def test_the_next_batch_may_write_over_what_the_model_gave(reads: list[Tensor]) -> None:
    model, recorder = small_model().eval(), Recorder()
    infer = Inference(model, "fp32", record=recorder)
    begun = [
        Fetched(infer(batch_of(seed)), torch.eye(2, 3).expand(2, 2, 3), [(64, 64)] * 2, encode=0.5)
        for seed in range(BEFORE + 3)
    ]
    for seed, fetched in enumerate(begun):
        alone = run_model(model, batch_of(seed), "fp32")
        expected = encoded(split_detections(alone, torch.eye(2, 3).expand(2, 2, 3), [(64, 64)] * 2), 0.5)
        for one, other in zip(fetched.objects(), expected, strict=True):
            np.testing.assert_array_equal(one.boxes, other.boxes)
            assert one.rles == other.rles
    assert recorder.replays == 3


def test_padding_of_a_batch_is_left_out(reads: list[Tensor]) -> None:
    fetched = Fetched(found_at_random(), MAPS, SIZES[:1], encode=0.5)
    assert len(fetched.objects()) == 1
    assert fetched.cut.tolist() == [3]


def test_packed_tensors_come_apart() -> None:
    parts = [torch.arange(6).view(2, 3), torch.rand(0, 4), torch.rand(3, 5).t(), torch.tensor([True, False])]
    layout = [(part.shape, part.dtype) for part in parts]
    assert all(a.equal(b) for a, b in zip(parts, unpacked(packed(parts), layout), strict=True))


def test_the_whole_way_never_waits(reads: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a batch to what is on its way, eager and replayed."""
    model = small_model().eval()
    batches = [batch_of(seed) for seed in range(BEFORE + 2)]
    infer = Inference(model, "fp32", record=Recorder())
    guard = NoSync(host_tensors=True)
    without_waits(monkeypatch, guard)
    with guard:
        for batch in batches:
            Fetched(infer(batch), MAPS, SIZES, 0.3, encode=0.5)
            Fetched(infer(batch), MAPS, SIZES, 0.3)


@pytest.mark.gpu
def test_on_a_gpu_replays_agree_and_do_not_wait() -> None:
    device = torch.device("cuda")
    model = small_model().to(device).eval()
    infer, plain = Inference(model, "fp32"), Inference(model, "fp32", graphs=False)
    batches = [tree_map(Tensor.pin_memory, batch_of(seed)) for seed in range(BEFORE + 4)]
    for number, batch in enumerate(batches):
        expected = plain(batch)
        torch.cuda.set_sync_debug_mode("error" if number > BEFORE else "default")
        try:
            fetched = Fetched(infer(batch), MAPS, SIZES, encode=0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(infer(batch).scores, expected.scores, rtol=1e-3, atol=1e-4)
        assert len(fetched.objects()) == 2
    assert infer.recorded is not None
    assert not infer.recorded.failed
    assert len(infer.recorded.recordings) == 1
