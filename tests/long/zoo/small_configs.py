"""Configurations of transformers, made small: widths are divided, layers are left out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

# What is a width, by the last word of its name; all widths are divided by one number, so that
# heads x dimensions a head is still the hidden size.
WIDTH = re.compile(
    r"(size|sizes|dim|dims|dimension|channels?|channel_list|rank|d_model|d_ff|d_kv|d_head|d_inner"
    r"|d_rel|n_embd|embd|width|filters|units|planes|scalar|mrope_section|axes_dim\w*)$"
)
NO_WIDTH = re.compile(
    r"vocab|image|img|patch|kernel|window|position|token|index|stride|mel|length|sample|resolution"
    r"|frame|chunk|block_size|context|codebook_size|group_size|group$|max_|min_|feat_sizes|input_size"
    r"|feature_size|input_dim|pool|num_|batch|merge|grid|memory_attention_rope|crop|query_dim"
    r"|in_dim$|state_size|cache|step|beam|fft|hop"
)
HEAD = re.compile(r"head_dim|d_kv|dim_head|d_head|head_size|rotary_dim|mrope|scalar|axes_dim|qk_")
HEADS = re.compile(r"heads?$")
VOCABULARY, EXPERTS = 2048, 16
IMAGES = ("image_size", "img_size", "height", "width")
TOKEN = re.compile(r"(token_id|token_index|token_ids|pad_idx|_token)$")
LAYERS = re.compile(r"(layers?|depths?|num_blocks|encoder_blocks|num_block_repeats)$")
NO_LAYERS = re.compile(r"feat_extract|feature|rope|max_window|index|lstm|adapter|which|_depth$")


@dataclass(frozen=True)
class Step:
    """A way to make a config smaller.

    Attributes:
        divisor: what widths are divided by.
        layers: the most layers of a kind; None: all.
        heads: divide the number of heads instead of the dimensions that each of them has.
        full: keep the numbers of tokens and the sizes of images.
    """

    divisor: int
    layers: int | None = 4
    heads: bool = False
    full: bool = False

    @property
    def most(self) -> int:
        """The most parameters that a model may have: more where less can be left out."""
        return (
            10_000_000 if 8 <= self.divisor < 64 and not (self.heads or self.full) else 30_000_000
        )

    def __str__(self) -> str:
        widths = f"{'heads' if self.heads else 'widths'} / {self.divisor}"
        layers = f"{self.layers} layers" if self.layers else "all layers"
        return f"{widths}, {layers}"


# Ways to make a model small. Of each, the first that gives a model that is small enough is tried.
WAYS = (
    (Step(8), Step(16), Step(32), Step(64)),
    (Step(4, heads=True), Step(8, heads=True), Step(16, heads=True)),
    (Step(8, layers=None), Step(16, layers=None), Step(32, layers=None)),
    (Step(8, full=True), Step(16, full=True)),
    (Step(1), Step(2), Step(4)),
    (Step(1, layers=None, full=True),),
)


def small(config: PreTrainedConfig, step: Step) -> PreTrainedConfig:
    """Return a config of the same class with smaller numbers; parts of it likewise."""
    changed: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            changed[name] = small(value, step)
        else:
            other = _smaller(name, value, step)
            if other != value:
                changed[name] = other
    return type(config)(**{**OVERRIDES.get(config.model_type, {}), **changed})


def default(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return the config with its defaults, and with what it cannot do without."""
    return cls(**OVERRIDES.get(cls.model_type, {}))


def _smaller(name: str, value: Any, step: Step) -> Any:
    if isinstance(value, dict):
        return {key: _smaller(str(key), held, step) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_smaller(name, held, step) for held in value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if not step.full and "vocab_size" in name:
        return min(value, VOCABULARY)
    if not step.full and TOKEN.search(name):
        return min(value, VOCABULARY - 1)
    if not step.full and re.search(r"^(num|n|moe)_.*experts$", name):
        return min(value, EXPERTS)
    if not step.full and name in IMAGES and value > 256:
        return value // 4 if value > 1000 else value // 2
    if step.layers and LAYERS.search(name) and not NO_LAYERS.search(name):
        return min(value, step.layers)
    if step.heads and HEADS.search(name):
        return value // step.divisor if value % step.divisor == 0 else value
    if step.heads and HEAD.search(name):
        return value
    wide = value >= 32 or "mrope_section" in name
    is_width = WIDTH.search(name) and not NO_WIDTH.search(name)
    return value // step.divisor if is_width and wide and value % step.divisor == 0 else value


# Types whose defaults build no model.
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 24},
    "informer": {"prediction_length": 24},
    "time_series_transformer": {"prediction_length": 24},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl_text": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "timm_backbone": {"backbone": "resnet18"},
    "timm_wrapper": {"architecture": "resnet18"},
}
