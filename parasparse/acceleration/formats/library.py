"""Compiles the kernel of the format "compiled" once for a machine, and loads it."""

import ctypes
import hashlib
import os
import shlex
import subprocess
import sysconfig
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
    """Return the compiled kernel; None, with a warning, if it cannot be compiled or loaded."""
    compiler = os.environ.get("CXX") or "c++"
    try:
        return _built(shlex.split(compiler))
    # A RuntimeError: there is no home. A ValueError: a quotation mark in CXX is not closed.
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f'the kernel of the format "compiled" could not be compiled with {compiler!r}, or not '
            f"be loaded, so torch's kernels run instead ({reason}). Install a C++ compiler, such "
            "as g++ or clang++, or name it in the environment variable CXX; name a folder to "
            "write to in TORCH_EXTENSIONS_DIR.",
            stacklevel=2,
        )
        return None


def _built(compiler: list[str]) -> ctypes.CDLL:
    flags = _VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    command = [*compiler, "-std=c++17", "-O3", "-shared", "-fPIC", *flags]
    try:
        return _loaded([*command, "-fopenmp"])
    except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
        return _loaded(command)


def _loaded(command: list[str]) -> ctypes.CDLL:
    """Return the library that `command` makes of the source, or has made earlier."""
    about = repr((sysconfig.get_platform(), command)).encode()
    key = hashlib.sha256(about + _SOURCE.read_bytes()).hexdigest()
    path = _folder() / f"kernel-{key[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            every = [*command, str(_SOURCE), "-o", str(made)]
            subprocess.run(every, check=True, capture_output=True, text=True, errors="replace")
            made.replace(path)  # at once, because other processes may compile it too
    return ctypes.CDLL(str(path))


def _folder() -> Path:
    """Return the folder in which torch keeps compiled extensions."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache_home}/torch_extensions"
    return Path(root).expanduser() / "parasparse"
