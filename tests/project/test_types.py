"""A user's program under mypy --strict: what the documentation writes is accepted."""

import subprocess
import sys

import pytest

pytest.importorskip("mypy", reason="mypy comes with the extra `lint`")

PROGRAM = """
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import parasparse as ps
from parasparse.schedules import Cubic


def predicate(name: str, module: nn.Module, tensor: Tensor) -> bool:
    return tensor.numel() > 10


def treatment(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
    return {name: tensor > 0 for name, tensor in tensors.items()}


model: nn.Module = nn.Sequential(nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
names = {"0.weight": 0.5}
mixed: ps.Rules = {nn.Linear: 0.5, "0.*": None, re.compile("a"): ps.Prune(0.5)}
for rules in (names, mixed):
    ps.sparsify(model, rules)
ps.sparsify(model, 0.5)
ps.sparsify(model, "zeros")
ps.sparsify(model, treatment)
ps.sparsify(model, {"0.weight": 0.9, nn.Conv2d: 0.5, predicate: ps.Gate()})
ps.sparsify(model, {(nn.Linear, nn.Conv2d): torch.ones(4, 4), "b": [[1, 0], [0, 1]]})
ps.sparsify(model, [("0.weight", 0.5), (nn.Linear, None)])
table: ps.Plan = ps.plan(model, 0.5)
row: ps.PlanRow = table[0]
total: ps.SummaryRow = ps.summary(model).masked
ps.squash(model, ["0.weight", nn.Linear])
pruner = ps.GradualPruning(model, 0.9, optimizer, schedule=Cubic(0, 1, stop=9), every=1)
ticket = ps.LotteryTicket(model, 0.9, optimizer, rounds=2)
learned = ps.ContinuousSparsification(model, ps.Gate(), steps=3)
moved = ps.rigl(model, 0.9, optimizer, stop=9)
controllers: list[ps.Controller] = [pruner, ticket, learned, moved]
updates: list[ps.Update] = [update for one in controllers for update in one.history]


class Cubed(ps.ProductGate):
    def multiplier(self, mask: ps.Gated, noise: Tensor | None) -> Tensor:
        return mask.logits**3


ps.sparsify(model, ps.Gate(Cubed()))
modules: list[ps.MaskModule] = [ps.Mask(torch.ones(2)), ps.SoftMask(torch.ones(2))]
"""


def test_a_users_program_is_accepted(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
