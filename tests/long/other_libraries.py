"""Models of other libraries, with inputs: detectors, diffusion models, segmentation, graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Any, list[Any]]
YOLO = ("yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-p2", "yolov8n-cls", "yolov8n-seg",
        "yolov8n-pose", "yolov8n-obb", "yolov9t", "yolov10n", "yolo11n", "yolo11n-seg", "yolo12n",
        "rtdetr-l", "yolov8-rtdetr")  # fmt: skip
SEGMENTATION = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3",
                "DeepLabV3Plus", "Segformer", "UPerNet")  # fmt: skip
GRAPHS = ("GCNConv", "SAGEConv", "GraphConv", "ChebConv", "TAGConv", "SGConv", "ARMAConv",
          "GENConv", "ResGatedGraphConv", "GATConv", "GATv2Conv", "TransformerConv")  # fmt: skip
HEADS = ("GATConv", "GATv2Conv", "TransformerConv")


def image(side: int = 64, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, side, side)


def yolo(name: str) -> Made:
    """A detector or classifier of ultralytics, from its configuration."""
    from ultralytics.nn import tasks

    logging.getLogger("ultralytics").setLevel(logging.CRITICAL)
    kinds = {
        "-seg": tasks.SegmentationModel, "-pose": tasks.PoseModel, "-obb": tasks.OBBModel,
        "-cls": tasks.ClassificationModel, "rtdetr": tasks.RTDETRDetectionModel,
    }  # fmt: skip
    kind = next((kind for part, kind in kinds.items() if part in name), tasks.DetectionModel)
    return kind(f"{name}.yaml", verbose=False), image(), [image(64, 2), torch.randn(1, 3, 96, 64)]


def segmentation(name: str) -> Made:
    """A network of segmentation-models-pytorch over a ResNet-18."""
    import segmentation_models_pytorch as networks

    model = getattr(networks, name)("resnet18", encoder_weights=None, classes=2)
    return model, image(), [image(64, 2), torch.randn(1, 3, 96, 64)]


class Nodes(nn.Module):
    """Two layers of torch-geometric, and a linear one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        options: dict[str, int] = {"heads": 4} if name in HEADS else {}
        options |= {"K": 3} if name == "ChebConv" else {}
        width = 4 if name in HEADS else 16
        self.one = getattr(layers, name)(8, width, **options)
        self.two = getattr(layers, name)(16, width, **options)
        self.three = nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = self.one(x, edges).relu()
        return self.three(self.two(hidden, edges).relu())  # type: ignore[no-any-return]


def graph(name: str) -> Made:
    def nodes(number: int) -> tuple[Tensor, Tensor]:
        return torch.randn(number, 8), torch.randint(number, (2, 4 * number))

    return Nodes(name), nodes(12), [nodes(20)]


STEP = torch.tensor([3])
UNET = {
    "sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8,
    "attention_head_dim": 8,
}  # fmt: skip
CODER = {
    "block_out_channels": (32, 64), "norm_num_groups": 8, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
HEADED = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
PATCHED = {**HEADED, "sample_size": 8, "patch_size": 2}
# Class of diffusers, configuration, and arguments of forward.
DIFFUSION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "UNet2DModel": (
        {**UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        {"sample": image(16), "timestep": 3},
    ),
    "UNet2DConditionModel": (
        {**UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 24},
        {"sample": image(16, channels=4), "timestep": 3,
         "encoder_hidden_states": torch.randn(1, 5, 24)},
    ),
    "AutoencoderKL": (CODER, {"sample": image(16)}),
    "VQModel": (CODER | {"num_vq_embeddings": 16}, {"sample": image(16)}),
    "DiTTransformer2DModel": (
        PATCHED | {"num_embeds_ada_norm": 10},
        {"hidden_states": image(8, channels=4), "timestep": STEP,
         "class_labels": torch.tensor([2])},
    ),
    "PixArtTransformer2DModel": (
        PATCHED | {"out_channels": 8, "cross_attention_dim": 32, "caption_channels": 16},
        {"hidden_states": image(8, channels=4), "encoder_hidden_states": torch.randn(1, 5, 16),
         "timestep": STEP, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3Transformer2DModel": (
        PATCHED | {"joint_attention_dim": 32, "caption_projection_dim": 32, "out_channels": 4,
                   "pooled_projection_dim": 16},
        {"hidden_states": image(8, channels=4), "encoder_hidden_states": torch.randn(1, 5, 32),
         "pooled_projections": torch.randn(1, 16), "timestep": STEP},
    ),
    "FluxTransformer2DModel": (
        HEADED | {"patch_size": 1, "num_layers": 1, "num_single_layers": 1,
                  "joint_attention_dim": 32, "pooled_projection_dim": 16,
                  "axes_dims_rope": [2, 2, 4]},
        {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 5, 32),
         "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([0.3]),
         "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(5, 3)},
    ),
    "SanaTransformer2DModel": (
        HEADED | {"out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
                  "cross_attention_dim": 32, "caption_channels": 16, "sample_size": 8},
        {"hidden_states": image(8, channels=4), "encoder_hidden_states": torch.randn(1, 5, 16),
         "timestep": STEP},
    ),
}  # fmt: skip


def diffusion(name: str) -> Made:
    import diffusers

    options, inputs = DIFFUSION[name]
    return getattr(diffusers, name)(**options), inputs, []


LIBRARIES: dict[str, tuple[Callable[[str], Made], tuple[str, ...]]] = {
    "ultralytics": (yolo, YOLO),
    "diffusers": (diffusion, tuple(DIFFUSION)),
    "segmentation-models-pytorch": (segmentation, SEGMENTATION),
    "torch-geometric": (graph, GRAPHS),
}
NAMES = {name: library for library, (_, names) in LIBRARIES.items() for name in names}
