"""The command line on checkpoints as they come: nested, tied, shared, half masked, oddly named."""

import json
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import parasparse as ps
from tests.helpers.checkpoints import loaded, run

RULE = ("--rule", "w.weight=0.5")


@pytest.fixture
def w():
    torch.manual_seed(0)
    return torch.randn(8, 8)


@pytest.fixture
def pruned(tmp_path):
    def prune(content, *rules):
        torch.save(content, tmp_path / "in.pt")
        assert (
            run("prune", tmp_path / "in.pt", tmp_path / "out.pt", "--force", *(rules or RULE)) == 0
        )
        return loaded(tmp_path / "out.pt")

    return prune


def half(tensor):
    return ps.squash(ps.sparsify(holding(tensor), {"weight": 0.5})).weight.detach()


def holding(tensor):
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(tensor.clone())
    return model


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_tensors_that_are_nested_or_named_by_numbers_stay(pruned, w, key):
    state = {"w.weight": w, "w._extra_state": {"amax": torch.ones(3)}, 0: torch.full((2,), 7.0)}
    out = pruned(state if key is None else {key: state})
    out = out if key is None else out[key]
    assert torch.equal(out["w.weight"], half(w))
    assert out["w._extra_state"]["amax"].tolist() == [1, 1, 1]
    assert out[0].tolist() == [7, 7]


def test_what_shares_memory_does_not_undo_it(pruned, w):
    storage = torch.arange(96.0)
    out = pruned({"w.weight": w, "d.weight": w.t(), "same": w, "a": storage[:64].view(8, 8),
                  "b": storage[32:]}, *RULE, "--rule", "a=0.5")  # fmt: skip
    assert torch.equal(out["w.weight"], half(w))
    assert torch.equal(out["same"], half(w))
    assert out["same"].data_ptr() == out["w.weight"].data_ptr()
    assert torch.equal(out["d.weight"], w.t())
    assert torch.equal(out["a"], half(storage[:64].view(8, 8)))
    assert torch.equal(out["b"], storage[32:])
    average = pruned({"state_dict": {"w.weight": w}, "ema": {"w.weight": w}, "best": w[0, 0]})
    assert torch.equal(average["state_dict"]["w.weight"], half(w))
    assert torch.equal(average["ema"]["w.weight"], w)
    assert average["best"] == w[0, 0]
    number = torch.randn(4, 4, dtype=torch.cfloat)
    both = pruned({"w.weight": number.conj(), "z": number})
    assert torch.equal(both["z"], number)


def test_parameters_expanded_tensors_and_containers_of_all_kinds(pruned, w):
    whole = {
        "state_dict": OrderedDict(
            {"w.weight": nn.Parameter(w), "e": torch.ones(1, 4).expand(3, 4)}
        ),
        "optimizer": {"state": {0: {"m": nn.Parameter(torch.ones(2))}}, "groups": [{"lr": 0.1}]},
        "pair": (torch.zeros(2), {"x": [torch.ones(1)]}), "shape": torch.Size([1, 2]),
    }  # fmt: skip
    out = pruned(whole)
    assert torch.equal(out["state_dict"]["w.weight"], half(w))
    assert torch.equal(out["state_dict"]["e"], torch.ones(3, 4))
    assert out["optimizer"]["state"][0]["m"].tolist() == [1, 1]
    assert out["optimizer"]["groups"] == [{"lr": 0.1}]
    assert out["pair"][1]["x"][0].item() == 1
    assert out["shape"] == torch.Size([1, 2])


def test_what_is_not_dense_beside_a_state_dict_is_refused(tmp_path, w, capsys):
    torch.save({"state_dict": {"w.weight": w}, "s": torch.eye(3).to_sparse()}, tmp_path / "in.pt")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", *RULE) == 1
    assert "is sparse" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_binarize_makes_masks_bool_in_every_format(tmp_path, w, suffix):
    one, two = torch.rand(8, 8), (torch.rand(8, 8) > 0.5).float()
    state = {"a.weight": w, "a.mask": one, "b.weight": w, "b.mask": two}
    torch.save(state, tmp_path / "in.pt")
    assert run("binarize", tmp_path / "in.pt", tmp_path / f"out.{suffix}") == 0
    out = loaded(tmp_path / f"out.{suffix}")
    for name, mask in (("a", one), ("b", two)):
        assert torch.equal(out[f"{name}.mask"], mask != 0)
        assert torch.equal(out[f"{name}.weight"], w * mask)


