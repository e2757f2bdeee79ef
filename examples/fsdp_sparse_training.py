"""Train a sparse transformer over several processes with FSDP2, stop, go on, and export it dense.

    torchrun --nproc-per-node 2 examples/fsdp_sparse_training.py --steps 60
    torchrun --nproc-per-node 3 examples/fsdp_sparse_training.py --steps 120 --resume

On a CPU over gloo, on GPUs over NCCL. The task: count upwards from any letter, with the first one
as the step. Weights, masks, optimizer and controller are in one distributed checkpoint, which loads
on any number of processes; the last file is a plain dense state dict.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import parasparse as ps

LETTERS, LENGTH, WIDTH, BATCH = 32, 24, 64, 48


class Net(nn.Module):
    """A small causal transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        """Return the logits of the letter after each: (batch, length, letters)."""
        x = self.embedding(letters) + self.position[: letters.shape[1]]
        causal = nn.Transformer.generate_square_subsequent_mask(letters.shape[1], device=x.device)
        for block in self.blocks:
            x = block(x, src_mask=causal)
        return self.head(x)


def batch(step: int, rank: int, world: int, device: torch.device) -> torch.Tensor:
    """Return this process's share of the batch of one step: (batch, length)."""
    generator = torch.Generator().manual_seed(step)
    by = torch.randint(1, LETTERS, (BATCH, 1), generator=generator)
    start = torch.randint(LETTERS, (BATCH, 1), generator=generator)
    counted = (start + by * torch.arange(LENGTH - 1)) % LETTERS
    return torch.cat([by, counted], 1).chunk(world)[rank].to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=Path("out/fsdp"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights everywhere, of which each process keeps its part
    model = ps.sparsify(Net(), {"blocks": 0.0}).to(device)
    if torch.__version__ >= "2.12":
        ps.distributed.shard_masks(model)  # else every process holds all masks
    mesh = init_device_mesh(device.type, (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    dst = ps.rigl(model, {"blocks": args.sparsity}, optimizer, stop=10_000, every=10)

    if args.resume:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "masks": dst.state_dict()}
        dcp.load(state, checkpoint_id=args.out)
        set_state_dict(
            model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
        )
        dst.load_state_dict(state["masks"])

    for step in range(dst.steps, args.steps):
        letters = batch(step, rank, world, device)
        logits = model(letters[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), letters[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dst.step()
        if step % 20 == 19:
            dist.all_reduce(loss := loss.detach() / world)
            if rank == 0:
                print(f"step {step + 1}: loss {loss:.4f}, {len(dst.history)} updates of the masks")
    ps.distributed.check(model)

    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "masks": dst.state_dict()}
    dcp.save(state, checkpoint_id=args.out)

    ps.squash(model)  # plain weights, still sharded
    dense = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        torch.save(dense, args.out / "dense.pt")
        plain = Net()
        plain.load_state_dict(dense)
        inside = [p for name, p in plain.named_parameters() if "blocks" in name and p.ndim > 1]
        zeros = sum(int((p == 0).sum()) for p in inside) / sum(p.numel() for p in inside)
        print(f"written: {args.out / 'dense.pt'}, {100 * zeros:.1f} % of its blocks' weights are 0")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
