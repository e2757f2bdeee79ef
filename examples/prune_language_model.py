"""Train a small character language model, prune it in one shot in many ways, and compare.

The text is the standard library's own sources. Each seed trains a model, which is kept in `out/`,
and draws the text for calibration.

    python examples/prune_language_model.py
"""

import argparse
import copy
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import parasparse as ps
from parasparse.patterns import n_of_m

WIDTH, LAYERS, HEADS, CONTEXT, CHARACTERS = 96, 3, 4, 96, 96


class Block(nn.Module):
    """Causal attention and an MLP, each after a norm and beside a residual connection."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        """Return hidden states of the shape of `x`, (sequences, characters, width)."""
        shape = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """A transformer that predicts the next character."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, 0.02)

    def forward(self, ids):
        """Return logits (sequences, characters, 96) for the character after each."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text():
    """Return training and validation text as tokens."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = (root, root / "asyncio", root / "email")
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    ids = tokens("\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files))
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def tokens(content):
    """Return the tokens of a text: newline, the printable characters, "?" for all others."""
    codes = torch.frombuffer(bytearray(content.encode("ascii", "replace")), dtype=torch.uint8)
    known = (codes >= 32) & (codes < 127)
    return torch.where(known, codes.long() - 31, torch.where(codes == 10, 0, ord("?") - 31))


def draw(ids, number, generator, length=CONTEXT):
    starts = torch.randint(len(ids) - length, (number,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts])


def trained(ids, steps, seed, out):
    """Return the model of this seed: what an earlier run has left in `out`, or a new one."""
    kept = out / f"language_model_{steps}_{seed}.pt"
    if not kept.exists():
        out.mkdir(parents=True, exist_ok=True)
        torch.save(train(ids, steps, seed).state_dict(), kept)
    model = LanguageModel().eval()
    model.load_state_dict(torch.load(kept))
    return model


def train(ids, steps, seed):
    torch.manual_seed(seed)
    model, generator = LanguageModel(), torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * decay + 2e-5
        batch = draw(ids, 8, generator, CONTEXT + 1)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss:.3f}, {time.time() - start:.0f} s", flush=True)
    return model


@torch.no_grad()
def perplexity(model, ids, number=256):
    batch = draw(ids, number, torch.Generator().manual_seed(7), CONTEXT + 1)
    losses = [
        F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        for part in batch.split(16)
    ]
    return float(torch.stack(losses).mean().exp())


METHODS = {
    "magnitude": ps.Prune,
    "Wanda": lambda *s, **how: ps.OneShot(*s, score="wanda", update="none", **how),
    "RIA": lambda *s, **how: ps.OneShot(*s, score="ria", update="none", **how),
    "SparseGPT": lambda *s, **how: ps.OneShot(*s, update="obs", scope="tensor", **how),
    "least squares": lambda *s, **how: ps.OneShot(*s, score="wanda", update="least_squares", **how),
    "with swaps": lambda *s, **how: ps.OneShot(
        *s, score="wanda", update="least_squares", swaps=20, **how
    ),
    "ADMM": lambda *s, **how: ps.OneShot(*s, scope="tensor", **how),
}
SPARSITIES = {
    **{f"{share}%": ((share / 100,), {}) for share in (50, 60, 70, 80, 90)},
    "2:4": ((), {"pattern": n_of_m(2, 4)}),
}


RECONSTRUCTED = ("magnitude", "ADMM")


def compare(dense, calibration, validation, methods, sparsities, steps) -> Iterator:
    """Yield the method, the sparsity and the perplexity of each pruned copy of `dense`."""
    for sparsity in sparsities:
        shares, how = SPARSITIES[sparsity]
        for method in methods:
            model = copy.deepcopy(dense)
            ps.prune_blocks(model, calibration.split(32), METHODS[method](*shares, **how))
            yield method, sparsity, perplexity(model, validation)
            if steps and method in RECONSTRUCTED:
                ps.reconstruct(model, dense, calibration.split(8), steps=steps)
                yield f"{method}, reconstruct", sparsity, perplexity(model, validation)


def calibration_text(ids, number, seed):
    return draw(ids, number, torch.Generator().manual_seed(11 + seed))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1400, help="training steps")
    parser.add_argument("--seeds", type=int, default=3, help="models, and draws of text")
    parser.add_argument("--sequences", type=int, default=128, help="sequences of calibration text")
    parser.add_argument("--reconstruct", type=int, default=200, help="steps of `reconstruct`")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--sparsities", nargs="+", default=[*SPARSITIES], choices=SPARSITIES)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(arguments)
    start, (training, validation) = time.time(), text()
    perplexities = {}
    for seed in range(args.seeds):
        dense = trained(training, args.steps, seed, args.out)
        perplexities.setdefault(("dense", ""), []).append(perplexity(dense, validation))
        calibration = calibration_text(training, args.sequences, seed)
        choice = (args.methods, args.sparsities, args.reconstruct)
        for method, sparsity, found in compare(dense, calibration, validation, *choice):
            print(f"seed {seed}, {sparsity}, {method}: {found:.3f}", flush=True)
            perplexities.setdefault((method, sparsity), []).append(found)
    means = {key: statistics.mean(found) for key, found in perplexities.items()}
    show(means.pop(("dense", "")), means, args.sparsities)
    print(f"{(time.time() - start) / 60:.1f} minutes")


def show(dense, means, sparsities):
    """Print the perplexities, and how much they rise over `dense`, in parts of SparseGPT's rise."""
    methods = list(dict.fromkeys(method for method, _ in means))
    print("".join([f"\n{'perplexity':24}", *(f"{sparsity:>9}" for sparsity in sparsities)]))
    print(f"{'dense':24}" + f"{dense:9.3f}" * len(sparsities))
    for method in methods:
        print(f"{method:24}" + "".join(f"{means[method, s]:9.3f}" for s in sparsities))
    if "SparseGPT" in methods:
        print("rise over dense, relative to that of SparseGPT")
        for method in methods:
            rises = [(means[m, s] - dense for m in (method, "SparseGPT")) for s in sparsities]
            print(f"{method:24}" + "".join(f"{one / other:9.2f}" for one, other in rises))


if __name__ == "__main__":
    main()
