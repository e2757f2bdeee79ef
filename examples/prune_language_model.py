"""Train a small character language model, prune it in one shot in many ways, and compare.

The text is the standard library's own sources. The model is trained once, and kept in `out/`; each
seed draws another text for calibration.

    python examples/prune_language_model.py --seeds 3
"""

import argparse
import copy
import math
import statistics
import sysconfig
import time
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
    """Return training and validation text as tokens: newline, the printable characters, others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    folders = (root, root / "asyncio", root / "email")
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    content = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    codes = torch.frombuffer(bytearray(content.encode("ascii", "replace")), dtype=torch.uint8)
    known = (codes >= 32) & (codes < 127)
    ids = torch.where(known, codes.long() - 31, torch.where(codes == 10, 0, ord("?") - 31))
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def draw(ids, number, generator, length=CONTEXT):
    starts = torch.randint(len(ids) - length, (number,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts])


def train(ids, steps):
    torch.manual_seed(0)
    model, generator = LanguageModel(), torch.Generator().manual_seed(1)
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
    return model.eval()


@torch.no_grad()
def perplexity(model, ids, number=64):
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
    "and swaps": lambda *s, **how: ps.OneShot(
        *s, score="wanda", update="least_squares", swaps=20, **how
    ),
    "ADMM": lambda *s, **how: ps.OneShot(*s, scope="tensor", **how),
}
SPARSITIES = {
    **{f"{share}%": ((share / 100,), {}) for share in (50, 60, 70, 80, 90)},
    "2:4": ((), {"pattern": n_of_m(2, 4)}),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1400, help="training steps")
    parser.add_argument("--seeds", type=int, default=1, help="draws of calibration text")
    parser.add_argument("--sequences", type=int, default=128, help="sequences of calibration text")
    parser.add_argument("--reconstruct", type=int, default=200, help="steps of `reconstruct`")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--sparsities", nargs="+", default=[*SPARSITIES], choices=SPARSITIES)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(arguments)
    training, validation = text()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / f"language_model_{args.steps}.pt"
    if not kept.exists():
        torch.save(train(training, args.steps).state_dict(), kept)
    dense = LanguageModel().eval()
    dense.load_state_dict(torch.load(kept))

    found = {}
    for seed in range(args.seeds):
        drawn = draw(training, args.sequences, torch.Generator().manual_seed(11 + seed))
        batches = drawn.split(32)
        for sparsity in args.sparsities:
            shares, how = SPARSITIES[sparsity]
            for method in args.methods:
                model = copy.deepcopy(dense)
                ps.prune_blocks(model, batches, METHODS[method](*shares, **how))
                found.setdefault((method, sparsity), []).append(perplexity(model, validation))
            if args.reconstruct:  # of the last method
                ps.reconstruct(model, dense, drawn.split(8), steps=args.reconstruct)
                key = (f"{method}, reconstruct", sparsity)
                found.setdefault(key, []).append(perplexity(model, validation))
    show(found, perplexity(dense, validation), args.sparsities)


def show(found, dense, sparsities):
    """Print mean perplexities, and what is added to that of the dense model."""
    print(f"\nperplexity on held-out text; dense {dense:.3f}")
    print("".join([" " * 20, *(f"{sparsity:>9}" for sparsity in sparsities)]))
    for method in dict.fromkeys(method for method, _ in found):
        means = [statistics.mean(found[method, sparsity]) for sparsity in sparsities]
        print("".join([f"{method:20}", *(f"{mean:9.3f}" for mean in means)]))
    if ("SparseGPT", sparsities[0]) in found and ("ADMM", sparsities[0]) in found:
        rises = [
            [statistics.mean(found[method, sparsity]) - dense for method in ("ADMM", "SparseGPT")]
            for sparsity in sparsities
        ]
        shares = [f"{one / other:9.2f}" for one, other in rises]
        print("".join([f"{'rise, of SparseGPT':20}", *shares]))


if __name__ == "__main__":
    main()
