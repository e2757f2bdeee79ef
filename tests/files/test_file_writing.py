"""How packed files are written: whole or not at all, tensor by tensor, with the rights they had."""

import os
import signal
import stat
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from parasparse.checkpoints.save_packed import load_packed, save
from parasparse.files import streams
from tests.files.test_files import path as path
from tests.files.test_files import same_states, small
from tests.helpers.processes import Program


def large(number=3):
    """Return tensors that are not coded together with others."""
    return {f"w{i}": torch.eye(520) for i in range(number)}


def test_an_error_on_the_way_leaves_the_old_file_alone(path, monkeypatch):
    old = small()
    save(old, path)
    encode = streams.encode
    packed = []

    def failing(tensor):
        if len(packed) == 2:
            raise KeyboardInterrupt
        packed.append(tensor)
        return encode(tensor)

    monkeypatch.setattr(streams, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        save(large(), path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same_states(load_packed(path), old)


def killed(path, moment):
    """Save, and stand still while the third tensor is packed, or before the file is renamed."""

    def stop(*args):
        print("here", flush=True)
        time.sleep(600)

    count = iter(range(9))
    if moment == "writing":
        pack = streams.encode
        streams.encode = lambda tensor: pack(tensor) if next(count) < 2 else stop()
    else:
        os.replace = stop
    save(large(), path)


@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_killed_save_leaves_the_old_file(path, moment, tmp_path_factory):
    old = small()
    save(old, path)
    before = path.read_bytes()
    captured = tmp_path_factory.mktemp("captured")
    program = Program(captured, killed, path, moment)
    while program.is_running and "here\n" not in "".join(p.read_text() for p in captured.iterdir()):
        time.sleep(0.01)
    assert len(list(path.parent.iterdir())) == 2  # it was at it
    program.send(signal.SIGKILL)
    assert program.finished()[:2] == (-signal.SIGKILL, "here\n")
    assert path.read_bytes() == before
    assert same_states(load_packed(path), old)
    save(large(), path)  # what was left beside is in nobody's way


def test_links_are_followed_and_permissions_stay(path):
    target = path.with_name("target")
    target.touch()
    target.chmod(0o640)
    path.symlink_to(target)
    state = small()
    save(state, path)
    assert path.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert same_states(load_packed(path), state)


def test_a_link_to_itself_is_an_error_and_stays(path):
    path.symlink_to(path)
    with pytest.raises(OSError, match="[Ll]evels of symbolic links|[Ss]ymlink"):
        save(small(), path)
    assert path.is_symlink()
    assert list(path.parent.iterdir()) == [path]


def test_a_new_file_has_the_usual_permissions(path):
    path.with_name("usual").touch()
    save(small(), path)
    assert path.stat().st_mode == path.with_name("usual").stat().st_mode


def test_a_safetensors_file_is_written_tensor_by_tensor(tmp_path, monkeypatch):
    encode, living = streams.encode, weakref.WeakSet()

    def counted(tensor):
        assert not len(living)  # what was packed before is written and gone
        packed = encode(tensor)
        living.add(packed)
        return packed

    monkeypatch.setattr(streams, "encode", counted)
    state = large(4)
    save(state, tmp_path / "x.safetensors")
    assert same_states(load_packed(tmp_path / "x.safetensors"), state)


def memory(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))


def print_peaks(path):
    """Print how much memory it takes to save 24 tensors, after one, and to load them; in tensors.

    Pages of the file count while it is loaded.
    """
    state = {f"w{i}": torch.zeros(1024, 1024) for i in range(24)}
    for tensor in state.values():
        tensor.fill_(1.0)[::2, ::2] = 0.0  # three of four stay
    nbytes = state["w0"].nbytes
    save({"w": state["w0"]}, path)
    before = memory("VmHWM")
    save(state, path)
    print((memory("VmHWM") - before) / nbytes)
    before = memory("VmRSS")
    loaded = load_packed(path)
    print((memory("VmHWM") - before - path.stat().st_size) / nbytes / len(loaded))


@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_the_memory_of_saving_is_that_of_one_tensor_and_of_loading_that_of_all(tmp_path):
    program = Program(tmp_path, print_peaks, tmp_path / "x.safetensors")
    code, out, _ = program.finished()
    assert code == 0
    saving, loading = map(float, out.split())
    assert saving < 6  # all of them packed are 19 tensors
    assert loading < 1.25


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_file_is_not_replaced(path):
    save({"x": torch.eye(2)}, path)
    path.chmod(0o444)
    with pytest.raises(PermissionError):
        save({"x": torch.eye(3)}, path)


@pytest.mark.skipif(os.name != "posix", reason="permissions of files are those of POSIX")
def test_a_private_file_is_private_while_it_is_written(path, monkeypatch):
    save({"x": torch.eye(2)}, path)
    path.chmod(0o600)
    seen = []
    encode = streams.encode

    def spied(tensor):
        seen.extend(p.stat().st_mode & 0o777 for p in path.parent.glob("*.tmp"))
        return encode(tensor)

    monkeypatch.setattr(streams, "encode", spied)
    save({"x": torch.eye(3)}, path)
    assert seen == [0o600]
