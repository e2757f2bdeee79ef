#!/usr/bin/env bash
# torch-pruning 1.6.1, torch 2.15.0: a weight that is cut becomes a new Parameter, which requires grad
# and is tied to nothing. Frozen layers train again, and tied layers come apart.
#
# Nothing is said, and at first the smaller model computes what it should. An optimizer that is made
# afterwards, as it has to be, then trains the frozen weights, and the output layer and the embedding
# that were one tensor drift apart. Freeze and tie again after each step of the pruner.
#
# Seen:
#   before: fc1 frozen True, head tied True, 3 trainable tensors
#   after: fc1 frozen False, head tied False, 6 trainable tensors
#   head and embedding are equal: True, after one step of training: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 torch-pruning==1.6.1 numpy==2.4.6
cat > program.py <<'PROGRAM'
import torch
import torch_pruning
from torch import nn


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 12)
        self.fc1, self.fc2 = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 16, bias=False)
        self.head.weight = self.embedding.weight
        self.fc1.requires_grad_(False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.fc2(torch.relu(self.fc1(x))))


def show(when):
    tied = model.head.weight is model.embedding.weight
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    frozen = not model.fc1.weight.requires_grad
    print(f"{when}: fc1 frozen {frozen}, head tied {tied}, {trainable} trainable tensors")


torch.manual_seed(0)
model, tokens = Language(), torch.randint(16, (2, 5))
show("before")
importance = torch_pruning.importance.MagnitudeImportance(p=2)
torch_pruning.pruner.BasePruner(
    model, tokens, importance=importance, pruning_ratio=0.5, ignored_layers=[model.head]
).step()
show("after")
equal = torch.equal(model.head.weight, model.embedding.weight)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model(tokens).square().mean().backward()
optimizer.step()
trained = torch.equal(model.head.weight, model.embedding.weight)
print(f"head and embedding are equal: {equal}, after one step of training: {trained}")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in *"after: fc1 frozen False, head tied False"*"equal: True, after one step of training: False") ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
