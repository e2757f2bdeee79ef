"""Write docs/shrink-zoo.md from what was found: `python -m tests.long.zoo.shrink_page`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from tests.long.other_libraries import LIBRARIES
from tests.long.zoo.page import RESULTS, ROOT
from tests.long.zoo.processes import read

PAGE = ROOT / "docs" / "shrink-zoo.md"
PACKAGES = ("torch", "torchvision", "timm", "transformers", *LIBRARIES, "torch-pruning",
            "torch-kirigami")  # fmt: skip
ZOOS = ("torchvision", "timm", "transformers", "others")
OUTCOMES = ("equal", "kept", "refused", "differs", "does not run", "not finished")
# Whose networks, the files of their lines, and the entry of a line.
WAYS = {
    "parasparse, units": ("shrink_zoo", "units"),
    "parasparse, filters": ("shrink_zoo", "filters"),
    "Torch-Pruning": ("shrink_torch_pruning", "units"),
    "torch-kirigami": ("shrink_kirigami", "units"),
}
# All other modules of torchvision hold classifiers.
TASKS = ("segmentation", "detection", "optical_flow", "video")
TEXT = """\
# Shrink on seven libraries

`make test-shrink` removes half of the channels of every model of torchvision, of one model of each
module of timm and {more} others, of a small model of each type of transformers, and of some models
of other libraries: YOLO and RT-DETR (ultralytics), diffusion models (diffusers), segmentation
(segmentation-models-pytorch) and graph networks (torch-geometric). It compares the smaller network
with the masked one. The weights are random and in float64. Biases and norms are
random, too. Nothing is declared: a library gets the model and example inputs.

* **parasparse, units**: half of the units of [`coupled`](how-to/shrink.md), at random.
* **parasparse, filters**: half of the filters of each layer but the last one, at random. Their
  biases and norms are not masked, so they become constants, which are added to later biases. Where
  this is not possible, the filters stay.
* **Torch-Pruning**: half of each group that it finds, at random (`BasePruner` with its defaults).
  As its README asks for, the layers that compute the outputs are in `ignored_layers`, and an
  `output_transform` takes the tensors out of outputs that are objects.
* **torch-kirigami**: half of each axis that its rules declare, at random, as far as it finds no
  conflict (`plan_remove`).

Torch-Pruning and torch-kirigami decide themselves which channels belong together, so they do not
remove the same channels as parasparse. The smaller network shows which ones they have removed. A
copy of the model in which these are set to zero is the masked network in the comparison.

## Results

* **Equal**: the outputs are those of the masked network, for the example inputs, and, where the
  model takes them, for a batch of two and another size: to 1e-6 of the largest output. The largest
  difference of a model of parasparse that counts as equal is {largest}.
* **Kept**: nothing was removed, because the library found nothing that can be removed.
* **Refused**: an error was raised, and there is no smaller network.
* **Differs**: the network is smaller, and computes something else.
* **Does not run**: the network is smaller, and raises an error.
* **Not finished**: {seconds} seconds of processor time, or {gibibytes} GiB, were not enough.

{versions}, CPU.

{missing} models are left out: they are not built by their defaults, or no inputs are known.

| models | library | number | equal | kept | refused | differs | does not run | not finished |
|---|---|---:|---:|---:|---:|---:|---:|---:|
{counts}

"Number" is the number of models on which the library was tried.

## What parasparse does not make equal

{ours}

## Where Torch-Pruning and torch-kirigami stop

The error messages, without numbers and names, and the number of models that raise them. Of some
earlier runs, only the results are known (*message not kept*).

| library | result | models | such as | error |
|---|---|---:|---|---|
{theirs}

<details class="note" markdown="1">
<summary>All models</summary>

"Left" is the share of the parameters that remain when parasparse has removed half of the units.

| model | parameters | left | {ways} |
|---|---:|---:|{rule}|
{table}

