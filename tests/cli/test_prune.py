"""`parasparse prune` does to a checkpoint what Python does to its model, bit for bit."""

import json
import zipfile
from functools import partial

import pytest
import torch
from safetensors import safe_open

import parasparse as ps
from parasparse import patterns
from tests.helpers.checkpoints import (
    FORMATS,
    Net,
    all_formats,
    check_same,
    loaded,
    out_of,
    run,
    state,
    written,
)

Prune = ps.Prune


CASES = {
    "local": (["layer*=0.9"], [], {"layer*": 0.9}),
    "names": (["layer1.weight=0.5", "head.weight=0.25"], [],
              {"layer1.weight": 0.5, "head.weight": 0.25}),
    "first rule": (["layer2.1=none", "layer*=0.75", "*.bias=none"], [],
                   {"layer2.1": None, "layer*": 0.75}),
    "vector": (["layer1.bias=0.5"], [], {"layer1.bias": 0.5}),
    "pair": (["weight=0.5"], [], {"weight": 0.5}),
    "pair globally": (["weight*=0.5"], ["--scope", "global"],
                      {"weight*": Prune(0.5, scope="global")}),
    "half": (["narrow=0.9"], ["--scope", "global"], {"narrow": Prune(0.9, scope="global")}),
    "global": (["layer*=0.9"], ["--scope", "global"], {"layer*": Prune(0.9, scope="global")}),
    "erk": (["layer*=0.8"], ["--distribution", "erk"],
            {"layer*": Prune(0.8, distribution=ps.distributions.erk)}),
    "2:4": (["layer2*=2:4"], [], {"layer2*": Prune(pattern=patterns.n_of_m(2, 4))}),
    "2:4 by option": (["layer2*=0.5"], ["--pattern", "2:4"],
                      {"layer2*": Prune(pattern=patterns.n_of_m(2, 4))}),
    "channels": (["layer*=0.5"], ["--pattern", "channel:0"],
                 {"layer*": Prune(0.5, pattern=patterns.channel(0))}),
    "channels globally": (["layer*=0.5"], ["--pattern", "channel:0", "--scope", "global"],
                          {"layer*": Prune(0.5, pattern=patterns.channel(0), scope="global")}),
    "blocks": (["layer2*=0.5"], ["--pattern", "block:4x4"],
               {"layer2*": Prune(0.5, pattern=patterns.block((4, 4)))}),
    "kernels": (["layer1=0.5"], ["--pattern", "block:1x1x*x*"],
                {"layer1": Prune(0.5, pattern=patterns.block((1, 1, -1, -1)))}),
    "random": (["layer*=0.5"], ["--score", "random", "--seed", "7"],
               {"layer*": Prune(0.5, score=ps.scores.random)}),
    "random globally": (["layer*=0.5"], ["--score", "random", "--seed", "7", "--scope", "global"],
                        {"layer*": Prune(0.5, score=ps.scores.random, scope="global")}),
    "a floor": (["layer*=0.9"], ["--scope", "global", "--max-sparsity", "0.901"],
                {"layer*": Prune(0.9, scope="global", max_sparsity=0.901)}),
    "a floor of channels": (
        ["layer*=0.9"],
        ["--pattern", "channel:0", "--scope", "global", "--max-sparsity", "0.95"],
        {"layer*": Prune(0.9, pattern=patterns.channel(0), scope="global", max_sparsity=0.95)},
    ),
    "a floor of each tensor": (["layer*=0.999"], ["--max-sparsity", "0.999"],
                               {"layer*": Prune(0.999, max_sparsity=0.999)}),
    "all": (["layer*=1.0"], ["--scope", "global"], {"layer*": Prune(1.0, scope="global")}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:no entry is left")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@all_formats
def test_prune_is_sparsify_and_squash(tmp_path, kind, case):
    rules, options, python = case
    source, out = written(tmp_path, kind, state()), out_of(tmp_path, kind)
    flags = [flag for rule in rules for flag in ("--rule", rule)]
    assert run("prune", source, out, *flags, *options) == 0
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(7)
    ps.sparsify(model, python)
    want = ps.squash(model).state_dict()
    if kind != "pt" and "head.weight=0.25" in rules:
        want["embedding.weight"] = state()["embedding.weight"]  # no tie in such files
    check_same(loaded(out), want)
    Net().load_state_dict(loaded(out))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_torchvision_network_is_pruned_as_in_python(tmp_path, scope):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.resnet50()
    torch.save(model.state_dict(), tmp_path / "in.pt")
    rules = ("--rule", "layer*.weight=0.9", "--rule", "*.bias=none")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", *rules, "--scope", scope) == 0
    ps.squash(ps.sparsify(model, {"layer*.weight": Prune(0.9, scope=scope)}))
    plain = models.resnet50()
    plain.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    check_same(plain.state_dict(), model.state_dict())


def test_masks_are_written_beside_and_attach_again(tmp_path):
    source = written(tmp_path, "pt", state())
    for file in ("masks.safetensors", "masks.pt"):
        run("prune", source, tmp_path / "out.pt", "--force", "--rule", "layer*=0.9",
            "--rule", "weight=0.5", "--masks", tmp_path / file)  # fmt: skip
        masks = loaded(tmp_path / file)
        assert set(masks) == {"layer1.weight", "layer2.0.weight", "layer2.1.weight", "weight"}
        assert all(mask.dtype == torch.bool for mask in masks.values())
        model = Net()
        model.load_state_dict(state())
        ps.sparsify(model, masks)
        check_same(ps.dense_state_dict(model), loaded(tmp_path / "out.pt"))


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path, capsys):
    source = written(tmp_path, "pt", state())
    flags = ("--rule", "layer*=0.9", "--dry-run", "--masks", tmp_path / "m.pt")
    assert run("prune", source, tmp_path / "out.pt", *flags) == 0
    text = capsys.readouterr().out
    assert "layer2.0.weight" in text
    assert "154" in text  # kept of 1,536
    assert "nothing was written" in text
    assert [file.name for file in tmp_path.iterdir()] == ["in.pt"]


def test_rules_come_from_a_file_as_well(tmp_path):
    source = written(tmp_path, "pt", state())
    (tmp_path / "rules.toml").write_text(
        'scope = "global"\nseed = 7\n[rules]\n'
        '"layer1" = { sparsity = 0.5, pattern = "channel:0" }\n'
        '"layer2.0" = "none"\n"layer*" = 0.9\n"narrow" = { pattern = "2:4", scope = "local" }\n'
    )
    assert run("prune", source, tmp_path / "out.pt", "--config", tmp_path / "rules.toml") == 0
    model = Net()
    model.load_state_dict(state())
    two_of_four = Prune(pattern=patterns.n_of_m(2, 4))
    channels = Prune(0.5, pattern=patterns.channel(0), scope="global")
    ps.sparsify(model, {"layer1": channels, "layer2.0": None, "layer*": Prune(0.9, scope="global"),
                        "narrow": two_of_four})  # fmt: skip
    check_same(loaded(tmp_path / "out.pt"), ps.squash(model).state_dict())


def test_what_lies_around_a_state_dict_stays(tmp_path):
    whole = {
        "epoch": 3, "state_dict": state(), "optimizer": {"state": {0: {"m": torch.randn(3)}}},
        "pairs": [torch.ones(2), ("x", torch.zeros(2))],
    }  # fmt: skip
    whole["state_dict"]["_extra"] = {"plain": 1}
    torch.save(whole, tmp_path / "in.pt")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", "--rule", "layer*=0.9") == 0
    out = loaded(tmp_path / "out.pt")
    assert (out["epoch"], out["state_dict"]["_extra"], out["pairs"][1][0]) == (3, {"plain": 1}, "x")
    assert torch.equal(out["optimizer"]["state"][0]["m"], whole["optimizer"]["state"][0]["m"])
    assert torch.equal(out["pairs"][0], torch.ones(2))
    held = out["state_dict"]
    assert (held["layer1.weight"] == 0).float().mean() == pytest.approx(0.9, abs=0.01)
    assert held["head.weight"].data_ptr() == held["embedding.weight"].data_ptr()
    assert held._metadata == whole["state_dict"]._metadata
    assert zipfile.ZipFile(tmp_path / "out.pt").testzip() is None  # checksums are right


def test_metadata_indices_and_other_files_stay(tmp_path):
    file = written(tmp_path, "safetensors", state(), "one")
    assert run("prune", file, tmp_path / "out.safetensors", "--rule", "layer*=0.9") == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        assert out.metadata() == {"format": "pt", "by": "me"}
    folder = written(tmp_path, "folder", state())
    for given in (folder, folder / "model.safetensors.index.json"):
        assert run("prune", given, tmp_path / "out", "--force", "--rule", "layer*=0.9") == 0
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["kept"] == "yes"
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in state().values())
        assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
            f.name for f in folder.iterdir()
        )
        assert len(list(tmp_path.iterdir())) == 4  # nothing is left beside


