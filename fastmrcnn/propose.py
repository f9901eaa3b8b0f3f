"""python -m fastmrcnn.propose: write an RPN's proposals to a file, to train heads by themselves."""

from __future__ import annotations

from fastmrcnn.data.build import image_options
from fastmrcnn.data.coco import read_coco
from fastmrcnn.data.proposals import write_proposals
from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.evaluation.proposals import collect_proposals, proposal_recall
from fastmrcnn.files import expanded, to_write
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.trained import load_overridden


def main(argv: list[str]) -> None:
    parser = Parser("propose", "Write the proposals of a model's RPN for all images of a data set.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint, run folder (its last one), or file or URL of a torchvision or detectron2 model",
    )
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--annotations", required=True, help="COCO-format JSON file")
    parser.add_argument("--output", required=True, help="file to write, .npz")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:0")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="of the checkpoint's configuration, such as model.rpn.post_nms_top_n_test=2000",
    )
    arguments = parser.parse_intermixed_args(argv)
    output = to_write(arguments.output)
    if output.suffix != ".npz":
        raise UserError(f"--output {output}: must end in .npz")
    if output.exists():
        raise UserError(f"{output}: is there already; choose another --output")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: its folder {output.parent} is not there")
    trained = load_overridden(arguments.checkpoint, arguments.device, arguments.overrides)
    model, config = trained.model, trained.card.config
    if not isinstance(model, MaskRCNN):
        raise UserError(f"{arguments.checkpoint}: is exported and gives no proposals; take the run itself")
    if model.rpn is None:
        raise UserError(f"{arguments.checkpoint}: this model has no RPN that could propose")
    dataset = read_coco(
        expanded(arguments.images),
        expanded(arguments.annotations),
        max_objects=config.data.max_objects,
        min_box_side=config.data.min_box_side,
        require_masks=False,
        keep_tree=True,
        boxes=config.data.boxes,
        keep_group_classes=config.data.keep_group_classes,
        image_options=image_options(config),
        key="--annotations",
    )
    print(*dataset.summary(), sep="\n")
    found = collect_proposals(model, dataset, config)
    write_proposals(output, found)
    print(
        f"{sum(len(one.scores) for one in found.values())} proposals of {len(found)} images are in {output}"
    )
    proposal_recall(dataset, found)


if __name__ == "__main__":
    run_main(main)
