"""One way to measure every operator: closeness first, then time, memory and the share of the floor."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tolerances import largest_error  # one table, for tests and benchmarks
from torch import Tensor

from fastmrcnn.speed.timing import call_times, summary, wait

PASSES = ("forward", "backward", "both")


class NotCloseError(AssertionError):
    """What is to be timed computes something else than the reference."""


@dataclass(frozen=True)
class Traffic:
    """Unique bytes that an operator must move, by the name of what is read or written."""

    forward: dict[str, int]
    backward: dict[str, int] = field(default_factory=dict)

    def bytes(self, which: str) -> int:
        """What both passes read counts once for both."""
        chosen = {
            "forward": self.forward,
            "backward": self.backward,
            "both": {**self.forward, **self.backward},
        }
        return sum(chosen[which].values())


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call. `leaves` are those that get a gradient, `gradient` is that of the output."""

    arguments: dict[str, Any]
    leaves: list[Tensor] = field(default_factory=list)
    gradient: Tensor = field(default_factory=lambda: torch.ones(()))


@dataclass(frozen=True)
class Contest:
    """An operator at one shape, and who computes it.

    Every contestant takes the arguments by name and returns one tensor or a tuple of them.
    """

    title: str
    make_inputs: Callable[[torch.device], Inputs]
    ours: Callable[..., Any]
    exact: Callable[..., Any]  # what the results are held against; may be slow
    peers: dict[str, Callable[..., Any]]
    traffic: Traffic | None = None
    terms: int = 1  # longest sum, for the tolerance of float32
    peers_must_agree: bool = True  # False where a peer computes something a little different


