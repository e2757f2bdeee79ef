#!/usr/bin/env bash
# zipnn 0.5.4, torch 2.15.0: ZipNN.compress overwrites what it compresses. A float32 or bfloat16
# tensor holds other numbers afterwards, many of them nan. So does a bytes object, although Python
# objects of this type never change.
#
# It moves the sign of each number behind the exponent, in the memory that it was given, and does not
# move it back. What it returns is right, so the loss shows only when the tensor is used again: a
# model that is compressed while it trains goes on with these numbers. float16 is left as it is, and
# NumPy arrays and tensors that are not contiguous are copied first. Compress a copy.
#
# Seen:
#   torch.float32 output right, input changed
#   torch.bfloat16 output right, input changed
#   torch.float16 output right, input as before
#   bytes output right, input changed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check uv
env/bin/uv pip install --quiet --python env/bin/python torch==2.15.0 numpy==2.4.6 zipnn==0.5.4
cat > program.py <<'PROGRAM'
import torch
from zipnn import ZipNN


def show(name, right, same):
    print(name, "output right," if right else "output wrong,", "input", "as before" if same else "changed")


torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    weight = torch.randn(1000).to(dtype)
    before = weight.clone()
    coder = ZipNN(input_format="torch")
    decoded = coder.decompress(coder.compress(weight))
    show(dtype, torch.equal(decoded, before), torch.equal(weight, before))
data = torch.randn(1000).numpy().tobytes()
before = bytes(bytearray(data))
coder = ZipNN(input_format="byte", bytearray_dtype="float32")
decoded = coder.decompress(coder.compress(data))
show("bytes", decoded == before, data == before)
PROGRAM
shown=$(env/bin/python -W ignore program.py 2>/dev/null)
printf '%s\n' "$shown"
[ "$shown" = "torch.float32 output right, input changed
torch.bfloat16 output right, input changed
torch.float16 output right, input as before
bytes output right, input changed" ] || { echo "changed"; exit 1; }
echo "as described"
