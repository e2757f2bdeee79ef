"""`parasparse shrink`: a checkpoint cut by a plan is that of the model cut by the plan."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import parasparse as ps
from tests.helpers.checkpoints import all_formats, check_same, loaded, out_of, run, written

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """A convolution, a grouped one, a norm, an embedding tied to its head, other dtypes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.up = nn.Linear(12, 6)
        self.embedding = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x):
        x = self.norm(self.grouped(self.conv(x).relu())).relu().mean((2, 3))
        return self.head(self.up(x) + self.embedding.weight[0])


def masked():
    torch.manual_seed(0)
    model = Net().eval()
    ps.sparsify(model, ps.coupled(model, X).rules(0.5))
    mask = ps.mask_of(model, "conv.weight")
    return ps.deploy_masks(model, {"conv.weight": mask & (torch.rand(mask.shape) > 0.3)})


def saved_plan(folder, model):
    plan = ps.plan_shrink(model, X)
    assert plan.rows
    (folder / "plan.json").write_text(plan.to_json())
    return plan


@all_formats
@pytest.mark.parametrize("kind_of", ["masked", "dense"])
def test_the_checkpoint_is_that_of_the_smaller_model(tmp_path, kind, kind_of):
    model = masked()
    plan = saved_plan(tmp_path, model)
    state = model.state_dict() if kind_of == "masked" else ps.dense_state_dict(model)
    if kind != "pt":  # such files hold a tied tensor once
        state = {name: tensor for name, tensor in state.items() if "head" not in name}
    source, out = written(tmp_path, kind, state), out_of(tmp_path, kind)
    assert run("shrink", source, out, "--plan", tmp_path / "plan.json") == 0
    got = loaded(out)
    assert set(got) == set(state)
    assert all(got[name].dtype == tensor.dtype for name, tensor in state.items())
    small = ps.shrink(Net().eval(), plan)
    if kind != "pt":
        got |= {name.replace("embedding", "head"): t for name, t in got.items() if "emb" in name}
    ps.load_state_dict(small, got)
    torch.testing.assert_close(small(X), model(X))
    want = ps.dense_state_dict(ps.shrink(model, X))
    check_same(ps.dense_state_dict(ps.squash(small)), dict(want))


def test_ties_stay(tmp_path):
    model = masked()
    saved_plan(tmp_path, model)
    torch.save({"model": ps.dense_state_dict(model), "epoch": 3}, tmp_path / "in.pt")
    assert run("shrink", tmp_path / "in.pt", tmp_path / "out.pt",
               "--plan", tmp_path / "plan.json") == 0  # fmt: skip
    got = loaded(tmp_path / "out.pt")
    assert got["epoch"] == 3
    weights = [got["model"][f"{name}.weight"] for name in ("embedding", "head")]
    assert weights[0].data_ptr() == weights[1].data_ptr()


def test_masks_of_others_and_prefixes_of_wrappers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    torch_prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    kept = model[0].weight_mask[:, 0].bool()
    state = {f"module._orig_mod.{name}": t for name, t in model.state_dict().items()}
    torch.save(state, tmp_path / "in.pt")
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    ps.sparsify(dense, {"0.weight": kept.unsqueeze(1), "0.bias": kept})
    saved_plan_of = ps.plan_shrink(dense, torch.randn(1, 4)).to_json()
    (tmp_path / "plan.json").write_text(saved_plan_of)
    assert run("shrink", tmp_path / "in.pt", tmp_path / "out.pt",
               "--plan", tmp_path / "plan.json") == 0  # fmt: skip
    got = loaded(tmp_path / "out.pt")
    assert list(got) == list(state)
    for name, dim in (("0.weight_orig", 0), ("0.weight_mask", 0), ("0.bias", 0), ("2.weight", 1)):
        whole = state[f"module._orig_mod.{name}"]
        want = whole.index_select(dim, kept.nonzero().flatten())
        assert torch.equal(got[f"module._orig_mod.{name}"], want)


def damaged(plan, **changes):
    content = json.loads(plan)
    content["rows"][0] |= changes
    return json.dumps(content)


