"""A language model in a folder of transformers: loaded from files alone, and its perplexity."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parasparse.files.checkpoint import CheckpointError
from parasparse.text import listed, needs

_MOST = math.log(sys.float_info.max)


def load(folder: str, tokenizer: str) -> tuple[nn.Module, Any]:
    """Return the causal language model in `folder`, and the tokenizer in the other folder."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise CheckpointError(needs("`prune-blocks`", "transformers", "transformers")) from error
    for place in (folder, tokenizer):
        if not Path(place).is_dir():
            raise CheckpointError(f'"{place}" must be a folder with the files of transformers.')
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            f'"{folder}" must hold a model of transformers; it has no config.json.'
        )
    words = _loaded(AutoTokenizer, tokenizer, "tokenizer (--tokenizer)")
    options = {"dtype": "auto", "output_loading_info": True}
    model, info = _loaded(AutoModelForCausalLM, folder, "model", **options)
    if info["missing_keys"]:
        raise CheckpointError(
            f'"{folder}" must hold a causal language model; it has no '
            f"{listed(sorted(info['missing_keys']))} of {type(model).__name__}."
        )
    return model, words


def _loaded(kind: Any, folder: str, what: str, **options: Any) -> Any:
    """Return what `kind` reads from files in `folder`, without running code that lies there."""
    try:
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # of any kind, and of any library that transformers calls
        reason = shorten(str(error), 400, placeholder=" ...")
        raise CheckpointError(
            f'transformers could not load the {what} in "{folder}": {reason}'
        ) from error


def tokens_of(paths: Sequence[str], tokenizer: Any) -> Tensor:
    """Return the tokens of text files, one file after the other."""
    found = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f'"{path}" cannot be read as text: {error}') from error
        found += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found)


def check_fits(model: Any, tokens: Tensor, length: int) -> None:
    """Raise CheckpointError if `model` has no embedding of a token, or of a position."""
    words = model.get_input_embeddings().weight.shape[0]
    if int(tokens.max()) >= words:
        raise CheckpointError(
            f"the tokenizer must be that of the model, which has {words:,} tokens; the text has "
            f"token {int(tokens.max()):,}. Give its folder as --tokenizer."
        )
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    if length > most:
        raise CheckpointError(
            f"--length must be at most {most}, the longest sequence of the model; got {length}."
        )


def windows(tokens: Tensor, length: int, count: int) -> Tensor:
    """Return at most `count` sequences of `length` tokens, evenly spread."""
    most = min(count, len(tokens) // length)
    starts = [number * (len(tokens) - length) // max(most - 1, 1) for number in range(most)]
    return torch.stack([tokens[start : start + length] for start in starts])


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Do not let the model keep keys and values, which nothing reads again."""
    config: Any = model.config
    cached = getattr(config, "use_cache", None)
    if cached is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if cached is not None:
            config.use_cache = cached


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    """Return exp of the mean loss of each token but the first."""
    device = next(model.parameters()).device
    total = 0.0
    for ids in sequences.to(device).split(1):
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    loss = total / len(sequences)
    return math.exp(loss) if loss < _MOST else math.inf
