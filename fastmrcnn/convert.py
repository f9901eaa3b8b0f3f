"""python -m fastmrcnn.convert: weights of torchvision and detectron2 to ours, and ours to theirs."""

from __future__ import annotations

import pickle
import shlex
from pathlib import Path

from torch import Tensor

from fastmrcnn.config.file import load_config
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.files import replacing, to_write
from fastmrcnn.weights.checkpoint import pack, write_tensors
from fastmrcnn.weights.detectors import SPARE, WeightsFile, open_weights
from fastmrcnn.weights.peers.class_rows import class_count
from fastmrcnn.weights.peers.classes import COCO, COCO_LABELS, ClassTable, coco_with_unused, read_classes
from fastmrcnn.weights.peers.programs import PROGRAMS, export_state
from fastmrcnn.weights.states import COUNTER
from fastmrcnn.weights.trained import as_trained
from fastmrcnn.weights.zoo import architecture_of, other_settings


def main(argv: list[str]) -> None:
    parser = Parser(
        "convert",
        "Convert a detector's weights. What IN holds is found from its keys: a checkpoint of this program, "
        "or a state dict of torchvision (.pth) or detectron2 (.pth, .pkl). Nothing in a file is run.",
    )
    parser.add_argument("input", metavar="IN", help="file, URL, or folder of a run (its last checkpoint)")
    parser.add_argument(
        "output", metavar="OUT", help="file to write; for detectron2 .pkl gives a pickle of numpy arrays"
    )
    parser.add_argument(
        "--to", choices=PROGRAMS, help="what to write (default: fastmrcnn, unless IN is that already)"
    )
    parser.add_argument(
        "--config", help="recipe of the model, for --to fastmrcnn (default: found from its architecture)"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="class names, one a line, or a COCO file (default: COCO's 80)"
    )
    parser.add_argument(
        "--all-labels",
        action="store_true",
        help="keep the ten labels without a class in torchvision's COCO models, each as a class",
    )
    parser.add_argument("--cast", action="store_true", help="turn float16, bfloat16 or float64 into float32")
    arguments = parser.parse_args(argv)
    output = to_write(arguments.output)
    if output.exists():
        raise UserError(f"{output}: is already there; choose another OUT or remove it")
    classes = read_classes(arguments.classes) if arguments.classes else None
    if arguments.all_labels:
        classes = classes or coco_with_unused()
    labels = COCO_LABELS if arguments.all_labels else None if classes is None else len(classes.names)
    file = open_weights(arguments.input, num_classes=labels, cast=arguments.cast)
    program = file.imported.program
    if arguments.to is None and program == "fastmrcnn":
        raise UserError(f"{file.path}: is a checkpoint of this program; say --to torchvision or detectron2")
    if (arguments.to or "fastmrcnn") == "fastmrcnn":
        to_checkpoint(file, output, arguments.config, classes)
    else:
        if arguments.config is not None:
            raise UserError(f"--config is for --to fastmrcnn; {arguments.to} keeps its settings in code")
        to_program(file, output, arguments.to, classes)


def to_checkpoint(
    file: WeightsFile, output: Path, config: str | None = None, classes: ClassTable | None = None
) -> None:
    """Write a checkpoint of ours, with its configuration and classes."""
    trained, lines = as_trained(file, None if config is None else load_config(config), classes)
    spare = file.imported.spare
    extra = {SPARE: spare} if spare else None
    write_tensors(output, pack(step=file.step, model=trained.model, card=trained.card, extra=extra))
    print(*lines, sep="\n")
    word = shlex.quote(str(output))
    print(f"Written: {output}. Judge it, look at what it sees, or train it on your own classes:")
    print(
        f"  python -m fastmrcnn.evaluate --checkpoint {word} data.val.images=DIR data.val.annotations=FILE\n"
        f"  python -m fastmrcnn.predict IMAGE --checkpoint {word} --output DIR\n"
        f"  python -m fastmrcnn.train --config RECIPE model.weights={word} data.train.images=DIR ..."
    )


def to_program(file: WeightsFile, output: Path, program: str, classes: ClassTable | None = None) -> None:
    """Write a state dict that loads in the other program."""
    imported = file.imported
    count = class_count(imported.state) or 0
    if classes is not None and len(classes.ids) != count:
        raise UserError(f"{file.path}: has {count} classes, but {len(classes.ids)} names were given")
    ids = classes.ids if classes else file.card.category_ids if file.card else default_ids(count)
    state = {key: value for key, value in imported.state.items() if not key.endswith(COUNTER)}
    theirs = export_state(state, program, file.path, ids, imported.spare)
    if program == "detectron2" and output.suffix == ".pkl":
        arrays = {key: value.numpy() for key, value in theirs.items()}
        with replacing(output) as stream:
            # Protocol 4 is what older Python and numpy read too.
            pickle.dump({"model": arrays, "__author__": "fastmrcnn"}, stream, protocol=4)
    else:
        write_tensors(output, {"model": theirs} if program == "detectron2" else theirs)
    print(f"{file.path}: {imported.program}, {count} classes", *file.lines, sep="\n")
    print(f"Written: {output}, {len(theirs)} tensors under {program}'s names")
    for line in remarks(program, file, theirs):
        print(line)


def default_ids(count: int) -> list[int]:
    return list(COCO.ids) if count == len(COCO.ids) else list(range(1, count + 1))


def remarks(program: str, file: WeightsFile, theirs: dict[str, Tensor]) -> list[str]:
    """What the weights alone do not say, and the other program has to be told."""
    lines = []
    if program == "torchvision" and "roi_heads.box_predictor.cls_score.bias" in theirs:
        labels = len(theirs["roi_heads.box_predictor.cls_score.bias"])
        lines.append(f"Build its model with num_classes={labels}; label 0 is the background")
    if file.card is not None:
        differing = other_settings(file.card.config.model, program, architecture_of(file.imported.state))
        if differing:
            lines.append(
                f"To detect the same, {program} needs the settings of this model where its own are others: "
                f"{'; '.join(differing)}"
            )
    return lines


if __name__ == "__main__":
    run_main(main)
