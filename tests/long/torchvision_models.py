"""The law of squash on every torchvision model: `python -m tests.long.torchvision_models [name]`.

Each model is built with random weights, sparsified to 80%, and squashed. The outputs of the masked
and the squashed model must be equal bit for bit. Without names, docs/models.md is written.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision import models

import parasparse as ps

SPARSITY = 0.8
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# What makes a model take a small input, or say something about random ones: the first match wins.
OPTIONS = {
    "vit_*": {"image_size": 64},
    "vit_h_14": {"image_size": 56},
    "inception_v3": {"init_weights": False},
    "googlenet": {"init_weights": False},
    "quantized_inception_v3": {"init_weights": False},
    "quantized_googlenet": {"init_weights": False},
    "*rcnn*": {"min_size": 96, "max_size": 128, "box_score_thresh": 0.0, "weights_backbone": None},
    "retinanet*": {"min_size": 96, "max_size": 128, "score_thresh": 0.0, "weights_backbone": None},
    "fcos*": {"min_size": 96, "max_size": 128, "score_thresh": 0.0, "weights_backbone": None},
    "ssd*": {"score_thresh": 0.0, "weights_backbone": None},
    "deeplab*": {"weights_backbone": None},
    "fcn*": {"weights_backbone": None},
    "lraspp*": {"weights_backbone": None},
}
SHAPES = {
    "vit_h_14": (1, 3, 56, 56),
    "maxvit_t": (1, 3, 224, 224),
    "*inception_v3": (1, 3, 80, 80),
    "mvit*": (1, 3, 16, 224, 224),
    "s3d": (1, 3, 16, 224, 224),
    "swin3d*": (1, 3, 4, 64, 64),
    "r3d_18": (1, 3, 4, 32, 32),
    "mc3_18": (1, 3, 4, 32, 32),
    "r2plus1d_18": (1, 3, 4, 32, 32),
    "raft*": (1, 3, 128, 128),
    "*rcnn*": (1, 3, 96, 128),
    "*": (1, 3, 64, 64),
}
TEXT = """\
# Models

All {number} models of `torchvision.models.list_models()` give the same outputs before and after
`squash`. Each model is built with random weights, sparsified to {sparsity}, and squashed. For every
model:

* The outputs of the masked model, of a squashed copy and of the squashed model are equal, bit for
  bit.
* The squashed weights are equal, bit for bit, to the weights that `torch.where` selects.
* The classes of the modules, the state dict keys, and the Parameters and their order are those of
  the original model.

torch {torch}, torchvision {torchvision}, CPU; {number} models, {minutes} minutes.

<details class="note" markdown="1">
<summary>All models</summary>

| model | parameters | masked tensors | entries | kept | input | outputs compared |
|---|---:|---:|---:|---:|---|---:|
{table}

</details>
"""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    parameters: int
    tensors: int
    masked: int
    kept: int
    shape: tuple[int, ...]
    outputs: int
    seconds: float


def matching(table: dict[str, object], name: str) -> object:
    """Return the entry of `name` itself, else of the first glob that matches it."""
    found = [value for key, value in table.items() if fnmatchcase(name, key)]
    return table.get(name, found[0] if found else {})


def flat(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out
    return [tensor for value in values for tensor in flat(value)]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether all bits agree: NaN equals itself, -0.0 is not 0.0."""
    return len(one) == len(two) and all(
        a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(one, two, strict=True)
    )


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, **matching(OPTIONS, name)).eval()
    fading = fnmatchcase(name, "*mobilenet_v3*")  # as torchvision draws it, little arrives
    for parameter in model.parameters():
        # Where all is 0, nothing before it would matter.
        if parameter.ndim > 1 and (fading or not parameter.any()):
            nn.init.kaiming_normal_(parameter)
    return model


def check(name: str) -> Row:
    """Hold the law on one model.

    Raises:
        AssertionError: it does not hold.
    """
    start = time.perf_counter()
    model = build(name)
    shape = matching(SHAPES, name)
    image = torch.randn(shape)
    pair = name.startswith("raft")

    def run(model: nn.Module) -> list[Tensor]:
        return [
            out.contiguous()
            for out in flat(model(image, image.roll(1, 3)) if pair else model(image))
        ]

    classes = [type(module) for module in model.modules()]
    keys, order = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    identities = [id(parameter) for parameter in model.parameters()]
    rows = ps.plan(model, SPARSITY)
    with torch.no_grad():
        dense = run(model)
        originals = {row.name: model.get_parameter(row.name).clone() for row in rows}
        ps.sparsify(model, SPARSITY)
        masks = {name: mask.clone() for name, mask in ps.named_masks(model)}
        sparse = run(model)
        outputs = sum(tensor.numel() for tensor in sparse)
        assert outputs, "the output is empty: nothing was compared"
        assert not same(sparse, dense), "masks change nothing"
        table = ps.summary(model)
        for row in table.rows:
            assert row.kept == row.numel - round(SPARSITY * row.numel), row.name
        assert [row.name for row in rows] == [row.name for row in table.rows]
        twin = ps.squash(copy.deepcopy(model))
        assert same(run(twin), sparse), "the squashed copy differs"
        del twin
        assert same(run(model), sparse), "squashing a copy changed the original"
        ps.squash(model)
        assert same(run(model), sparse), "the squashed model differs"
        for weight, original in originals.items():
            selected = torch.where(masks[weight], original, 0.0)
            assert same([model.get_parameter(weight)], [selected]), f"{weight}: other bits"
    assert not ps.is_sparse(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == order
    assert [id(parameter) for parameter in model.parameters()] == identities
    return Row(
        name=name,
        parameters=table.model.numel,
        tensors=len(table.rows),
        masked=table.masked.numel,
        kept=table.masked.kept,
        shape=shape,
        outputs=outputs,
        seconds=time.perf_counter() - start,
    )


def page(rows: list[Row]) -> str:
    """Return the page as Markdown."""
    return TEXT.format(
        number=len(rows),
        sparsity=f"{SPARSITY:.0%}",
        torch=torch.__version__.split("+")[0],
        torchvision=torchvision.__version__.split("+")[0],
        minutes=f"{sum(row.seconds for row in rows) / 60:.0f}",
        table="\n".join(map(line, rows)),
    )


def line(row: Row) -> str:
    size = " x ".join(map(str, row.shape))
    return (
        f"| {row.name} | {row.parameters:,} | {row.tensors} | {row.masked:,} | {row.kept:,} "
        f"| {size} | {row.outputs:,} |"
    )


def main(names: list[str]) -> int:
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    rows, failed = [], []
    for name in names or models.list_models():
        try:
            rows.append(check(name))
            print(f"{name:<36} equal  {rows[-1].seconds:6.1f} s", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            print(f"{name:<36} FAILED", flush=True)
        gc.collect()
    print(f"{len(rows)} models hold the law, {len(failed)} do not: {failed}")
    if not names and not failed:
        PAGE.write_text(page(rows))
        print("written:", PAGE.name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
