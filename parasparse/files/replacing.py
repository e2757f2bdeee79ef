"""Files and folders that are made beside their target and take its place when they are whole."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a new file beside `path` that takes its place at the end, unless something is raised.

    As when `path` itself is opened, links are followed, and permissions stay or are the usual.
    """
    with replacing_path(path) as beside, open(beside, "r+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty file beside `path`, which takes its place at the end."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f'`path` must be a file or be free; "{path}" is neither.')
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
    beside = _beside(target)
    try:
        with open(beside, "xb"):
            if target.exists():
                shutil.copymode(target, beside)
        yield beside
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its place at the end.

    For a moment there is none of that name.
    """
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
    """Give a file its room on the disk, where the system can; its content stays.

    Raises:
        OSError: there is no room.
    """
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot
                raise


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
