"""`prune_blocks` of models whose weights stay in a checkpoint."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import parasparse as ps
from parasparse.oneshot import on_disk
from tests.oneshot.block_models import Block, Chain

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


class Buffers(Chain):
    """Batch norms, whose saved buffers differ from those of a new model, and a table not saved."""

    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.norm = nn.BatchNorm1d(8)
            layer.norm.register_buffer("table", torch.ones(1, device="cpu"), persistent=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(super().forward(x))


class Uncalled(Chain):
    """Does not call one of its blocks."""

    def __init__(self):
        super().__init__()
        self.layers.append(Block())

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers[:3]:
            x = layer(x)
        return self.head(x)


class Rest(Chain):
    """Its blocks have names that might mean something else."""

    def __init__(self):
        super().__init__(blocks=0)
        self.layers = nn.ModuleDict({"rest": Block(), "model": Block()})

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("build", [Twice, Tied, Buffers, Uncalled, Rest])
def test_models_of_all_kinds(build, device, tmp_path):
    torch.manual_seed(0)
    dense = build().eval()
    for name, buffer in dense.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(1, 4)
    state = dense.state_dict()
    if build is Tied:
        del state["head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    blocks = "layers.*" if build is Rest else None
    options = {"blocks": blocks, "device": device}
    expected = ps.prune_blocks(copy.deepcopy(dense), batches(), RULE, **options)
    expected = ps.squash(expected).state_dict()
    model = on_meta(build)
    if build is Tied:
        model.head.weight = model.embed.weight
    output = tmp_path / "output"
    source = tmp_path / "model.safetensors"
    ps.prune_blocks(model, batches(), RULE, source=source, output=output, **options)
    found = everything(output)
    assert set(found) == set(state)
    assert all(torch.equal(found[name], expected[name]) for name in state)
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name in load_file(output / file) for name, file in index.items())


def test_buffers_that_are_not_on_meta_are_read_and_come_back(tmp_path):
    dense = Buffers().eval()
    for buffer in dense.buffers():
        buffer.add_(3)
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    model = Buffers()
    for module in model.modules():  # as accelerate does
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    options = {"source": tmp_path / "model.safetensors", "output": tmp_path / "output"}
    ps.prune_blocks(model, batches(), RULE, **options)
    found = everything(tmp_path / "output")
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
        assert name not in found or torch.equal(found[name], dense.get_buffer(name))


def test_an_interrupted_write_leaves_no_file(source, expected, tmp_path, monkeypatch):
    output = tmp_path / "output"

    def interrupted(tensor):
        if output.exists() and len(list(output.glob("*.safetensors"))) == 1:
            raise KeyboardInterrupt
        return pieces(tensor)

    pieces = on_disk.pieces
    monkeypatch.setattr(on_disk, "pieces", interrupted)
    model = on_meta()
    options = {"source": source, "output": output}
    with pytest.raises(KeyboardInterrupt):
        ps.prune_blocks(model, batches(), RULE, **options)
    assert [file.name for file in output.iterdir()] == ["model-00001-of-00003.safetensors"]
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    monkeypatch.undo()
    reports = []
    ps.prune_blocks(model, batches(), RULE, resume=True, progress=reports.append, **options)
    found = everything(output)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert [report.sparsity for report in reports] == [0.5, 0.5, 0.5]


def lacks_a_tensor(state):
    del state["layers.1.up.weight"]


def has_another_name(state):
    state["layers.1.w1.weight"] = state.pop("layers.1.up.weight")


def has_another_dtype(state):
    state["head.bias"] = state["head.bias"].double()


def has_another_shape(state):
    state["head.bias"] = state["head.bias"][:2].clone()


BAD = {
    "a tensor that is missing": (lacks_a_tensor, r"layers\.1\.up\.weight"),
    "another name": (has_another_name, r'has "layers\.1\.w1\.weight".*save_original_format=False'),
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


def test_a_model_on_the_meta_device_needs_a_source():
    with pytest.raises(ValueError, match="`source`"):
        ps.prune_blocks(on_meta(), batches(), RULE)


def test_parameters_in_memory_are_refused(source, tmp_path):
    model = on_meta()
    model.layers[1].norm = nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"layers\.1\.norm\.weight"):
        ps.prune_blocks(model, batches(), RULE, source=source, output=tmp_path / "new")


def test_output_may_be_in_folders_that_do_not_exist(source, expected, tmp_path):
    output = tmp_path / "one" / "two"
    ps.prune_blocks(on_meta(), batches(), RULE, source=source, output=output)
    assert everything(output).keys() == expected.keys()


def test_output_must_not_have_other_files(source, dense, tmp_path):
    def stop(report):
        raise KeyboardInterrupt

    output = tmp_path / "output"
    options = {"source": source, "output": output}
    with pytest.raises(KeyboardInterrupt):
        ps.prune_blocks(on_meta(), batches(), RULE, progress=stop, **options)
    blocks = [["layers.1", "layers.2"], ["layers.1", "layers.2", "embed"]]  # fewer, and others
    others = [{**options, "blocks": each} for each in blocks]
    others += [{"source": source / "model.safetensors", "output": source}]
    file = source / "config.json"
    others += [{"source": source, "output": file}]
    for other in others:
        with pytest.raises(ValueError, match="`output` must be"):
            ps.prune_blocks(on_meta(), batches(), RULE, resume=True, **other)
    assert len(list(output.iterdir())) == 1


def test_an_error_leaves_the_model_on_the_meta_device(source, tmp_path):
    model = on_meta()
    bad = [torch.full((5, 6), torch.nan)]
    with pytest.raises(RuntimeError, match="finite"):
        ps.prune_blocks(model, bad, RULE, source=source, output=tmp_path / "output")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not ps.summary(model).rows
