#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.15.0, on a CPU: setting the state of Adam8bit to 0 sets both moments
# to -1 times the largest value of their block, and the next step throws the weights away.
#
# The moments are uint8 codes of a table; the code 0 is its first entry, about -1. Code that resets
# momenta in place (pruning, layer-wise resets, "clear the moments of these entries") writes 0 and
# gets no error. The code that means 0 is where the table qmap1 or qmap2 is 0.
#
# Seen:
#   torch.uint8 three steps moved 0.0030
#   one step without a gradient, after the state was set to 0, moved 16068.6699
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 bitsandbytes==0.50.2 numpy==2.4.6
cat > program.py <<'PROGRAM'
import bitsandbytes as bnb
import torch

torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(64, 128))
optimizer = bnb.optim.Adam8bit([weight], lr=1e-3)
before = weight.detach().clone()
for _ in range(3):
    weight.grad = torch.randn(64, 128) * 0.1
    optimizer.step()
state = optimizer.state[weight]
print(state["state1"].dtype, f"three steps moved {(weight - before).abs().max():.4f}")
state["state1"].zero_()
state["state2"].zero_()
before = weight.detach().clone()
weight.grad = torch.zeros(64, 128)
optimizer.step()
moved = float((weight - before).abs().max())
print(f"one step without a gradient, after the state was set to 0, moved {moved:.4f}")
print("far" if moved > 1 else "near")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in *uint8*far) ;; *) echo "changed: a state of 0 moves nothing, or is no code"; exit 1 ;; esac
echo "as described"