@pytest.fixture
def folder(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    rules = {"0.weight": (torch.arange(8) < 3).unsqueeze(1), "0.bias": torch.arange(8) < 3}
    plan = ps.plan_shrink(ps.sparsify(model, rules), torch.randn(1, 4)).to_json()
    plans = {
        "good": plan, "text": "no plan", "list": "[1]", "other": '{"rows": 3}',
        "out of range": damaged(plan, kept={"0": [0, 1, 8]}),
        "negative": damaged(plan, kept={"0": [-1, 1, 2]}),
        "too few": damaged(plan, kept={"0": [0, 1]}),
        "no such dim": damaged(plan, kept={"0": [0, 1, 2], "2": [0]}),
    }  # fmt: skip
    for name, text in plans.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    state = ps.dense_state_dict(model)
    torch.save(state, tmp_path / "good.pt")
    torch.save({f"x.{name}": t for name, t in state.items()}, tmp_path / "renamed.pt")
    torch.save({**state, "0.weight": torch.zeros(7, 4)}, tmp_path / "narrow.pt")
    torch.save({**state, "0.weight_mask": torch.ones(8, 1), "0.weight_orig": state["0.weight"]},
               tmp_path / "broadcast.pt")  # fmt: skip
    return tmp_path


REFUSED = {  # checkpoint, plan, what the error says
    "no plan": ("good", "nowhere", "cannot be read: No such file"),
    "not JSON": ("good", "text", "must be a plan, as written by `Shrinkage.to_json`"),
    "not a table": ("good", "list", "must be a plan, as written by `Shrinkage.to_json`"),
    "another table": ("good", "other", "must be a plan, as written by `Shrinkage.to_json`"),
    "not text": ("good", "binary", "must be a plan, as written by `Shrinkage.to_json`"),
    **{name: ("good", name, "is damaged: the indices that") for name in
       ("out of range", "negative", "too few", "no such dim")},
    "missing": ("renamed", "good", 'names the tensor "0.weight", which'),
    "wrong shape": ("narrow", "good", '"0.weight" must have the shape (8, 4) of the plan'),
    "broadcast mask": ("broadcast", "good", '"0.weight_mask" must have the shape (8, 4)'),
}  # fmt: skip


@pytest.mark.parametrize(("checkpoint", "plan", "text"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(folder, capsys, checkpoint, plan, text):
    out = folder / "out.pt"
    paths = (folder / f"{checkpoint}.pt", out, "--plan", folder / f"{plan}.json")
    assert run("shrink", *paths) == 1
    error = capsys.readouterr().err
    assert text in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


class Normed(nn.Module):
    """An RMSNorm over a stream: its weight is rescaled."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.RMSNorm(8, eps=0.1), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


@pytest.mark.parametrize("kind_of", ["masked", "dense", "of torch.nn.utils.prune"])
def test_the_weight_of_an_rms_norm_is_rescaled_and_its_mask_is_not(tmp_path, kind_of):
    model, x = Normed(), torch.randn(2, 4)
    units = ps.coupled(model, x)
    ps.sparsify(model, units.rules(0.5))
    plan = ps.plan_shrink(model, x)
    (tmp_path / "plan.json").write_text(plan.to_json())
    state = dict(model.state_dict() if kind_of == "masked" else ps.dense_state_dict(model))
    if kind_of.endswith("prune"):
        state["norm.weight_orig"] = state.pop("norm.weight")
        state["norm.weight_mask"] = ps.mask_of(model, "norm.weight").float()
    source, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(state, source)
    assert run("shrink", source, out, "--plan", tmp_path / "plan.json") == 0
    got = torch.load(out)
    if kind_of.endswith("prune"):
        assert got.pop("norm.weight_mask").tolist() == [1.0] * 4
        got["norm.weight"] = got.pop("norm.weight_orig")
    small = ps.shrink(Normed(), plan)
    ps.load_state_dict(small, got)
    torch.testing.assert_close(small(x), model(x))
    assert small.norm.eps == 0.2