</details>
"""


@dataclass(frozen=True)
class Model:
    """A model, and what came of it by way.

    Attributes:
        kind: its row in the table.
        found: the entry of its line: result, why, left, error.
    """

    name: str
    kind: str
    parameters: int
    found: dict[str, dict[str, Any]]


def models() -> tuple[list[Model], int]:
    """Return all models that can be run, and the number of those that cannot."""
    found: list[Model] = []
    missing = 0
    for zoo in ZOOS:
        names = dict.fromkeys(file for file, _ in WAYS.values())
        files = {file: read(RESULTS / f"{file}_{zoo}.jsonl") for file in names}
        for name in sorted({name for lines in files.values() for name in lines}):
            lines = {file: lines[name] for file, lines in files.items() if name in lines}
            if not any("parameters" in line for line in lines.values()):
                missing += 1
                continue
            made = model(zoo, name, lines)
            # a further model of timm may also be the smallest of its module
            if (made.name, made.kind) not in {(each.name, each.kind) for each in found}:
                found.append(made)
    return found, missing


def model(zoo: str, name: str, lines: dict[str, dict[str, Any]]) -> Model:
    line = next(line for line in lines.values() if "parameters" in line)
    kind = line["kind"]
    if zoo == "torchvision":
        kind = kind.replace("_", " ") if kind in TASKS else "classification"
    label = {"timm": zoo, "others": kind}.get(zoo, f"{zoo}, {kind}")
    found = {
        way: lines[file].get(entry, {"result": "not finished", "why": lines[file].get("error", "")})
        for way, (file, entry) in WAYS.items()
        if file in lines
    }
    name = line["class"] if zoo == "timm" else name
    return Model(name, label, line["parameters"], found)


def outcome(found: dict[str, Any]) -> str:
    """Return one of OUTCOMES."""
    if "can't allocate memory" in str(found.get("why")):
        return "not finished"
    if found["result"] == "wrong":
        return "does not run" if "why" in found else "differs"
    return str(found["result"])


def counts(found: list[Model]) -> Iterator[str]:
    groups = defaultdict(list)
    for each in found:
        groups[each.kind].append(each)
    for kind, group in [*groups.items(), ("**all**", found)]:
        for way in WAYS:
            results = [outcome(each.found[way]) for each in group if way in each.found]
            numbers = [len(results), *map(results.count, OUTCOMES)]
            if results:
                yield f"| {kind} | {way} | {' | '.join(map(str, numbers))} |"


def why(found: dict[str, Any]) -> str:
    """Return the reason: of channels that stay, the most frequent ones."""
    reasons = found.get("why", "")
    if not isinstance(reasons, str):
        reasons = "; ".join(reason for reason, _ in reasons[:2])
    return reasons.replace("|", "/")[:160]


def ours(found: list[Model]) -> Iterator[str]:
    rows = [
        f"| {each.name} | {way.split(', ')[1]} | {outcome(result)} | {why(result)} |"
        for each in found
        for way, result in each.found.items()
        if way.startswith("parasparse") and outcome(result) != "equal"
    ]
    if rows:
        yield from ("| model | what was pruned | result | reason |", "|---|---|---|---|", *rows)
    else:
        yield "Every model is equal."


def theirs(found: list[Model]) -> Iterator[str]:
    names = defaultdict(list)
    for each in found:
        for way, result in each.found.items():
            if not way.startswith("parasparse") and "why" in result:
                text = re.sub(r"\d[\d., x]*", "…", why(result))[:100].strip()
                names[way, outcome(result), text].append(each.name)
    for (way, result, text), models in sorted(names.items(), key=lambda item: -len(item[1])):
        yield f"| {way} | {result} | {len(models)} | {models[0]} | {text} |"


def table(found: list[Model]) -> Iterator[str]:
    for each in found:
        left = each.found.get("parasparse, units", {}).get("left")
        share = "" if left is None else f"{left:.0%}"
        cells = [outcome(each.found[way]) if way in each.found else "" for way in WAYS]
        yield f"| {each.name} | {each.parameters:,} | {share} | {' | '.join(cells)} |"


def largest(found: list[Model]) -> float:
    return max(
        result["error"]
        for each in found
        for way, result in each.found.items()
        if way.startswith("parasparse") and result["result"] == "equal"
    )


def lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def write() -> None:
    """Write the page from the files of results that are there."""
    from tests.long.shrink_zoo import GIBIBYTES, MORE, SECONDS

    found, missing = models()
    page = TEXT.format(
        more=MORE,
        seconds=SECONDS,
        gibibytes=GIBIBYTES,
        missing=missing,
        largest=f"{largest(found):.0e}",
        versions=", ".join(f"{name} {version(name).split('+')[0]}" for name in PACKAGES),
        counts=lines(counts(found)),
        ours=lines(ours(found)),
        theirs=lines(theirs(found)),
        ways=" | ".join(WAYS),
        rule="|".join("---" for _ in WAYS),
        table=lines(table(found)),
    )
    PAGE.write_text(page)
    print("written:", PAGE.name, Counter(outcome(r) for m in found for r in m.found.values()))


if __name__ == "__main__":
    write()