def test_formats_can_be_changed_on_the_way(tmp_path):
    folder = written(tmp_path, "folder", state())
    rule = ("--rule", "layer*=0.9")
    assert run("prune", folder, tmp_path / "a.safetensors", *rule) == 0
    assert run("prune", folder, tmp_path / "b.pt", *rule) == 0
    torch.save(state(), tmp_path / "in.pt")
    assert run("prune", tmp_path / "in.pt", tmp_path / "c.safetensors", *rule) == 0
    for file in ("b.pt", "c.safetensors"):
        check_same(loaded(tmp_path / file), loaded(tmp_path / "a.safetensors"))


def test_torch_files_can_be_written_where_maps_cannot_be_shared(tmp_path, monkeypatch):
    from parasparse.files import torch_writer

    torch.save(state(), tmp_path / "in.pt")
    rule = ("--rule", "layer*=0.9")
    assert run("prune", tmp_path / "in.pt", tmp_path / "a.pt", *rule) == 0
    monkeypatch.delattr(torch_writer.mmap, "MAP_SHARED")
    assert run("prune", tmp_path / "in.pt", tmp_path / "b.pt", *rule) == 0
    check_same(loaded(tmp_path / "b.pt"), loaded(tmp_path / "a.pt"))


@pytest.mark.filterwarnings("ignore:no entry is left")
def test_large_tensors_come_by_in_fresh_maps(tmp_path, monkeypatch):
    from parasparse.files import checkpoint

    monkeypatch.setattr(checkpoint, "FRESH", 1000)
    for kind in FORMATS:
        source, out = written(tmp_path, kind, state()), out_of(tmp_path, kind)
        assert run("prune", source, out, "--rule", "layer*=0.9", "--scope", "global") == 0
        model = Net()
        model.load_state_dict(state())
        ps.squash(ps.sparsify(model, {"layer*": Prune(0.9, scope="global")}))
        check_same(loaded(out), model.state_dict())


def test_old_torch_files_are_read(tmp_path):
    torch.save(state(), tmp_path / "in.pt", _use_new_zipfile_serialization=False)
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", "--rule", "layer*=0.9") == 0
    assert (loaded(tmp_path / "out.pt")["layer1.weight"] == 0).sum() == round(0.9 * 1152)
    assert partial(run, "inspect")(tmp_path / "out.pt") == 0


def test_tensors_that_are_emptied_are_named(tmp_path, capsys):
    source, out = written(tmp_path, "pt", state()), out_of(tmp_path, "pt")
    flags = ("--rule", "layer*=0.9", "--scope", "global")
    for more, named in ((), True), (("--max-sparsity", "0.95"), False):
        for last in ("--dry-run", "--force"):
            assert run("prune", source, out, *flags, *more, last) == 0
            said = capsys.readouterr().out
            assert ('No entry is left of "layer1.weight"; --max-sparsity' in said) == named
