"""The command line does to a checkpoint what Python does to its model, bit for bit."""

import json
import zipfile
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

import parasparse as ps
from parasparse import patterns
from parasparse.cli.main import main

FORMATS = ["pt", "safetensors", "folder"]
all_formats = pytest.mark.parametrize("kind", FORMATS)


class Net(nn.Module):
    """Convolutions, a normalisation, an embedding tied to its head, a pair, an integer buffer."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Conv2d(8, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.layer2 = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 32))
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embedding.weight
        self.weight_re = nn.Parameter(torch.randn(8, 8))
        self.weight_im = nn.Parameter(torch.randn(8, 8))
        self.narrow = nn.Parameter(torch.randn(16, 16, dtype=torch.bfloat16))
        self.register_buffer("table", torch.arange(64).view(8, 8))


def state():
    torch.manual_seed(0)
    return Net().state_dict()


def written(folder, kind, tensors, name="in"):
    """A checkpoint of `tensors`; its path."""
    if kind == "pt":
        torch.save(tensors, folder / f"{name}.pt")
        return folder / f"{name}.pt"
    # Files of safetensors know no ties.
    copied = {key: value.clone().contiguous() for key, value in tensors.items()}
    if kind == "safetensors":
        save_file(copied, folder / f"{name}.safetensors", metadata={"format": "pt", "by": "me"})
        return folder / f"{name}.safetensors"
    place = folder / name
    place.mkdir()
    keys, weight_map = list(copied), {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({key: copied[key] for key in part}, place / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1, "kept": "yes"}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "config.json").write_text("{}")
    return place


def loaded(path):
    if path.is_dir():
        index = json.loads((path / "model.safetensors.index.json").read_text())
        files = {file: load_file(path / file) for file in set(index["weight_map"].values())}
        return {key: files[file][key] for key, file in index["weight_map"].items()}
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def out_of(folder, kind, name="out"):
    return folder / (name if kind == "folder" else f"{name}.{kind}")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def check_same(one, two):
    assert list(one) == list(two) or one.keys() == two.keys()
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype
        assert torch.equal(one[name], tensor), name


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
    "all": (["layer*=1.0"], ["--scope", "global"], {"layer*": Prune(1.0, scope="global")}),
}  # fmt: skip


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


def masked_by_us():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    return ps.sparsify(model, {"0": 0.5, "1.weight": torch.rand(4, 4) * (torch.rand(4, 4) > 0.5)})


def masked_by_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.l1_unstructured(model[1], "bias", 0.5)
    return model


def cplxmodule():
    torch.manual_seed(0)
    return {
        "0.weight.real": torch.randn(4, 3), "0.weight.imag": torch.randn(4, 3),
        "0.mask": (torch.rand(4, 3) > 0.5).float(), "0.bias": torch.randn(4),
        "1.weight": torch.randn(4, 3), "1.mask": torch.rand(4, 3), "2.mask": torch.ones(5),
    }  # fmt: skip


@all_formats
def test_squash_folds_our_masks(tmp_path, kind):
    model = masked_by_us()
    source, out = written(tmp_path, kind, model.state_dict()), out_of(tmp_path, kind)
    assert run("squash", source, out) == 0
    want = ps.dense_state_dict(model)
    check_same(loaded(out), want)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    plain.load_state_dict(loaded(out))
    if kind == "pt":
        assert loaded(out)._metadata == want._metadata


@all_formats
def test_squash_folds_the_masks_of_others(tmp_path, kind):
    model = masked_by_torch()
    source, out = written(tmp_path, kind, model.state_dict()), out_of(tmp_path, kind)
    assert run("squash", source, out) == 0
    torch_prune.remove(model[0], "weight")
    torch_prune.remove(model[1], "bias")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded(out)[name], tensor)
    given = cplxmodule()
    source, out = written(tmp_path, kind, given, "cplx"), out_of(tmp_path, kind, "cplx_out")
    assert run("squash", source, out) == 0
    folded = loaded(out)
    assert set(folded) == set(given) - {"0.mask", "1.mask"}
    for part in ("real", "imag"):
        assert torch.equal(folded[f"0.weight.{part}"], given[f"0.weight.{part}"] * given["0.mask"])
    assert torch.equal(folded["1.weight"], given["1.weight"] * given["1.mask"])


def test_squash_keeps_ties(tmp_path):
    model = Net()
    ps.sparsify(model, {"head.weight": 0.5})
    torch.save(model.state_dict(), tmp_path / "in.pt")
    assert run("squash", tmp_path / "in.pt", tmp_path / "out.pt") == 0
    out = loaded(tmp_path / "out.pt")
    check_same(out, ps.dense_state_dict(model))
    assert out["head.weight"].data_ptr() == out["embedding.weight"].data_ptr()


@all_formats
def test_binarize_and_masks(tmp_path, kind):
    for name, given in [("ours", masked_by_us().state_dict()), ("cplx", cplxmodule()),
                        ("torch", masked_by_torch().state_dict())]:  # fmt: skip
        source, out = written(tmp_path, kind, given, name), out_of(tmp_path, kind, f"{name}_out")
        assert run("binarize", source, out) == 0
        result = loaded(out)
        assert list(result) == list(given) or set(result) == set(given)
        assert run("masks", source, tmp_path / f"{name}.safetensors.pt") == 0
        masks = loaded(tmp_path / f"{name}.safetensors.pt")
        assert all(mask.dtype == torch.bool for mask in masks.values())
        squashed, direct = (out_of(tmp_path, kind, f"{name}_{n}") for n in (1, 2))
        assert run("squash", out, squashed) == 0
        assert run("squash", source, direct) == 0
        check_same(loaded(squashed), loaded(direct))
        for key, mask in masks.items():
            parts = [key] if key in loaded(direct) else [f"{key}.real", f"{key}.imag"]
            assert not any(loaded(direct)[part][~mask].any() for part in parts)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    ours = loaded(out_of(tmp_path, kind, "ours_out"))
    ps.load_state_dict(model, ours)
    x = torch.randn(2, 6)
    torch.testing.assert_close(model(x), masked_by_us()(x))


def test_masks_of_zeros(tmp_path):
    weights = {"a": torch.eye(4), "b": torch.ones(3, 3), "c": torch.zeros(3), "d": torch.arange(4)}
    torch.save(weights, tmp_path / "in.pt")
    assert run("masks", tmp_path / "in.pt", tmp_path / "out.pt") == 1
    assert run("masks", tmp_path / "in.pt", tmp_path / "out.pt", "--zeros") == 0
    assert {n: m.tolist() for n, m in loaded(tmp_path / "out.pt").items()} == {
        "a": torch.eye(4).bool().tolist()
    }


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@all_formats
def test_pack_and_unpack_give_back_every_bit(tmp_path, kind, suffix, capsys):
    source = written(tmp_path, kind, state())
    pruned = out_of(tmp_path, kind, "pruned")
    assert run("prune", source, pruned, "--rule", "layer*=0.95") == 0
    packed = tmp_path / f"packed.{suffix}"
    assert run("pack", pruned, packed) == 0
    assert packed.stat().st_size < sum(t.nbytes for t in state().values())
    back = tmp_path / f"back.{'safetensors' if kind == 'folder' else kind}"
    assert run("unpack", packed, back) == 0
    check_same(loaded(back), loaded(pruned))
    check_same(ps.load_packed(packed), loaded(pruned))
    for other in (pruned, back):
        assert run("diff", packed, other) == 0
    if kind == "safetensors":
        with safe_open(back, "pt") as file:
            assert file.metadata() == {"format": "pt", "by": "me"}
    capsys.readouterr()
    assert run("inspect", packed) == 0
    assert "layer2.0.weight" in capsys.readouterr().out


def test_inspect_says_what_is_there(tmp_path, capsys):
    tensors = {
        "w": torch.eye(64),
        "n": torch.zeros(3, dtype=torch.long),
        "empty": torch.zeros(0, 2),
    }
    two_of_four = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(8, 4)
    tensors |= {"two": two_of_four, "f8": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    tensors["tied"] = tensors["two"]
    torch.save(tensors, tmp_path / "in.pt")
    assert run("inspect", tmp_path / "in.pt", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in content["tensors"]}
    assert rows["w"]["zeros"] == 64 * 63
    assert rows["w"]["shape"] == [64, 64]
    assert "2:4" in rows["two"]["patterns"]
    assert rows["tied"]["same"] == "two"
    assert (rows["tied"]["nbytes"], rows["two"]["nbytes"]) == (0, 8 * 16 * 4)
    assert rows["n"]["patterns"] == []
    assert content["total"]["numel"] == 64 * 64 + 3 + 8 * 16 + 16
    assert run("inspect", tmp_path / "in.pt", "--plot", tmp_path / "out.png") == 0
    text = capsys.readouterr().out
    assert "98.44%" in text
    assert "is two" in text
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_diff_says_what_differs(tmp_path, capsys):
    nan, f8 = torch.tensor([1.0, float("nan")]), torch.ones(2).to(torch.float8_e5m2)
    one = {"a": torch.ones(3), "b": nan, "c": torch.ones(2), "d": torch.ones(2).bool(), "f8": f8}
    two = {"a": torch.tensor([1.0, 0.0, 3.5]), "b": nan.clone(), "c": torch.ones(2, 1),
           "d": torch.tensor([True, False]), "f8": f8.clone(), "e": torch.ones(1)}  # fmt: skip
    torch.save(one, tmp_path / "one.pt")
    save_file(two, tmp_path / "two.safetensors")
    assert run("diff", tmp_path / "one.pt", tmp_path / "two.safetensors") == 1
    text = capsys.readouterr().out
    assert "a: 2 of 3 entries differ, by 2.5 at most; zeros 0 and 1" in text
    assert "only in" in text
    assert "c: float32 2 and float32 2 x 1" in text
    assert "d: 1 of 2 entries differ" in text
    assert "2 tensors are the same" in text
    assert run("diff", tmp_path / "one.pt", tmp_path / "one.pt") == 0


def test_torch_files_can_be_written_where_maps_cannot_be_shared(tmp_path, monkeypatch):
    from parasparse.cli import torch_writer

    torch.save(state(), tmp_path / "in.pt")
    rule = ("--rule", "layer*=0.9")
    assert run("prune", tmp_path / "in.pt", tmp_path / "a.pt", *rule) == 0
    monkeypatch.delattr(torch_writer.mmap, "MAP_SHARED")
    assert run("prune", tmp_path / "in.pt", tmp_path / "b.pt", *rule) == 0
    check_same(loaded(tmp_path / "b.pt"), loaded(tmp_path / "a.pt"))


def test_large_tensors_come_by_in_fresh_maps(tmp_path, monkeypatch):
    from parasparse.cli import checkpoint

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
