"""Checkpoints with bitmasks, as compressed-tensors 0.13.0 has written them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import parasparse as ps
from tests.files.compressed_tensors.contents import FOLDER, llama, two_of_four, unstructured
from tests.files.test_packing import same
from tests.helpers.checkpoints import loaded, run

FILES = {
    "bitmask.safetensors": unstructured,
    "two_of_four.safetensors": two_of_four,
    "llama": lambda: llama().state_dict(),
}
each = pytest.mark.parametrize("file", FILES)


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same(found[name], tensor), name


@each
def test_load_packed_returns_the_dense_tensors(file):
    found = ps.load_packed(FOLDER / file)
    check_same(found, FILES[file]())
    for tensor in found.values():
        tensor.zero_()  # is a copy of its own
    check_same(ps.load_packed(FOLDER / file), FILES[file]())
    with torch.device("meta"):  # the default device does not matter
        found = ps.load_packed(FOLDER / file)
    check_same(found, FILES[file]())


@each
def test_inspect_sees_the_zeros(file, capsys):
    assert run("inspect", FOLDER / file, "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    for name, tensor in FILES[file]().items():
        assert rows[name]["zeros"] == (tensor == 0).sum()
        assert rows[name]["shape"] == list(tensor.shape)


@each
def test_unpack_writes_a_dense_checkpoint(file, tmp_path):
    assert run("unpack", FOLDER / file, tmp_path / "dense.safetensors") == 0
    check_same(load_file(tmp_path / "dense.safetensors"), FILES[file]())


def test_a_folder_becomes_a_folder_that_transformers_loads(tmp_path):
    assert run("unpack", FOLDER / "llama", tmp_path / "dense") == 0
    check_same(loaded(tmp_path / "dense"), llama().state_dict())
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    check_same(model.state_dict(), llama().state_dict())


def test_what_else_the_configuration_says_stays(tmp_path):
    shutil.copytree(FOLDER / "llama", tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["quantization_config"]["config_groups"] = {"all": {}}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    assert run("unpack", tmp_path / "in", tmp_path / "out") == 0
    del config["quantization_config"]["sparsity_config"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


def test_the_parts_of_a_weight_may_lie_in_different_shards(tmp_path):
    state, weight_map = load_file(FOLDER / "bitmask.safetensors"), {}
    for number, (key, tensor) in enumerate(state.items()):
        weight_map[key] = f"{number % 3}.safetensors"
        own = {key for key, file in weight_map.items() if file == weight_map[key]}
        save_file({**{k: state[k] for k in own}, key: tensor}, tmp_path / weight_map[key])
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    check_same(ps.load_packed(tmp_path), unstructured())


def test_other_commands_read_them_too(tmp_path):
    path = FOLDER / "bitmask.safetensors"
    assert run("pack", path, tmp_path / "packed.safetensors") == 0
    check_same(ps.load_packed(tmp_path / "packed.safetensors"), unstructured())
    assert run("diff", path, tmp_path / "packed.safetensors") == 0


def test_buffers_that_are_called_alike_are_no_weights(tmp_path):
    state = {"a.bitmask": torch.ones(3), "b.compressed": torch.ones(3), "b.shape": torch.ones(3)}
    save_file(state, tmp_path / "x.safetensors")
    assert run("diff", tmp_path / "x.safetensors", tmp_path / "x.safetensors") == 0
    with pytest.raises(ValueError, match="another kind of file"):
        ps.load_packed(tmp_path / "x.safetensors")


def changed(path, **parts):
    """Write a file with one weight, some of whose parts are replaced (None: missing)."""
    state = load_file(FOLDER / "bitmask.safetensors")
    weight = {key: state[key] for key in state if key.startswith("a.")}
    weight |= {f"a.{part}": value for part, value in parts.items()}
    save_file({key: value for key, value in weight.items() if value is not None}, path)
    return path


WEIGHT = load_file(FOLDER / "bitmask.safetensors")
HUGE = 1 << 62
DAMAGED = {
    "a value less": {"compressed": WEIGHT["a.compressed"][1:]},
    "a value more": {"compressed": torch.ones(len(WEIGHT["a.compressed"]) + 1)},
    "a bit less": {"bitmask": WEIGHT["a.bitmask"] & 0xFD},
    "bits of another type": {"bitmask": WEIGHT["a.bitmask"].view(torch.int8)},
    "a row less": {"bitmask": WEIGHT["a.bitmask"][1:].clone()},
    "no rows": {"bitmask": WEIGHT["a.bitmask"].flatten()},
    "a single byte": {"bitmask": WEIGHT["a.bitmask"][0, 0].clone()},
    "offsets that are wrong": {"row_offsets": WEIGHT["a.row_offsets"] + 1},
    "offsets for fewer rows": {"row_offsets": WEIGHT["a.row_offsets"][1:].clone()},
    "offsets of another type": {"row_offsets": WEIGHT["a.row_offsets"].int()},
    "no shape": {"shape": None},
    "a shape of one size": {"shape": torch.tensor([66])},
    "a shape of another type": {"shape": torch.tensor([6.0, 11.0])},
    "a shape that is too wide": {"shape": torch.tensor([6, 17])},
    "a shape that is too narrow": {"shape": torch.tensor([6, 8])},
    "a shape below 0": {"shape": torch.tensor([-6, 11])},
    "a shape that is huge": {"shape": torch.tensor([HUGE, HUGE])},
    "the weight once more": {"weight": torch.ones(6, 11)},
}


@pytest.mark.parametrize("parts", DAMAGED.values(), ids=DAMAGED)
def test_parts_that_do_not_fit_are_an_error_that_names_the_weight(parts, tmp_path, capsys):
    path = changed(tmp_path / "x.safetensors", **parts)
    with pytest.raises(ValueError, match='no intact "a.weight"'):
        ps.load_packed(path)
    for command in (["inspect", path], ["unpack", path, tmp_path / "out.pt"]):
        assert run(*command) == 1
        assert '"a.weight"' in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_offsets_may_be_missing_as_in_two_of_four(tmp_path):
    path = changed(tmp_path / "x.safetensors", row_offsets=None)
    assert same(ps.load_packed(path)["a.weight"], unstructured()["a.weight"])


def test_quantized_values_are_refused_with_the_way_out(tmp_path, capsys):
    with pytest.raises(ValueError, match=r'"[ab]\.weight".*before quantization'):
        ps.load_packed(FOLDER / "quantized.safetensors")
    assert run("inspect", FOLDER / "quantized.safetensors") == 1
    assert "quantized" in capsys.readouterr().err
