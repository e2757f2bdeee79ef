"""Files and folders that are written beside their target and replace it when complete."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a new file beside `path`, which replaces it at the end unless an exception is raised.

    As with `open`, links are followed and permissions are kept.
    """
    with replacing_path(path) as beside, open(beside, "r+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty file beside `path`, which replaces it at the end."""
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(f'`path` "{path}" exists and is not a regular file.')
    if mode is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    beside = _beside(target)
    try:
        with open(beside, "xb"):
            if mode is not None:
                os.chmod(beside, stat.S_IMODE(mode))
        yield beside
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside `path`, which replaces it at the end, not atomically."""
    target = Path(os.path.realpath(path))
    beside, old = _beside(target), _beside(target)
    beside.mkdir()
    try:
        yield beside
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(beside, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def reserve(file: BinaryIO, nbytes: int) -> None:
    """Allocate disk space for a file where the system can; raise OSError if there is too little."""
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not supported there
                raise


def _mode(path: Path) -> int | None:
    """Return the kind and the permissions of a file, or None if there is none."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
