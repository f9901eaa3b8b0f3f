"""The comparisons of Mask R-CNN (arXiv 1703.06870v3): what was asked, and what was found on COCO.

Both suites answer the same questions with cells of the same names.
"""

from __future__ import annotations

from fastmrcnn.study.suite import Claim, Comparison, Text

MASK = ("segm/AP", "segm/AP50", "segm/AP75")
BOX = ("bbox/AP", "bbox/AP50", "bbox/AP75")
POSE = ("keypoints/AP", "keypoints/AP50", "keypoints/AP75")


def _mask(ap: float, ap50: float, ap75: float) -> dict[str, float]:
    return dict(zip(MASK, (ap, ap50, ap75), strict=True))


def _box(ap: float, ap50: float, ap75: float) -> dict[str, float]:
    return dict(zip(BOX, (ap, ap50, ap75), strict=True))


COMPARISONS = (
    Comparison(
        "backbone",
        "Table 2a",
        Text("Backbone", "骨干网络"),
        Text(
            "Do deeper networks, and a feature pyramid in place of one map, give better masks?",
            "更深的网络、用特征金字塔代替单一特征图，能得到更好的掩码吗？",
        ),
        {
            "r50_c4": "R50-C4",
            "r101_c4": "R101-C4",
            "r50_fpn": "R50-FPN",
            "r101_fpn": "R101-FPN",
            "x101_fpn": "X101-FPN",
        },
        (*MASK, "bbox/AP"),
        (
            Claim("r101_c4", "r50_c4", "segm/AP", 2.4),
            Claim("r50_fpn", "r50_c4", "segm/AP", 3.3),
            Claim("r101_fpn", "r50_fpn", "segm/AP", 1.8),
            Claim("x101_fpn", "r101_fpn", "segm/AP", 1.3),
        ),
        {
            "r50_c4": _mask(30.3, 51.2, 31.5),
            "r101_c4": _mask(32.7, 54.2, 34.3),
            "r50_fpn": _mask(33.6, 55.2, 35.3),
            "r101_fpn": _mask(35.4, 57.3, 37.5),
            "x101_fpn": _mask(36.7, 59.5, 38.9),
        },
    ),
    Comparison(
        "competition",
        "Table 2b",
        Text("A sigmoid for each class, or a softmax over classes", "逐类 sigmoid 与跨类 softmax"),
        Text(
            "Should a mask be predicted for each class by itself, and the class be left to the box head, or "
            "should the classes compete for each pixel?",
            "应当为每个类别独立预测掩码、把分类交给框分支，还是让各类别在每个像素上竞争？",
        ),
        {"c4": "sigmoid", "c4_softmax": "softmax"},
        (*MASK, "bbox/AP"),
        (Claim("c4", "c4_softmax", "segm/AP", 5.5), Claim("c4", "c4_softmax", "segm/AP75", 6.4)),
        {"c4": _mask(30.3, 51.2, 31.5), "c4_softmax": _mask(24.8, 44.1, 25.1)},
    ),
    Comparison(
        "alignment",
        "Table 2c",
        Text("RoIPool, RoIWarp, RoIAlign", "RoIPool、RoIWarp 与 RoIAlign"),
        Text(
            "Does it matter that features are read where the box lies, instead of at rounded places, and is "
            "it the interpolation or the alignment that matters?",
            "在框的真实位置（而不是取整后的位置）读取特征重要吗？起作用的是插值还是对齐？",
        ),
        {
            "c4_pool": "RoIPool",
            "c4_warp_max": "RoIWarp, max",
            "c4_warp": "RoIWarp, average",
            "c4_align_max": "RoIAlign, max",
            "c4": "RoIAlign, average",
        },
        (*MASK, "bbox/AP"),
        (
            Claim("c4", "c4_pool", "segm/AP", 3.4),
            Claim("c4", "c4_pool", "segm/AP75", 5.1),
            Claim("c4", "c4_warp", "segm/AP", 3.2),
            Claim("c4", "c4_align_max", "segm/AP", 0.1, "same"),
        ),
        {
            "c4_pool": _mask(26.9, 48.8, 26.4),
            "c4_warp_max": _mask(27.2, 49.2, 27.1),
            "c4_warp": _mask(27.1, 48.9, 27.1),
            "c4_align_max": _mask(30.2, 51.0, 31.8),
            "c4": _mask(30.3, 51.2, 31.5),
        },
    ),
    Comparison(
        "stride",
        "Table 2d",
        Text("The same at stride 32", "步幅 32 时的对齐"),
        Text(
            "Is alignment worth more where a cell of the map is larger?",
            "当特征图的每个格子更大时，对齐是否更有价值？",
        ),
        {"c5_pool": "RoIPool", "c5": "RoIAlign"},
        (*MASK, *BOX),
        (
            Claim("c5", "c5_pool", "segm/AP", 7.3),
            Claim("c5", "c5_pool", "segm/AP75", 10.5),
            Claim("c5", "c5_pool", "bbox/AP75", 9.5),
        ),
        {
            "c5_pool": _mask(23.6, 46.5, 21.6) | _box(28.2, 52.7, 26.9),
            "c5": _mask(30.9, 51.8, 32.1) | _box(34.0, 55.3, 36.4),
        },
    ),
    Comparison(
        "layout",
        "Table 2e",
        Text("Mask head: convolutions or fully connected layers", "掩码头：卷积还是全连接"),
        Text(
            "Does it help that the mask head keeps the layout of the features?",
            "掩码头保留特征的空间布局有帮助吗？",
        ),
        {"fpn_mlp2": "MLP, 2 layers", "fpn_mlp3": "MLP, 3 layers", "fpn": "FCN"},
        MASK,
        (Claim("fpn", "fpn_mlp2", "segm/AP", 2.1), Claim("fpn", "fpn_mlp3", "segm/AP", 2.1)),
        {
            "fpn_mlp2": _mask(31.5, 53.7, 32.8),
            "fpn_mlp3": _mask(31.5, 54.0, 32.6),
            "fpn": _mask(33.6, 55.2, 35.3),
        },
    ),
    Comparison(
        "agnostic",
        "Section 4.2, text",
        Text("One mask for all classes", "类别无关的掩码"),
        Text(
            "How much is lost if the mask head does not know the class at all?",
            "如果掩码头完全不区分类别，会损失多少？",
        ),
        {"c4": "class-specific", "c4_agnostic": "class-agnostic"},
        MASK,
        (Claim("c4", "c4_agnostic", "segm/AP", 0.6, "same"),),
        {"c4": {"segm/AP": 30.3}, "c4_agnostic": {"segm/AP": 29.7}},
    ),
    Comparison(
        "tasks",
        "Tables 3 and 5",
        Text("Several tasks at once", "多任务训练"),
        Text(
            "Do boxes, masks and keypoints help or hinder one another when one network learns them together?",
            "让同一个网络同时学习框、掩码与关键点，它们会互相促进还是互相妨碍？",
        ),
        {
            "figures_box": "box",
            "figures_mask": "box, mask",
            "figures_keypoint": "box, keypoints",
            "figures_both": "box, mask, keypoints",
        },
        ("bbox/AP", "segm/AP", "keypoints/AP"),
        (
            Claim("figures_mask", "figures_box", "bbox/AP", 1.1),
            Claim("figures_both", "figures_keypoint", "keypoints/AP", 0.5),
            Claim("figures_both", "figures_keypoint", "bbox/AP", 1.3),
            Claim("figures_mask", "figures_both", "segm/AP", 0.7),
        ),
        {
            "figures_box": {"bbox/AP": 52.5},
            "figures_mask": {"bbox/AP": 53.6, "segm/AP": 45.8},
            "figures_keypoint": {"bbox/AP": 50.7, "keypoints/AP": 64.2},
            "figures_both": {"bbox/AP": 52.0, "segm/AP": 45.1, "keypoints/AP": 64.7},
        },
    ),
    Comparison(
        "pose",
        "Table 6",
        Text("RoIPool and RoIAlign for keypoints", "关键点：RoIPool 与 RoIAlign"),
        Text(
            "A keypoint is a single pixel: how much does alignment matter to it?",
            "关键点是单个像素：对齐对它有多重要？",
        ),
        {"figures_keypoint_pool": "RoIPool", "figures_keypoint": "RoIAlign"},
        POSE,
        (
            Claim("figures_keypoint", "figures_keypoint_pool", "keypoints/AP", 4.4),
            Claim("figures_keypoint", "figures_keypoint_pool", "keypoints/AP75", 3.0),
        ),
        {
            "figures_keypoint_pool": dict(zip(POSE, (59.8, 86.2, 66.7), strict=True)),
            "figures_keypoint": dict(zip(POSE, (64.2, 86.6, 69.7), strict=True)),
        },
    ),
    Comparison(
        "sharing",
        "Section 4.4, text",
        Text("RPN trained with the heads, or by itself", "RPN 联合训练与单独训练"),
        Text(
            "Is anything lost if proposals and heads share their features?",
            "如果候选框网络与各分支共享特征，会有损失吗？",
        ),
        {"fpn": "RPN with the heads", "fpn_separate": "RPN by itself"},
        ("segm/AP", "bbox/AP"),
        (Claim("fpn", "fpn_separate", "segm/AP", None, "same"),),
        {},
    ),
)
