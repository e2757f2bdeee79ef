"""Inputs for the models of transformers, made up from their signatures and configurations."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

MOST_TRIES = 20
LENGTH = 16  # of sequences
Inputs = dict[str, Tensor]


def candidates(model: nn.Module, config: PreTrainedConfig) -> Iterator[Inputs]:
    """Yield inputs to try, those that use most of the model first."""
    arguments = inspect.signature(model.forward).parameters
    required = [
        name
        for name, argument in arguments.items()
        if argument.default is argument.empty and argument.kind == argument.POSITIONAL_OR_KEYWORD
    ]
    made = {name: list(MAKERS[name](config)) for name in arguments if name in MAKERS}
    main = [name for name in MAIN if name in made and name not in required]
    tried = []
    for chosen in ([*required, *main], *([*required, name] for name in main), required):
        if chosen and chosen not in tried and all(made.get(name) for name in chosen):
            tried.append(chosen)
            every = itertools.product(*(made[name] for name in chosen))
            for values in itertools.islice(every, MOST_TRIES):
                yield dict(zip(chosen, values, strict=True))


def ids(config: PreTrainedConfig) -> Iterator[Tensor]:
    """Yield token ids that stand for no image, sound or end, and codes of several codebooks."""
    special = {
        value
        for part in parts(config)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    most = min([size for part in parts(config) if (size := number(part, "vocab_size"))] or [100])
    free = [token for token in range(3, 200) if token not in special and token < most] or [0]
    yield torch.tensor(free)[torch.arange(LENGTH) % len(free)][None]
    codebooks = number(config, "num_codebooks", "num_quantizers")
    for count in (codebooks, codebooks + 1) if codebooks else ():
        yield torch.randint(0, 8, (1, LENGTH, count))
        yield torch.randint(0, 8, (1, count, LENGTH))


def perceived(config: PreTrainedConfig) -> Iterator[Tensor]:
    """Yield what Perceiver takes."""
    if number(config, "d_latents"):
        yield torch.randn(1, LENGTH, number(config, "d_model") or 1)


def pictures(config: PreTrainedConfig) -> Iterator[Tensor]:
    sizes = [side(part) for part in parts(config)]
    frames = next((n for part in parts(config) if (n := number(part, "num_frames"))), None)
    for height, width in dict.fromkeys([*filter(None, sizes), (64, 64), (224, 224), (256, 256)]):
        for count in dict.fromkeys((channels(config), 3)):
            yield torch.randn(1, count, height, width)
            if frames or "video" in config.model_type:
                yield torch.randn(1, frames or 2, count, height, width)
    yield from patches(config)


def patches(config: PreTrainedConfig) -> Iterator[Tensor]:
    """Yield images as a sequence of flat patches."""
    for part in parts(config):
        patch, times = number(part, "patch_size"), number(part, "temporal_patch_size") or 1
        if patch:
            yield torch.randn(16, channels(part) * times * patch * patch)
            yield torch.randn(1, 16, channels(part) * times * patch * patch)


def films(config: PreTrainedConfig) -> Iterator[Tensor]:
    frames = number(config, "num_frames", "frames_per_clip") or 2
    for picture in pictures(config):
        if picture.ndim == 4:
            yield picture[:, None].repeat(1, frames, 1, 1, 1)


def spectra(config: PreTrainedConfig) -> Iterator[Tensor]:
    frames = [2 * n for part in parts(config) if (n := number(part, "max_source_positions"))]
    for mel in dict.fromkeys([*bins(config), 80, 128]):
        for count in dict.fromkeys([*frames, 128, 3000, 1024]):
            yield torch.randn(1, mel, count)
            yield torch.randn(1, count, mel)
            yield torch.randn(1, 1, count, mel)


def sounds(config: PreTrainedConfig) -> Iterator[Tensor]:
    for mel in bins(config):
        yield torch.randn(1, number(config, "max_length") or 1024, mel)
    for shape in ((1, 19_200), (1, 1, 19_200), (1, 2, 19_200)):
        yield torch.randn(shape)


def hidden(config: PreTrainedConfig) -> Iterator[Tensor]:
    for width in widths(config):
        yield torch.randn(1, LENGTH, width)
    yield from patches(config)


def past(config: PreTrainedConfig, width: int) -> Iterator[Tensor]:
    """Yield numbers of the past of a time series."""
    lags = max(getattr(config, "lags_sequence", None) or [0])
    long = (number(config, "context_length") or LENGTH) + lags
    yield torch.ones(1, long, width)
    yield torch.ones(1, long)


def past_values(config: PreTrainedConfig) -> Iterator[Tensor]:
    for ones in past(config, number(config, "num_input_channels", "input_size") or 1):
        yield torch.randn_like(ones)


def past_features(config: PreTrainedConfig) -> Iterator[Tensor]:
    yield from past(config, number(config, "num_time_features") or 0)


def image_sizes(config: PreTrainedConfig) -> Iterator[Tensor]:
    for size in [side(part) for part in parts(config)] + [(64, 64)]:
        if size:
            yield torch.tensor([size])


Maker = Callable[[PreTrainedConfig], Iterator[Tensor]]
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids", "audio_codes"), ids),
    **dict.fromkeys(("pixel_values", "sample", "image", "images"), pictures),
    **dict.fromkeys(("input_values", "audio_values", "padded_input_values"), sounds),
    **dict.fromkeys(("hidden_states", "hidden_state", "inputs_embeds"), hidden),
    **dict.fromkeys(("encoder_hidden_states", "embeddings", "query_embeds", "latents"), hidden),
    "inputs": perceived,
    "pixel_values_videos": films,
    "input_features": spectra,
    "bbox": lambda config: iter([torch.zeros(1, LENGTH, 4, dtype=torch.long)]),
    "attention_mask": lambda config: iter([torch.ones(1, LENGTH, dtype=torch.long)]),
    "grid_thw": lambda config: iter([torch.tensor([[1, 4, 4]])]),
    "image_sizes": image_sizes,
    "past_values": past_values,
    "past_time_features": past_features,
    "past_observed_mask": lambda config: map(torch.ones_like, past_values(config)),
}  # fmt: skip
MAIN = (
    "input_ids", "decoder_input_ids", "pixel_values", "pixel_values_videos", "input_features",
    "input_values", "audio_values", "bbox", "past_values", "inputs",
)  # fmt: skip


def parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return a config and the configs in it."""
    below = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for each in below for part in parts(each))]


