"""`prune_blocks` of models whose weights stay in a checkpoint."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import parasparse as ps
from tests.oneshot.block_models import Chain

RULE = ps.OneShot(0.5, update="obs")


def batches():
    return list(torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)))


def on_meta(build=Chain):
    with torch.device("meta"):
        return build()


def everything(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return Chain()


@pytest.fixture
def source(dense, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(dense.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def expected(dense):
    return ps.squash(ps.prune_blocks(copy.deepcopy(dense), batches(), RULE)).state_dict()


def test_the_files_hold_what_pruning_in_memory_gives(source, expected, tmp_path):
    model = on_meta()
    parameters = list(model.parameters())
    output = tmp_path / "output"
    assert ps.prune_blocks(model, batches(), RULE, source=source, output=output) is model
    found = everything(output)
    assert list(expected) == [name for name in expected if name in found]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    assert (output / "config.json").read_text() == "{}"
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert all((output / name).exists() for name in index["weight_map"].values())


def test_one_block_at_a_time_is_in_memory(source, tmp_path):
    model = on_meta()
    most = []

    def count(*_):
        real = [b for b in model.layers if any(not t.is_meta for t in b.parameters())]
        most.append(len(real))

    for layer in model.layers:
        layer.up.register_forward_pre_hook(count)
    ps.prune_blocks(model, batches(), RULE, source=source, output=tmp_path / "output")
    assert set(most) == {1}


def test_an_interrupted_call_goes_on_at_its_block(source, expected, tmp_path):
    output, seen = tmp_path / "output", []

    def stop(report):
        seen.append(report.name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    options = {"source": source, "output": output}
    with pytest.raises(KeyboardInterrupt):
        ps.prune_blocks(on_meta(), batches(), RULE, progress=stop, **options)
    assert not list(output.glob("*.index.json"))
    times = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    assert len(times) == 2
    with pytest.raises(ValueError, match="new folder"):
        ps.prune_blocks(on_meta(), batches(), RULE, **options)
    ps.prune_blocks(on_meta(), batches(), RULE, resume=True, **options)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    found = everything(output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Twice(Chain):
    """Calls its blocks twice, so that the model runs again from the start."""

    def forward(self, x):
        x = self.embed(x)
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return self.head(x)


class Tied(Chain):
    """A head that is tied to a layer outside the blocks, whose name alone is in the checkpoint."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x @ self.head.weight


@pytest.mark.parametrize("build", [Twice, Tied])
def test_models_that_call_blocks_twice_or_tie_tensors(build, tmp_path):
    torch.manual_seed(0)
    dense = build()
    state = dense.state_dict()
    if build is Tied:
        del state["head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    expected = ps.squash(ps.prune_blocks(dense, batches(), RULE)).state_dict()
    model = on_meta(build)
    if build is Tied:
        model.head.weight = model.embed.weight
    output = tmp_path / "output"
    source = tmp_path / "model.safetensors"
    ps.prune_blocks(model, batches(), RULE, source=source, output=output)
    found = everything(output)
    assert set(found) == set(state)
    assert all(torch.equal(found[name], expected[name]) for name in state)


def lacks_a_tensor(state):
    del state["layers.1.up.weight"]


def has_another_dtype(state):
    state["head.bias"] = state["head.bias"].double()


def has_another_shape(state):
    state["head.bias"] = state["head.bias"][:2].clone()


BAD = {
    "a tensor that is missing": (lacks_a_tensor, r"layers\.1\.up\.weight"),
    "another dtype": (has_another_dtype, "float64"),
    "another shape": (has_another_shape, r"\(2,\)"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_checkpoints_of_other_models_are_refused(spoil, message, dense, tmp_path):
    state = dense.state_dict()
    spoil(state)
    save_file(state, tmp_path / "model.safetensors")
    model = on_meta()
    with pytest.raises(ValueError, match=message):
        ps.prune_blocks(
            model, batches(), RULE, source=tmp_path / "model.safetensors", output=tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere", "output": "new"}, "nowhere"),
        ({"source": "nowhere"}, "together"),
        ({"output": "new"}, "together"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ps.prune_blocks(on_meta(), batches(), RULE, **options)


def test_an_error_leaves_the_model_on_the_meta_device(source, tmp_path):
    model = on_meta()
    bad = [torch.full((5, 6), torch.nan)]
    with pytest.raises(RuntimeError, match="finite"):
        ps.prune_blocks(model, bad, RULE, source=source, output=tmp_path / "output")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not ps.summary(model).rows
