"""The files that stand beside an exported one: what its users need that have nothing of this program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastmrcnn.deployment.preprocess import preprocessing
from fastmrcnn.errors import UserError
from fastmrcnn.weights.exported import Arrays, ExportedCard

RUNNER = Path(__file__).with_name("run_model.py")
MODEL = "model.onnx"  # the name under which the runner, and Triton Inference Server, look for it
# Of numpy, as config.pbtxt calls them.
_TYPES = {
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float32": "TYPE_FP32",
    "bool": "TYPE_BOOL",
}


def files_beside(
    exported: ExportedCard, model: str, tensors: Mapping[str, Arrays], compiled_for: str | None = None
) -> dict[str, str]:
    """Texts by file name.

    Args:
        model: the file's name.
        tensors: "input" and "output": of each tensor by name an array of its shape and type.
        compiled_for: the kind of device that AOTInductor compiled it for; None: it is not compiled.
    """
    told = preprocessing(exported, list(tensors["output"]), compiled_for)
    texts = {
        "labels.txt": "".join(f"{name}\n" for name in exported.card.class_names),
        "preprocessing.json": json.dumps(told, indent=2) + "\n",
        "run_model.py": RUNNER.read_text(encoding="utf-8").replace(f'"{MODEL}"', json.dumps(model)),
    }
    if Path(model).suffix == ".onnx":
        texts["config.pbtxt"] = triton_config(model, tensors)
    return texts


def triton_config(model: str, tensors: Mapping[str, Arrays]) -> str:
    """Triton Inference Server's description of the file.

    The batch is fixed, so it is one of the dimensions, and the server batches nothing by itself.
    """
    lines = [
        f"name: {json.dumps(Path(model).stem)}",
        'platform: "onnxruntime_onnx"',
        f"default_model_filename: {json.dumps(model)}",
        "max_batch_size: 0",
    ]
    for kind, arrays in tensors.items():
        entries = [
            f'  {{ name: "{name}", data_type: {_TYPES[str(array.dtype)]}, dims: {list(array.shape)} }}'
            for name, array in arrays.items()
        ]
        lines += [f"{kind} [", ",\n".join(entries), "]"]
    return "\n".join(lines) + "\n"


def check_labels(names: Sequence[str]) -> None:
    """UserError for a class name that cannot be a line."""
    for name in names:
        if len(name.splitlines()) != 1:
            raise UserError(
                f"the class {name!r} is no line of text, and labels.txt has a line for each class"
            )
