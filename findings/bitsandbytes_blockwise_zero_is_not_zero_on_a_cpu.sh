#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.15.0, on a CPU: quantize_blockwise and dequantize_blockwise turn 0
# into a small positive number, though the table of 256 values holds 0.
#
# Rounding to the nearest value of the table would give 0 for 0. The code that is chosen is four
# entries away. Weights with zeros in them (pruned, or padded) have none afterwards; a block of
# zeros alone stays at 0. quantize_4bit keeps zeros.
#
# Seen:
#   the table holds 0 1 time(s)
#   zeros among 4096 entries: 2048 before, 0 after 8 bits, 2048 after nf4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 bitsandbytes==0.50.2 numpy==2.4.6
cat > program.py <<'PROGRAM'
import bitsandbytes.functional as bnb
import torch

torch.manual_seed(0)
x = torch.randn(4096)
x[::2] = 0
codes, state = bnb.quantize_blockwise(x)
eight = bnb.dequantize_blockwise(codes, state).flatten()
four = bnb.dequantize_4bit(*bnb.quantize_4bit(x, quant_type="nf4")).flatten()
print("the table holds 0", int((state.code == 0).sum()), "time(s)")
kept = [int((y[::2] == 0).sum()) for y in (eight, four)]
print(f"zeros among 4096 entries: 2048 before, {kept[0]} after 8 bits, {kept[1]} after nf4")
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
case "$shown" in "the table holds 0 1 "*" 0 after 8 bits, 2048 after nf4") ;; *) echo "changed"; exit 1 ;; esac
echo "as described"
