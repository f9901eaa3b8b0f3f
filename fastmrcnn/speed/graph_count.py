"""What Inductor makes of the step: how many kernels its graphs launch, and the bytes that they move.

Counted when the graphs are scheduled, so it needs no GPU; but then the schedule is that for the CPU, which
fuses somewhat differently. The update of the weights is not in the graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastmrcnn.kernels._ops import add_op_namespace_prefix


class GraphCounts(NamedTuple):
    """Of the forward and backward graph together."""

    generated: int = 0  # kernels that Inductor writes
    library: int = 0  # calls of a library: convolutions, matrix products, sorts
    ours: int = 0  # calls of our operators, each of which launches one kernel or a few
    gigabytes: float = 0.0  # that all of these read and write

    @property
    def launches(self) -> int:
        return self.generated + self.library + self.ours


class GraphCounter:
    def __init__(self) -> None:
        self.counts = GraphCounts()

    def add(self, nodes: list[Any]) -> None:
        from torch._inductor import ir, scheduler

        for node in nodes:
            if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
                continue  # nothing is run: the second is one of several results
            moved = self.counts.gigabytes + node.get_read_write_buffers_sizes() / 1e9
            self.counts = self.counts._replace(gigabytes=moved)
            kind = kind_of(node)
            self.counts = self.counts._replace(**{kind: getattr(self.counts, kind) + 1})


@contextlib.contextmanager
def counting_graphs() -> Iterator[GraphCounter]:
    """Counts the graphs that are compiled within the block.

    A graph out of a cache is not scheduled again, so it takes none from there; kernels it may take.
    """
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor import scheduler

    counter = GraphCounter()
    original = scheduler.Scheduler

    class CountedScheduler(original):  # type: ignore[misc, valid-type]
        def codegen(self) -> Any:
            # Here the schedule is final. Inductor's pass after fusion comes too early: max-autotune has not
            # chosen between kernels of its own and a library's yet.
            counter.add(self.nodes)
            return super().codegen()

    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        scheduler.Scheduler = CountedScheduler  # type: ignore[misc]
        try:
            yield counter
        finally:
            scheduler.Scheduler = original  # type: ignore[misc]


def kind_of(node: Any) -> str:
    """Of a node of a scheduler: generated, library or ours."""
    from torch._inductor import scheduler

    if not isinstance(node, scheduler.ExternKernelSchedulerNode):
        return "generated"
    operator = getattr(node.node, "op_overload", None)
    ours = operator is not None and operator.name().startswith(add_op_namespace_prefix(""))
    return "ours" if ours else "library"