def measure(
    contest: Contest, which: str, device: torch.device, seconds: float, bandwidth: float | None
) -> dict[str, Any]:
    """Gate, then measure ours and every peer.

    Args:
        which: "forward", "backward" or "both".
        seconds: how long to repeat each contestant.
        bandwidth: bytes a second of this device, for the share of the floor; None: leave it out.

    Raises:
        NotCloseError: ours, or a peer that must agree, is too far from `exact`.
    """
    inputs = contest.make_inputs(device)
    expected = results(contest.exact, inputs, which)
    found: dict[str, Any] = {"operator": contest.title, "pass": which}
    found["error"] = check("ours", results(contest.ours, inputs, which), expected, contest.terms)
    copies = list(rotation(inputs, device))
    ours = timed(contest.ours, copies, which, device, seconds)
    found["ours"] = ours
    found["peers"] = {}
    for name, peer in contest.peers.items():
        try:
            found["peers"][name] = against(contest, name, peer, expected, copies, which, device, seconds)
        except NotCloseError:
            raise
        except Exception as error:  # that a peer cannot run here is a result too
            found["peers"][name] = {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        found["peers"][name]["ratio"] = found["peers"][name]["p50_ms"] / ours["p50_ms"]
    if contest.traffic is not None:
        found.update(floor(contest.traffic.bytes(which), ours["p50_ms"], bandwidth))
    return found


def against(
    contest: Contest,
    name: str,
    peer: Callable[..., Any],
    expected: list[Tensor],
    copies: list[Inputs],
    which: str,
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Gate and time a peer."""
    actual = results(peer, copies[0], which)
    found: dict[str, Any] = {}
    if contest.peers_must_agree:
        found["error"] = check(name, actual, expected, contest.terms)
    del actual
    return {**found, **timed(peer, copies, which, device, seconds)}


def floor(unique_bytes: int, milliseconds: float, bandwidth: float | None) -> dict[str, Any]:
    """Rate at which the bytes that must move did, and the share of the time that moving them takes."""
    rate = unique_bytes / (milliseconds / 1e3)
    found = {"unique_bytes": unique_bytes, "gb_per_s": rate / 1e9}
    if bandwidth is not None:
        found |= {"copy_gb_per_s": bandwidth / 1e9, "floor_share": rate / bandwidth}
    return found


def results(function: Callable[..., Any], inputs: Inputs, which: str) -> list[Tensor]:
    """What a pass returns: outputs, gradients, or both."""
    value = prepare(function, inputs, which)()
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check(name: str, actual: list[Tensor], expected: list[Tensor], terms: int) -> float:
    """The largest error over the largest entry; of indices, how many differ, which must be none."""
    if len(actual) != len(expected):
        raise NotCloseError(f"{name} returns {len(actual)} tensors, expected {len(expected)}")
    worst = 0.0
    for index, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != exact.shape:
            raise NotCloseError(
                f"{name}: result {index} is {tuple(ours.shape)}, expected {tuple(exact.shape)}"
            )
        exact = exact.to(ours.device)
        if not ours.is_floating_point():
            different = int((ours != exact).sum())
            if different:
                raise NotCloseError(f"{name}: {different} of {ours.numel()} entries of result {index} differ")
            continue
        largest = float(exact.abs().max())
        error = float((ours.to(exact.dtype) - exact).abs().max())
        if error != 0:  # of zeros, every digit must be zero
            error = error / largest if largest > 0 else float("inf")
        allowed = largest_error(ours.dtype, terms)
        if not error <= allowed:  # also if it is NaN
            raise NotCloseError(f"{name}: result {index} is off by {error:.1e}, {allowed:.1e} allowed")
        worst = max(worst, error)
    return worst


def prepare(function: Callable[..., Any], inputs: Inputs, which: str) -> Callable[[], Any]:
    """The call that is measured."""

    def call() -> Any:
        return function(**inputs.arguments)

    if which == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return call()

        return forward
    if which == "both":

        def both() -> list[Tensor]:
            out = call()
            return [out.detach(), *torch.autograd.grad(out, inputs.leaves, inputs.gradient.to(out.dtype))]

        return both
    out = call()
    gradient = inputs.gradient.to(out.dtype)
    return lambda: torch.autograd.grad(out, inputs.leaves, gradient, retain_graph=True)


def rotation(first: Inputs, device: torch.device) -> Iterator[Inputs]:
    """As many copies of the inputs as it takes to find nothing in the cache when their turn comes."""
    yield first
    if device.type != "cuda":
        return
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    each = sum(t.nbytes for t in _tensors(first.arguments))
    for _ in range(3 * cache // max(each, 1) + 1):
        yield copy_of(first)


def copy_of(inputs: Inputs) -> Inputs:
    """The same values in other memory."""
    copies = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in _tensors(inputs.arguments)}

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copies[id(value)]
        return [swap(part) for part in value] if isinstance(value, list) else value

    arguments = {name: swap(value) for name, value in inputs.arguments.items()}
    return Inputs(arguments, [swap(leaf) for leaf in inputs.leaves], inputs.gradient)


def timed(
    function: Callable[..., Any], copies: list[Inputs], which: str, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Repeat a call over the copies in turn, for about so long.

    Returns:
        Times, the number of calls, and `extra_bytes`: memory beyond inputs, outputs and gradients (None on
        a CPU).
    """
    calls = [prepare(function, inputs, which) for inputs in copies]
    started = time.perf_counter()
    for call in itertools.islice(itertools.cycle(calls), max(3, len(calls))):
        call()
    wait(device)
    extra = extra_memory(calls[0]) if device.type == "cuda" else None
    each = (time.perf_counter() - started) / (max(3, len(calls)) + 1)
    count = max(10, min(1000, int(seconds / max(each, 1e-6))))
    times = summary(call_times(itertools.islice(itertools.cycle(calls), count), device))
    return {**times._asdict(), "extra_bytes": extra, "calls": count}


def extra_memory(call: Callable[[], Any]) -> int:
    """Peak of a call, without what was there before it and what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value = call()
    torch.cuda.synchronize()
    returned = sum(t.nbytes for t in _tensors(value))
    return max(0, torch.cuda.max_memory_allocated() - before - returned)


def host_syncs(call: Callable[[], Any]) -> int:
    """How often a call waits for the GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def assert_no_sync(call: Callable[[], Any]) -> None:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
