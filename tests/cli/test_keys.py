"""Checkpoints that hold several state dicts, and names that have prefixes of wrappers."""

import json

import pytest
import torch
from torch import nn

import parasparse as ps
from tests.helpers.checkpoints import check_same, loaded, run

PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
RULE = ("--rule", "fc.weight=0.5")


def net():
    return nn.ModuleDict({"fc": nn.Linear(8, 8), "head": nn.Linear(8, 2)})


def half(state):
    model = net()
    model.load_state_dict(state)
    return ps.dense_state_dict(ps.sparsify(model, {"fc.weight": 0.5}))


@pytest.fixture
def several(tmp_path):
    torch.manual_seed(0)
    content = {
        "model": net().state_dict(),
        "ema": {"module": net().state_dict(), "updates": 3},
        "masked": ps.sparsify(net(), {"fc.weight": 0.75}).state_dict(),
        "optimizer": {"state": {0: {"m": torch.ones(8, 8)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(content, tmp_path / "in.pt")
    return content


@pytest.mark.parametrize("key", ["model", "ema.module"])
def test_only_the_chosen_state_dict_is_pruned_and_the_rest_stays(several, tmp_path, key):
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", *RULE, "--key", key) == 0
    out = loaded(tmp_path / "out.pt")
    for name, state in (("model", several["model"]), ("ema.module", several["ema"]["module"])):
        got = out["model"] if name == "model" else out["ema"]["module"]
        check_same(got, half(state) if name == key else state)
    assert out["ema"]["updates"] == 3
    check_same(out["masked"], several["masked"])
    assert out["optimizer"]["state"][0]["m"].sum() == 64
    assert out["optimizer"]["param_groups"] == [{"lr": 0.1}]


def test_every_command_that_reads_a_checkpoint_takes_a_key(several, tmp_path, capsys):
    source, key = tmp_path / "in.pt", ("--key", "masked")
    for command in ("squash", "binarize", "masks", "pack"):
        assert run(command, source, tmp_path / f"{command}.safetensors", *key) == 0
        assert "Not read" not in capsys.readouterr().out
    model = net()
    ps.load_state_dict(model, several["masked"])
    check_same(loaded(tmp_path / "squash.safetensors"), ps.dense_state_dict(model))
    assert list(loaded(tmp_path / "masks.safetensors")) == ["fc.weight"]
    assert run("inspect", source, *key, "--json") == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["tensors"]]
    assert names == list(several["masked"])
    assert run("diff", source, tmp_path / "pack.safetensors", *key) == 0
    assert run("diff", source, source, *key) == 0


def test_a_state_dict_that_is_passed_over_is_named(several, tmp_path, capsys):
    for arguments in (("inspect",), ("prune", tmp_path / "out.pt", *RULE)):
        assert run(arguments[0], tmp_path / "in.pt", *arguments[1:]) == 0
        assert 'Not read: "ema.module", "masked"; choose with --key' in capsys.readouterr().out


def test_keys_that_choose_nothing_are_refused(several, tmp_path, capsys):
    torch.save({"g": several["model"], "d": several["model"]}, tmp_path / "gan.pt")
    torch.save(several["model"], tmp_path / "plain.pt")
    for file, key, message in (
        ("in.pt", ("--key", "emma"), 'one of "model", "ema.module", "masked"'),
        ("plain.pt", ("--key", "model"), "left out"),
        ("gan.pt", (), 'several state dicts: "g", "d"'),
    ):
        assert run("inspect", tmp_path / file, *key) == 1
        assert message in capsys.readouterr().err
    assert run("pack", tmp_path / "plain.pt", tmp_path / "p.safetensors") == 0
    assert run("diff", tmp_path / "p.safetensors", tmp_path / "plain.pt", "--key", "model") == 1
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_are_matched_with_and_without_the_prefixes_of_wrappers(prefix, tmp_path, capsys):
    torch.manual_seed(0)
    state, place = net().state_dict(), tmp_path / "in.pt"
    torch.save({prefix + name: tensor for name, tensor in state.items()}, place)
    want = {prefix + name: tensor for name, tensor in half(state).items()}
    for name in ("fc.weight", "fc", f"{prefix}fc.weight", "fc*"):
        out, masks = tmp_path / "out.pt", tmp_path / "masks.pt"
        options = ("--masks", masks, "--force")
        assert run("prune", place, out, "--rule", f"{name}=0.5", *options) == 0
        check_same(loaded(out), want)
        assert list(loaded(masks)) == ["fc.weight"]
    assert run("masks", out, masks, "--zeros", "--force") == 0
    assert list(loaded(masks)) == ["fc.weight"]
    torch.save(half(state), tmp_path / "bare.pt")
    capsys.readouterr()
    assert run("diff", out, tmp_path / "bare.pt") == 0
    assert "4 tensors are the same" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", PREFIXES)
def test_masks_are_extracted_under_the_names_of_the_bare_model(prefix, tmp_path, capsys):
    model = ps.sparsify(net(), 0.5)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "in.pt")
    assert run("masks", tmp_path / "in.pt", tmp_path / "masks.pt") == 0
    masks = loaded(tmp_path / "masks.pt")
    assert masks.keys() == {name for name, _ in ps.named_masks(model)}
    ps.sparsify(net(), masks)
    for name in ("fc", prefix + "fc", "fc.weight"):
        assert run("prune", tmp_path / "in.pt", tmp_path / "no.pt", "--rule", f"{name}=0.5") == 1
        assert "must be plain" in capsys.readouterr().err


def test_a_tensor_that_has_the_plain_name_of_another_keeps_its_own(tmp_path, capsys):
    state = {"w": torch.ones(2, 2), "_orig_mod.w": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "a.pt")
    torch.save(state | {"_orig_mod.w": torch.ones(2, 2)}, tmp_path / "b.pt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt") == 1
    assert "_orig_mod.w: 4 of 4" in capsys.readouterr().out
