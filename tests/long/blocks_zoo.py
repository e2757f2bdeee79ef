"""`prune_blocks` on the model types of transformers: `python -m tests.long.blocks_zoo [type ...]`.

Each type is built small, with made-up inputs. Its blocks are found, and half of the entries of
their weights are pruned. Then the counts must be exact, and the model must run, squashed and
reloaded too. The results go to tests/long/results/blocks_zoo.jsonl. At least 100 types must pass.
"""

from __future__ import annotations

import copy
import sys
import warnings

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING

import parasparse as ps
from parasparse.counts import num_kept
from tests.long.zoo import processes
from tests.long.zoo.page import RESULTS
from tests.long.zoo.small_configs import default
from tests.long.zoo_transformers import model_class, outputs, smallest

WANTED = 100


def check(name: str, found: dict[str, object]) -> None:
    """Add to `found` what is true of one model type; raise if a law does not hold."""
    cls = CONFIG_MAPPING[name]
    found["small"], model, inputs = smallest(model_class(cls), default(cls), found)
    if inputs is None:
        raise LookupError("no inputs were found")
    dense, reports = copy.deepcopy(model), []
    rule = ps.OneShot(0.5, score="wanda", update="none", scope="tensor")
    ps.prune_blocks(model, [inputs], rule, progress=reports.append)
    kept = {n: count for report in reports for n, count in report.kept.items()}
    numel = {n: count for report in reports for n, count in report.numel.items()}
    found["blocks"], found["tensors"] = len(reports), len(kept)
    found["by_magnitude"] = sum(len(report.by_magnitude) for report in reports)
    if not kept or kept != {n: num_kept(count, 0.5) for n, count in numel.items()}:
        raise AssertionError("the counts are not exact")
    masked = outputs(model, inputs)
    squashed = outputs(ps.squash(copy.deepcopy(model)), inputs)
    dense.load_state_dict(ps.dense_state_dict(model))
    for other in (squashed, outputs(dense, inputs)):
        check_close(masked, other)
    found["held"] = True


def check_close(one: list[Tensor], two: list[Tensor]) -> None:
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4, equal_nan=True)


def main(names: list[str]) -> int:
    results = RESULTS / "blocks_zoo.jsonl"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    model_class(CONFIG_MAPPING["clip"])  # imports what most models share
    processes.run(names or sorted(CONFIG_MAPPING), check, results)
    lines = processes.read(results).values()
    held = [line["name"] for line in lines if line.get("held")]
    for line in lines:
        if "error" in line:
            print(line["name"], line["error"])
    print(f"{len(held)} of {len(lines)} types pass; {WANTED} must")
    return 0 if names or len(held) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
