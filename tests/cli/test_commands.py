"""The other commands: masks that a checkpoint holds, files without zeros, what is there."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

import parasparse as ps
from tests.helpers.checkpoints import (
    Net,
    all_formats,
    check_same,
    loaded,
    out_of,
    run,
    state,
    written,
)


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
    if kind == "pt":  # what is masked still has its modules
        metadata = loaded(out_of(tmp_path, kind, "ours_out"))._metadata
        assert metadata == masked_by_us().state_dict()._metadata
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


def test_a_picture_of_no_weights_is_empty_and_needs_matplotlib(tmp_path, capsys, monkeypatch):
    torch.save({"bias": torch.ones(3)}, tmp_path / "in.pt")
    assert run("inspect", tmp_path / "in.pt", "--plot", tmp_path / "out.png") == 0
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "parasparse.report.plot_figure", raising=False)
    assert run("inspect", tmp_path / "in.pt", "--plot", tmp_path / "other.png") == 1
    assert "--plot needs matplotlib: run `pip install" in capsys.readouterr().err


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