def test_a_tensor_beside_the_state_dict_does_not_hide_it(tmp_path, w, capsys):
    for name, weight in (("a", w), ("b", w + 1)):
        content = {"best_acc1": torch.tensor(70.0), "epoch": 1, "state_dict": {"w.weight": weight}}
        torch.save(content, tmp_path / f"{name}.pt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt") == 1
    assert "Not compared: best_acc1, epoch" in capsys.readouterr().out
    assert run("pack", tmp_path / "a.pt", tmp_path / "packed.pt") == 0
    assert "Left out: best_acc1, epoch" in capsys.readouterr().out


def test_diff_measures_integers_and_nan(tmp_path, capsys):
    pairs = {
        "u8": (torch.uint8, [0], [255]), "i8": (torch.int8, [-100], [100]),
        "u16": (torch.uint16, [1, 2], [1, 9]), "nan": (torch.float, [float("nan")], [1.0]),
    }  # fmt: skip
    one, two = (
        {name: torch.tensor(pair[n]).to(pair[0]) for name, pair in pairs.items()} for n in (1, 2)
    )
    torch.save(one, tmp_path / "a.pt")
    torch.save(two, tmp_path / "b.pt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt") == 1
    text = capsys.readouterr().out
    for line in ("u8: 1 of 1 entries differ, by 255", "i8: 1 of 1 entries differ, by 200",
                 "u16: 1 of 2 entries differ, by 7", "nan: 1 of 1 entries differ, by"):  # fmt: skip
        assert line in text


def test_names_that_safetensors_do_not_know_are_refused(tmp_path, w, capsys):
    torch.save({"w.weight": w, "__metadata__": torch.ones(2)}, tmp_path / "in.pt")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.safetensors", *RULE) == 1
    assert "cannot store the tensor name '__metadata__'" in capsys.readouterr().err
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", *RULE) == 0


