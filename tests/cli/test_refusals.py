"""What the command line says of bad input: one line, the right code, and nothing written."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import run
from tests.helpers.processes import Program

RULE = ("--rule", "*.weight=0.5")


class Attack:
    """A pickle with code in it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    state = {"a.weight": torch.randn(8, 8), "a.bias": torch.randn(8), "n.weight": torch.arange(9)}
    torch.save(state, tmp_path / "good.pt")
    save_file(state, tmp_path / "good.safetensors")
    save_file({"a.weight": torch.full((4, 4), float("nan"))}, tmp_path / "nan.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-300])
    (tmp_path / "text.safetensors").write_text("hello, this is no checkpoint at all")
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "attack.pt").write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    torch.save({"x": torch.ones(2), "code": Attack(tmp_path / "ran")}, tmp_path / "attack2.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    torch.save({"a.weight": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    torch.save({"a.weight": torch.ones(2, 2), "steps": 3}, tmp_path / "extra.pt")
    (tmp_path / "noindex").mkdir()
    for name, weight_map in [("missing", {"a.weight": "gone.safetensors"}),
                             ("outside", {"a.weight": "../good.safetensors"}),
                             ("wrong", {"b.weight": "x.safetensors"})]:  # fmt: skip
        (tmp_path / name).mkdir()
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / name / "x.safetensors")
        text = json.dumps({"weight_map": weight_map})
        (tmp_path / name / "model.safetensors.index.json").write_text(text)
    (tmp_path / "bad.toml").write_text("rules = [")
    (tmp_path / "odd.toml").write_text('colour = "red"\n[rules]\n"a" = 0.5\n')
    (tmp_path / "odd2.toml").write_text('[rules]\n"a" = { amount = 0.5 }\n')
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect", "nowhere.pt"], "does not exist"),
        (["inspect", "cut.safetensors"], "not an intact safetensors file"),
        (["inspect", "text.safetensors"], "not an intact safetensors file"),
        (["inspect", "cut.pt"], "not an intact checkpoint"),
        (["inspect", "text.pt"], "not an intact checkpoint"),
        (["inspect", "empty.pt"], "not an intact checkpoint"),
        (["inspect", "attack.pt"], "code in it was not run"),
        (["inspect", "attack2.pt"], "code in it was not run"),
        (["inspect", "module.pt"], "code in it was not run"),
        (["inspect", "list.pt"], "must hold a state dict"),
        (["inspect", "sparse.pt"], "must be dense"),
        (["inspect", "noindex"], "must hold a *.safetensors.index.json"),
        (["inspect", "missing"], "which does not exist"),
        (["inspect", "outside"], "must name files beside it"),
        (["inspect", "wrong"], "the index says"),
        (["diff", "good.pt", "nowhere.pt"], "does not exist"),
        (["prune", "good.pt", "out.pt"], "at least one rule"),
        (["prune", "good.pt", "out.pt", "--rule", "layer9.weight=0.5"], "must each reach a tensor"),
        (["prune", "good.pt", "out.pt", "--rule", "a.weight=0.5", "--rule", "a.weight=0.6"],
         "must have one rule; it has two"),
        (["prune", "good.pt", "out.pt", "--rule", "a*=0.5", "--rule", "a.weight=0.6"],
         "no earlier rule reaches"),
        (["prune", "good.pt", "out.pt", "--rule", "a.weight=1.5"], "must be in [0, 1]"),
        (["prune", "good.pt", "out.pt", "--rule", "a.weight=lots"], "must be a sparsity"),
        (["prune", "good.pt", "out.pt", "--rule", "a.weight"], "must be TARGET=VALUE"),
        (["prune", "good.pt", "out.pt", "--rule", "n.weight=0.5"], "floating-point or complex"),
        (["prune", "good.pt", "out.pt", *RULE, "--pattern", "3:5:7"], "is not valid"),
        (["prune", "good.pt", "out.pt", *RULE, "--pattern", "hexagon"], "a pattern must be"),
        (["prune", "good.pt", "out.pt", *RULE, "--pattern", "block:3x"], "is not valid"),
        (["prune", "good.pt", "out.pt", *RULE, "--pattern", "block:2x2x2"], "one size per"),
        (["prune", "good.pt", "out.pt", "--rule", "a.weight=0.9", "--pattern", "2:4"],
         "makes a sparsity of 0.5"),
        (["prune", "good.pt", "out.pt", *RULE, "--scope", "here"], "the scope must be one of"),
        (["prune", "good.pt", "out.pt", *RULE, "--score", "luck"], "the score must be one of"),
        (["prune", "good.pt", "out.pt", *RULE, "--scope", "global", "--distribution", "erk"],
         "must be \"local\" with a `distribution`"),
        (["prune", "good.pt", "out.pt", "--rule", "a*=none"], "nothing is to be pruned"),
        (["prune", "good.pt", "out.pt", "--config", "bad.toml"], "is not valid TOML"),
        (["prune", "good.pt", "out.pt", "--config", "gone.toml"], "cannot be read"),
        (["prune", "good.pt", "out.pt", "--config", "odd.toml"], 'it holds "colour"'),
        (["prune", "good.pt", "out.pt", "--config", "odd2.toml"], 'it holds "amount"'),
        (["prune", "nan.safetensors", "out.pt", *RULE], "must not be NaN"),
        (["prune", "nan.safetensors", "out.pt", *RULE, "--scope", "global"], "must not be NaN"),
        (["prune", "good.pt", "out.gif", *RULE], "must end in one of"),
        (["prune", "good.pt", "out", *RULE], "must end in one of"),
        (["prune", "good.pt", "none/out.pt", *RULE], "does not exist"),
        (["prune", "good.pt", "good.safetensors", *RULE], "exists already. Use --force"),
        (["prune", "good.pt", "out.pt", *RULE, "--masks", "good.pt"], "exists already"),
        (["prune", "extra.pt", "out.safetensors", *RULE], "holds \"steps\". Write a .pt file"),
        (["squash", "good.pt", "out.pt"], "contains no masks"),
        (["binarize", "good.safetensors", "out.pt"], "contains no masks"),
        (["masks", "good.pt", "out.pt"], "contains no masks"),
        (["unpack", "good.pt", "out.pt"], "is not a packed file"),
        (["pack", "good.pt", "out.gif"], "must end in one of"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(folder, arguments, text, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(str(path) for path in folder.rglob("*"))
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("parasparse: error: ")
    assert error.count("\n") == 1
    assert text in error
    assert sorted(str(path) for path in folder.rglob("*")) == before
    assert not (folder / "ran").exists()  # no code in a pickle was run


@pytest.mark.parametrize(
    "arguments", [[], ["paint"], ["inspect"], ["prune", "a.pt"], ["diff", "a", "b", "c"]]
)
def test_a_misused_command_is_code_2(arguments, capsys):
    assert run(*arguments) == 2
    assert "usage: parasparse" in capsys.readouterr().err


def test_help_is_code_0(capsys):
    assert run("--help") == 0
    assert run("prune", "--help") == 0
    assert "--rule TARGET=VALUE" in capsys.readouterr().out


def test_gates_are_sent_to_their_model(tmp_path, capsys):
    import parasparse as ps

    model = ps.sparsify(torch.nn.Linear(4, 4), ps.Gate())
    torch.save(model.state_dict(), tmp_path / "in.pt")
    assert run("squash", tmp_path / "in.pt", tmp_path / "out.pt") == 1
    assert "only its model can compute" in capsys.readouterr().err


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    state = {f"{n}.weight": torch.randn(1000, 8000) for n in range(8)}  # 256 MB
    save_file(state, folder / "in.safetensors")
    torch.save(state, folder / "in.pt")
    return folder


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("suffix", "number", "old"),
    [
        ("safetensors", signal.SIGINT, False), ("pt", signal.SIGINT, True),
        ("safetensors", signal.SIGKILL, True), ("pt", signal.SIGKILL, False),
    ],
)  # fmt: skip
def test_interrupted_it_leaves_the_old_file_or_none(
    large, tmp_path, tmp_path_factory, suffix, number, old
):
    out = tmp_path / f"out.{suffix}"
    if old:
        out.write_text("the old one")
    slowly = (*RULE, "--pattern", "block:4x4", "--force")
    program = Program(
        tmp_path_factory.mktemp("captured"), run, "prune", large / f"in.{suffix}", out, *slowly
    )
    while program.is_running and not any(p.suffix == ".tmp" for p in tmp_path.iterdir()):
        time.sleep(0.001)
    time.sleep(0.05)
    program.send(number)
    code, _, error = program.finished()
    assert code != 0, "it was done before the signal came"
    assert out.exists() == old
    assert not old or out.read_text() == "the old one"
    if number == signal.SIGINT:
        assert code == 130
        assert "interrupted; nothing was written" in error
        assert "Traceback" not in error
        assert [path.name for path in tmp_path.iterdir()] == ([out.name] if old else [])


def run_with_a_quota(*arguments):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    return run(*arguments)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_full_disk_is_one_line_and_leaves_nothing(large, tmp_path, tmp_path_factory, suffix):
    pytest.importorskip("resource")
    paths = large / f"in.{suffix}", tmp_path / f"out.{suffix}"
    captured = tmp_path_factory.mktemp("captured")
    code, _, error = Program(captured, run_with_a_quota, "prune", *paths, *RULE).finished()
    assert code == 1
    assert "Traceback" not in error
    assert "parasparse: error: " in error
    assert not list(tmp_path.iterdir())


def test_the_whole_round(tmp_path, monkeypatch, capfd):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": torch.randn(64, 64)}, "in.safetensors")

    def done(*arguments, code=0):
        assert run(*arguments) == code
        out, error = capfd.readouterr()
        assert error == ""
        return out

    assert "would be masked" in done("prune", "in.safetensors", "p.safetensors", *RULE, "--dry-run")
    assert "50.00%" in done("prune", "in.safetensors", "p.safetensors", *RULE)
    assert "differ" in done("diff", "in.safetensors", "p.safetensors", code=1)
    assert "2,048" in done("inspect", "p.safetensors")
    done("pack", "p.safetensors", "packed.safetensors")
    done("unpack", "packed.safetensors", "back.safetensors")
    assert "nothing differs" in done("diff", "p.safetensors", "back.safetensors")
    assert torch.equal(
        *(load_file(tmp_path / f"{n}.safetensors")["a.weight"] for n in ("p", "back"))
    )


def test_a_real_process_tells_how_it_ended(tmp_path):
    save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "in.safetensors")
    command = [sys.executable, "-m", "parasparse", "prune", "in.safetensors", "out.gif", *RULE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("parasparse: error: ")


def test_a_terminal_gets_a_bar(tmp_path):
    pty = pytest.importorskip("pty")
    pytest.importorskip("rich")
    save_file({"a.weight": torch.randn(64, 64)}, tmp_path / "in.safetensors")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "parasparse", "prune", "in.safetensors", "out.safetensors", *RULE],
        cwd=tmp_path, stderr=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    assert process.wait(timeout=600) == 0
    os.close(theirs)
    assert b"prune" in os.read(ours, 10_000)
    os.close(ours)


def test_a_reader_that_stops_is_no_error(large):
    command = f"{sys.executable} -m parasparse inspect {large / 'in.safetensors'} --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
    assert Path(large / "in.pt").exists()
    assert zipfile.is_zipfile(large / "in.pt")
