"""The namespace of the operators.

It comes from the package's own name, so that a copy of this folder under another name registers beside the
original instead of colliding with it. Hugging Face's kernel builder puts a file of its own in its place.
"""

from __future__ import annotations

_NAMESPACE = __package__.replace(".", "_")


def add_op_namespace_prefix(op_name: str) -> str:
    """The name under which an operator is registered, as "fastmrcnn_kernels::nms"."""
    return f"{_NAMESPACE}::{op_name}"
