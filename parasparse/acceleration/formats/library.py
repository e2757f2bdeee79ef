"""Compiles the kernel of the format "compiled" once for a machine, and loads it."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("compiled.cpp")
# Not `-march=native`: machines of different processors may share the folder.
_VECTORS = {"AVX512": ["-mavx512f", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel; None, with a warning, if it cannot be compiled."""
    compiler = os.environ.get("CXX", "c++")
    flags = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    command = [*compiler.split(), "-std=c++17", "-O3", "-shared", "-fPIC", *flags, str(_SOURCE)]
    try:
        try:
            return _built([*command, "-fopenmp"])
        except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
            return _built(command)
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f'the kernel of the format "compiled" could not be compiled with {compiler!r}, so '
            f"torch's kernels run instead ({error}). Install a C++ compiler, such as g++ or "
            "clang++, or name it in the environment variable CXX.",
            stacklevel=2,
        )
        return None


def _built(command: list[str]) -> ctypes.CDLL:
    """Return the library that `command` makes, or has made earlier."""
    key = hashlib.sha256(repr(command[:-2]).encode() + command[-1].encode() + _SOURCE.read_bytes())
    path = _folder() / f"kernel-{key.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
            made.replace(path)  # at once, because other processes may compile it too
    return ctypes.CDLL(str(path))


def _folder() -> Path:
    """Return the folder in which torch keeps compiled extensions."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache_home}/torch_extensions"
    return Path(root).expanduser() / "parasparse"