def test_the_index_says_which_of_two_copies_counts(tmp_path, w):
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({"w.weight": w}, folder / "1.safetensors")
    save_file({"w.weight": w + 1, "b": torch.ones(2)}, folder / "2.safetensors")
    index = {"metadata": None, "weight_map": {"w.weight": "1.safetensors", "b": "2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.fp16.safetensors.index.json").write_text(json.dumps(index))
    assert run("prune", folder, tmp_path / "out", *RULE) == 1  # two indices: which?
    given = folder / "model.safetensors.index.json"
    assert run("prune", given, tmp_path / "out", *RULE) == 0
    assert torch.equal(load_file(tmp_path / "out/1.safetensors")["w.weight"], half(w))
    assert set(load_file(tmp_path / "out/2.safetensors")) == {"b"}


@pytest.fixture
def hf(tmp_path, w):
    folder = tmp_path / "above" / "hf"
    (folder / "1_Pooling").mkdir(parents=True)
    save_file({"w.weight": w}, folder / "model.safetensors")
    for file in ("config.json", "1_Pooling/config.json", "optimizer.pt", "notes.tmp"):
        (folder / file).write_text(file)
    return folder


def test_a_folder_keeps_all_that_lies_in_it(hf, tmp_path, w):
    for out in (tmp_path / "out", hf):
        assert run("prune", hf, out, "--force", *RULE) == 0
        for file in ("config.json", "1_Pooling/config.json", "optimizer.pt", "notes.tmp"):
            assert (out / file).read_text() == file
        assert torch.equal(load_file(out / "model.safetensors")["w.weight"], half(w))


def test_a_folder_that_is_no_checkpoint_is_not_replaced(hf, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    (hf.parent / "precious.txt").write_text("more")
    for out in (home, hf.parent):
        assert run("prune", hf, out, "--force", *RULE) == 1
    monkeypatch.chdir(hf)
    assert run("prune", hf, hf, "--force", *RULE) == 1
    assert "must not hold IN or the current" in capsys.readouterr().err
    assert (home / "thesis.txt").read_text() == "years"
    assert (hf.parent / "precious.txt").read_text() == "more"
    assert (hf / "config.json").exists()


def test_masks_go_to_a_file_of_their_own(tmp_path, w, capsys):
    torch.save({"w.weight": w}, tmp_path / "in.pt")
    for masks in ("in.pt", "out.pt"):
        arguments = ("prune", tmp_path / "in.pt", tmp_path / "out.pt", *RULE, "--force")
        assert run(*arguments, "--masks", tmp_path / masks) == 1
        assert "must name another file" in capsys.readouterr().err
    assert torch.equal(loaded(tmp_path / "in.pt")["w.weight"], w)


def test_what_a_model_computes_is_left_to_it(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    ps.sparsify(model, {"1.weight": 0.5})
    torch.save(model.state_dict(), tmp_path / "in.pt")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", "--rule", "2.weight=0.5") == 0
    assert (loaded(tmp_path / "out.pt")["2.weight"] == 0).sum() == 8
    for rule in ("*=0.5", "0.weight=0.5", "1=0.5"):
        code = run("prune", tmp_path / "in.pt", tmp_path / "no.pt", "--rule", rule)
        assert code == 1
        assert "is masked or parametrized" in capsys.readouterr().err
    rules = ("--rule", "0.weight*=none", "--rule", "1.weight*=none", "--rule", "*=0.5")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", "--force", *rules) == 0
    assert (loaded(tmp_path / "out.pt")["2.weight"] == 0).sum() == 8
    for name in model.state_dict():
        if name != "2.weight":
            assert torch.equal(loaded(tmp_path / "out.pt")[name], model.state_dict()[name])
    pruned = nn.Sequential(nn.Linear(4, 4))
    nn.utils.prune.l1_unstructured(pruned[0], "weight", 0.5)
    torch.save(pruned.state_dict(), tmp_path / "torch.pt")
    assert run("prune", tmp_path / "torch.pt", tmp_path / "no.pt", "--rule", "*weight*=0.9") == 1

    rules = ("--rule", "0.weight=none", "--rule", "*=0.9", "--force")
    assert run("prune", tmp_path / "torch.pt", tmp_path / "no.pt", *rules) == 1  # nothing is left


def test_random_scores_are_drawn_in_turn_whatever_their_sizes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 400), nn.Linear(2, 2), nn.Linear(400, 500))
    torch.save(model.state_dict(), tmp_path / "in.pt")
    flags = ("--rule", "*.weight=0.5", "--score", "random", "--seed", "3", "--scope", "global")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", *flags) == 0
    torch.manual_seed(3)
    random = ps.Prune(0.5, score=ps.scores.random, scope="global")
    ps.squash(ps.sparsify(model, {"*.weight": random}))
    for name, tensor in loaded(tmp_path / "out.pt").items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(
    "odd", [lambda t: t.untyped_storage(), lambda t: {t}, lambda t: {t: 1}, lambda t: [[{t}]]]
)
def test_tensors_in_odd_places_are_refused(tmp_path, w, odd, capsys):
    torch.save({"state_dict": {"w.weight": w}, "x": odd(torch.arange(5.0))}, tmp_path / "in.pt")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", *RULE) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()


def test_what_does_not_come_along_is_said_and_metadata_of_shards_does(tmp_path, w, hf, capsys):
    whole = {"state_dict": {"a_orig": w, "a_mask": w > 0}, "epoch": 3}
    torch.save(whole, tmp_path / "in.pt")
    for verb in ("squash", "binarize"):
        assert run(verb, tmp_path / "in.pt", tmp_path / f"{verb}.safetensors") == 0
        assert "Left out: epoch" in capsys.readouterr().out
    save_file({"w.weight": w}, hf / "model.safetensors", metadata={"format": "pt"})
    assert run("prune", hf, tmp_path / "one.safetensors", *RULE) == 0
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_masks_and_outputs_stay_out_of_folders(hf, tmp_path, capsys):
    assert run("prune", hf, tmp_path / "out", *RULE, "--masks", tmp_path / "out/m.pt") == 1
    assert run("prune", hf, hf, "--force", *RULE, "--masks", hf / "m.pt") == 1
    assert run("prune", hf, hf / "out", *RULE) == 1
    assert "must not be inside IN" in capsys.readouterr().err
    loras = tmp_path / "loras"
    loras.mkdir()
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, loras / f"{name}.safetensors")
    assert run("prune", hf, loras, "--force", *RULE) == 1
    assert "replaced as a whole" in capsys.readouterr().err


def test_links_and_modes_of_a_folder_stay(hf, tmp_path):
    (hf / "run.sh").write_text("run")
    (hf / "run.sh").chmod(0o750)
    (hf / "nowhere").symlink_to("gone")
    (hf / "1_Pooling/self").symlink_to("..")
    hf.chmod(0o700)
    for out in (tmp_path / "out", hf):
        assert run("prune", hf, out, "--force", *RULE) == 0
        assert (out / "run.sh").stat().st_mode & 0o777 == 0o750
        assert out.stat().st_mode & 0o777 == 0o700
        assert (out / "nowhere").is_symlink()
        assert (out / "1_Pooling/self").is_symlink()