def number(config: PreTrainedConfig, *names: str) -> int | None:
    """Return the first of these attributes that is a number."""
    values = (getattr(config, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def channels(config: PreTrainedConfig) -> int:
    found = (number(part, "num_channels", "in_channels", "in_chans") for part in parts(config))
    return next(filter(None, found), 3)


def bins(config: PreTrainedConfig) -> list[int]:
    """Return the numbers of bins that spectra may have."""
    names = ("num_mel_bins", "n_mels", "feature_size", "input_dim", "input_feat_per_channel",
             "feature_projection_input_dim", "input_channels", "input_size")  # fmt: skip
    found = (number(part, name) for part in parts(config) for name in names)
    return list(dict.fromkeys(filter(None, found)))


def widths(config: PreTrainedConfig) -> list[int]:
    names = ("hidden_size", "d_model", "embed_dim", "dim", "encoder_hidden_size", "n_embd", "width",
             "input_dim")  # fmt: skip
    found = (number(part, name) for part in parts(config) for name in names)
    return list(dict.fromkeys(filter(None, found)))


def side(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Return height and width of the images that a config asks for."""
    names = ("image_size", "input_size", "img_size")
    size: Any = next(filter(None, (getattr(config, name, None) for name in names)), None)
    if isinstance(size, dict):
        size = [size["height"], size["width"]] if "height" in size else list(size.values())
    if isinstance(size, list | tuple):
        numbers = [value for value in size if isinstance(value, int)]
        return (numbers[0], numbers[-1]) if numbers else None
    return (size, size) if isinstance(size, int) and size > 15 else None
