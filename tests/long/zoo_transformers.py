"""Every model type of transformers: `python -m tests.long.zoo_transformers [type ...]`.

Each type is built with its default configuration on the meta device, to see what a sparsity alone
reaches, and small, to hold the laws of `tests/long/zoo/checks.py`. The results go to
tests/long/results/zoo_transformers.jsonl, and from there, with `python -m tests.long.zoo.page`,
into docs/zoo.md.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

from tests.long.zoo import checks, processes
from tests.long.zoo.made_up_inputs import Inputs, candidates
from tests.long.zoo.page import RESULTS, report
from tests.long.zoo.small_configs import WAYS, Step, default, small

MAPPINGS = [
    getattr(modeling_auto, name)
    for name in ("MODEL_MAPPING", *dir(modeling_auto))
    if re.fullmatch(r"MODEL_\w*MAPPING", name)
]


def model_class(cls: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    """Return the model of a config: the one of AutoModel, another one, or the class of a part."""
    for mapping in MAPPINGS:
        if cls in mapping:
            found = mapping[cls]
            return found[0] if isinstance(found, tuple) else found
    module = importlib.import_module(cls.__module__.replace(".configuration_", ".modeling_"))
    classes = [held for held in vars(module).values() if inspect.isclass(held)]
    for held in classes:
        if getattr(held, "config_class", None) is cls and "PreTrained" not in held.__name__:
            return held
    part = getattr(module, cls.__name__.removesuffix("Config"), None)
    if part is not None:
        return part
    raise LookupError("no model has this configuration")


def built(model: type[PreTrainedModel], config: PreTrainedConfig, device: str) -> nn.Module:
    no_values = no_init_weights() if device == "meta" else contextlib.nullcontext()
    with torch.device(device), no_values:
        return model(config).to(device).eval()


def check(name: str, found: dict[str, object]) -> None:
    """Add to `found` what is true of one model type."""
    cls = CONFIG_MAPPING[name]
    model = model_class(cls)
    config = default(cls)
    found["class"] = model.__name__
    full = built(model, config, "meta")
    found["kind"] = kind(full, config)
    if all(parameter.ndim < 2 or is_table for parameter, is_table in tables(full)):
        raise LookupError("it has no weights, only embeddings and vectors")
    found.update(checks.reach(full))
    del full
    found["small"], model, inputs = smallest(model, config, found)
    found["inputs"] = sorted(inputs) if inputs else []
    run = None if inputs is None else lambda module: outputs(module, inputs)
    found.update(checks.laws(model, run))
    found["held"] = True


def smallest(
    model: type[PreTrainedModel], config: PreTrainedConfig, found: dict[str, object]
) -> tuple[str, nn.Module, Inputs | None]:
    """Return how it was made small, the first small model that can be run, and its inputs.

    If none can be run, the first that can be built, and None.

    Raises:
        Exception: none can be built.
    """
    not_run: list[tuple[str, nn.Module, None]] = []
    not_built: list[Exception] = []
    for way in WAYS:
        made = first_built(model, config, way, not_built)
        if made is None:
            continue
        inputs, error = runnable(made[1], made[2])
        if inputs is not None:
            return made[0], made[1], inputs
        found.setdefault("not_run", error)
        not_run.append((made[0], made[1], None))
    if not_run:
        return not_run[0]
    raise not_built[0]


def first_built(
    model: type[PreTrainedModel],
    config: PreTrainedConfig,
    way: tuple[Step, ...],
    errors: list[Exception],
) -> tuple[str, nn.Module, PreTrainedConfig] | None:
    """Return the first of these steps that gives a small model, the model, and its config."""
    for step in way:
        try:
            shrunk = small(config, step)
            size = sum(p.numel() for p in built(model, shrunk, "meta").parameters())
            if size > step.most:
                raise ValueError(f"{size:,} parameters")
            torch.manual_seed(0)
            return str(step), built(model, shrunk, "cpu"), shrunk
        except Exception as error:
            errors.append(error)
    return None


def runnable(model: nn.Module, config: PreTrainedConfig) -> tuple[Inputs | None, str]:
    """Return inputs that the model takes, or None and the first error."""
    first = "nothing fits its signature"
    for number, inputs in enumerate(candidates(model, config)):
        try:
            with torch.no_grad():
                if outputs(model, inputs):
                    return inputs, ""
        except Exception as error:
            text = " ".join(str(error).split())
            first = first if number else f"{type(error).__name__}: {text}"[:160]
    return None, first


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    torch.manual_seed(0)
    return [t.clone() for t in checks.tensors_in(model(**inputs)) if t.numel()]


def kind(model: nn.Module, config: PreTrainedConfig) -> str:
    """Return the group that a type belongs to in the table."""
    if any(re.search(r"experts?\b", name) for name, _ in model.named_modules()):
        return "mixture of experts"
    if config.sub_configs:
        return "several parts"
    names = inspect.signature(model.forward).parameters
    for found, words in KINDS.items():
        if any(word in name for name in names for word in words):
            return found
    return "parts and others"


def tables(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Yield each parameter, and whether it belongs to an embedding of torch."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            yield parameter, isinstance(module, nn.Embedding)


KINDS = {
    "text": ("input_ids",),
    "images": ("pixel_values",),
    "sound": ("input_values", "input_features"),
    "time series": ("past_values",),
}


def main(names: list[str]) -> int:
    results = RESULTS / "zoo_transformers.jsonl"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    model_class(CONFIG_MAPPING["clip"])  # imports what most models share
    processes.run(names or sorted(CONFIG_MAPPING), check, results)
    return report(results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