@pytest.mark.parametrize("name", ["forward", "type", "T_destination", "training", "a.half"])
def test_names_that_are_a_modules_own(pruned, w, name):
    assert torch.equal(pruned({name: w}, "--rule", f"{name}=0.5")[name], half(w))


def test_a_tensor_that_is_there_masked_and_plain_is_refused(tmp_path, w, capsys):
    state = {"w.weight_orig": w, "w.weight_mask": w != 0, "w.weight": w}
    torch.save(state, tmp_path / "in.pt")
    assert run("squash", tmp_path / "in.pt", tmp_path / "out.pt") == 1
    assert 'must hold "w.weight" once' in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        'scope = ["a"]\n[rules]\n"w.weight" = 0.5\n', 'seed = [1]\n[rules]\n"w.weight" = 0.5\n',
        'seed = "x"\n[rules]\n"w.weight" = 0.5\n',
        '[rules]\n"w.weight" = { scope = { a = 1 }, sparsity = 0.5 }\n',
        '[rules]\n"w.weight" = [0.5]\n', "[rules]\n",
    ],
)  # fmt: skip
def test_odd_configurations_are_one_line(tmp_path, w, text, capsys):
    torch.save({"w.weight": w}, tmp_path / "in.pt")
    (tmp_path / "rules.toml").write_text(text)
    flags = ("--config", tmp_path / "rules.toml")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.pt", *flags) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_masks_of_ties_and_pairs_attach(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.head = nn.Linear(4, 6)
            self.head.weight = self.table.weight
            self.k_re, self.k_im = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    model = ps.sparsify(Both(), {"head.weight": 0.5, "k": 0.5})
    torch.save(model.state_dict(), tmp_path / "in.pt")
    assert run("masks", tmp_path / "in.pt", tmp_path / "masks.pt") == 0
    masks = loaded(tmp_path / "masks.pt")
    assert set(masks) == {"table.weight", "k"}
    again = ps.sparsify(Both(), masks)
    for name, mask in ps.named_masks(model):
        assert torch.equal(dict(ps.named_masks(again))[name], mask)


def test_float8_under_an_integer_mask(tmp_path):
    weight = torch.tensor([-1.125, 0.875, 2.0]).to(torch.float8_e4m3fn)
    state = {"w_orig": weight, "w_mask": torch.tensor([1, 1, 0], dtype=torch.uint8)}
    torch.save(state, tmp_path / "in.pt")
    assert run("squash", tmp_path / "in.pt", tmp_path / "out.pt") == 0
    assert loaded(tmp_path / "out.pt")["w"].float().tolist() == [-1.125, 0.875, 0]


def test_conjugate_and_negated_views_are_written(tmp_path, w):
    number = torch.randn(4, 4, dtype=torch.complex64)
    try:
        save_file({"a": number}, tmp_path / "complex.safetensors")
        load_file(tmp_path / "complex.safetensors")
    except Exception as error:  # safetensors' own class is not public
        pytest.skip(f"this safetensors has no complex numbers: {error}")
    state = {"w.weight": w, "a": number.conj(), "b": number.clone().conj().imag}
    torch.save(state, tmp_path / "in.pt")
    rule = ("--rule", "w.weight=0.5")
    assert run("prune", tmp_path / "in.pt", tmp_path / "out.safetensors", *rule) == 0
    out = load_file(tmp_path / "out.safetensors")
    assert torch.equal(out["a"], state["a"])
    assert torch.equal(out["b"], state["b"])


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no float4")
def test_float4_is_copied(tmp_path, w):
    packed = torch.randint(256, (4, 6), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    try:
        save_file({"w.weight": w, "packed": packed}, tmp_path / "in.safetensors")
    except Exception as error:  # safetensors' own class is not public
        pytest.skip(f"this safetensors cannot write float4: {error}")
    for name in ("w.weight", "*"):
        rule = ("--rule", f"{name}=0.5", "--force")
        assert run("prune", tmp_path / "in.safetensors", tmp_path / "out.safetensors", *rule) == 0
        out = load_file(tmp_path / "out.safetensors")
        assert torch.equal(out["packed"].view(torch.uint8), packed.view(torch.uint8))
