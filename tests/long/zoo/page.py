"""Write docs/zoo.md from what the checks have found: `python -m tests.long.zoo.page`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.long.zoo.processes import read

ROOT = Path(__file__).parents[3]
RESULTS, PAGE = ROOT / "tests" / "long" / "results", ROOT / "docs" / "zoo.md"
Line = dict[str, Any]
TEXT = """\
# Transformers and timm

`make test-zoo` checks every model type of transformers that can be built without a download, and
the smallest model of every module of timm. `sparsify(model, 0.5)` is called on each of them.

* **Reached** is the share of the weights that get a mask: of the entries of all parameters with
  two or more dimensions, without embeddings. It is that of the default configuration, on the meta
  device.
* **Squashed** counts the models whose outputs are the same before and after `squash`, bit for bit,
  with gradients off and on, on made-up inputs. Squashed weights, classes, state dict keys,
  Parameters and their order are compared for all models, also for those without inputs.
* **State dicts** counts the models whose state dict is loaded strictly, and comes back bit for bit:
  masked into a dense model (`ps.load_state_dict`), masked into a masked model, dense into a masked
  model, and `dense_state_dict` into a dense model.

The outputs and state dicts of transformers are those of small models: for most, all widths of the
configuration are divided by one number, and four layers are left. "Not built" includes defaults of
transformers that build no model, packages that are missing, and models that stay too large.

transformers {transformers}, timm {timm}, torch {torch}, CPU.

| models | types | reached, lowest | reached, median | built | squashed | state dicts |
|---|---:|---:|---:|---:|---:|---:|
{kinds}

Large tensors (1% of a model or more) without a mask that `plan(model, 0.5).dense` does not list:
{silent}.

## What stays dense

Parameters with two or more dimensions, by the reason that `plan` gives:

| reason | models | largest share of a model |
|---|---:|---:|
{reasons}

The forward passes are watched, too. These large tensors stay dense although activations are
multiplied with them: {products}.

These large tensors are reached although nothing is multiplied with them: {added}.

Models whose outputs, such as codes, a mask does not change: {unmoved}.

<details class="note" markdown="1">
<summary>All models</summary>

"Equal" means outputs, weights and state dicts; "equal weights" that the made-up inputs do not fit,
so that only weights and state dicts were compared.

| model | parameters | reached | result |
|---|---:|---:|---|
{table}

</details>
"""


def text(lines: list[Line]) -> str:
    """Return the page as Markdown."""
    return TEXT.format(
        **{name: version(name).split("+")[0] for name in ("transformers", "timm", "torch")},
        kinds="\n".join(kinds(lines)),
        reasons="\n".join(reasons(lines)),
        silent=listed(lines, "silent"),
        products=listed(lines, "dense_products"),
        added=listed(lines, "reached_unmultiplied"),
        unmoved=", ".join(x["name"] for x in lines if ran(x) and not x["moved"]) or "none",
        table="\n".join(map(row, lines)),
    )


def kinds(lines: list[Line]) -> Iterable[str]:
    groups = defaultdict(list)
    for line in lines:
        groups[line.get("kind", "not built with its defaults")].append(line)
    for kind, group in [
        *sorted(groups.items(), key=lambda item: -len(item[1])),
        ("**all**", lines),
    ]:
        shares = [line["reached"] for line in group if line.get("reached") is not None]
        lowest = f"{min(shares):.1%}" if shares else ""
        median = f"{statistics.median(shares):.1%}" if shares else ""
        built, kept = (sum(key in line for line in group) for key in ("small", "held"))
        numbers = [len(group), lowest, median, built, sum(map(ran, group)), kept]
        yield f"| {kind} | {' | '.join(map(str, numbers))} |"


def reasons(lines: list[Line]) -> Iterable[str]:
    shares = defaultdict(list)
    for line in lines:
        for reason, entries in line.get("dense", {}).items():
            shares[reason].append((entries / line["parameters"], line["name"]))
    for reason, found in sorted(shares.items(), key=lambda item: -len(item[1])):
        most, name = max(found)
        yield f"| {reason} | {len(found)} | {most:.1%} ({name}) |"


def listed(lines: list[Line], key: str) -> str:
    """Return the tensors that the lines have under `key`, with their models."""
    models = defaultdict(list)
    for line in lines:
        for tensor in line.get(key, ()):
            models[tensor].append(line["name"])
    return (
        "; ".join(f"`{tensor}` of {', '.join(names)}" for tensor, names in models.items()) or "none"
    )


def ran(line: Line) -> bool:
    return "held" in line and line["outputs"] > 0


def row(line: Line) -> str:
    share = "" if line.get("reached") is None else f"{line['reached']:.1%}"
    return f"| {line['name']} | {line.get('parameters', 0):,} | {share} | {result(line)} |"


def result(line: Line) -> str:
    if "held" in line:
        return "equal" if ran(line) else "equal weights"
    error = line["error"].replace("|", "/")
    return f"{'differs' if 'small' in line else 'not built'}: {error[:100]}"


def faults(lines: Iterable[Line]) -> list[str]:
    """Return the models that break a law, or have large tensors that are missed silently."""
    return [x["name"] for x in lines if ("small" in x and "held" not in x) or x.get("silent")]


def report(results: Path) -> int:
    """Print the faults in a file of results; return the exit status."""
    found = faults(read(results).values())
    print(f"{len(found)} models break a law: {found}")
    return 1 if found else 0


def write() -> None:
    """Write the page from both files of results."""
    found = [read(RESULTS / f"zoo_{name}.jsonl") for name in ("transformers", "timm")]
    PAGE.write_text(text([line for lines in found for line in lines.values()]))
    print("written:", PAGE.name)


if __name__ == "__main__":
    write()
