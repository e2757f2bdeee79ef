"""The comparison in README, run: what masks of torch's own tools do where ours do it."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

import parasparse as ps

README = Path(__file__).parents[2] / "README.md"


def by_prune(model, names):
    for name in names:
        layer, _, attr = name.rpartition(".")
        prune.l1_unstructured(model.get_submodule(layer), attr, 0.5)


def by_ao(model, names):
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1))
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in names])
    sparsifier.step()


def by_parasparse(model, names):
    ps.sparsify(model, dict.fromkeys(names, 0.5))


TOOLS = {"torch.nn.utils.prune": by_prune, "torch.ao.pruning": by_ao, "parasparse": by_parasparse}
X = torch.ones(3, 8)


def net(mask=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    if mask is not None:
        mask(model, ["0.weight", "2.weight"])
    return model


def trained(mask):
    model = net(mask)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model(X).sum().backward()
    optimizer.step()
    return model


def is_copied(mask):
    copy.deepcopy(trained(mask))
    return True


def is_pickled(mask):
    torch.save(net(mask), io.BytesIO())
    return True


def loads_a_dense_checkpoint(mask):
    net(mask).load_state_dict(net().state_dict())
    return True


def is_fresh(mask):
    model = trained(mask)
    read = model[0].weight.detach().clone()
    model(X)
    return torch.equal(model[0].weight, read)


def masks_nan(mask):
    model = net(mask)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "orig" in name:
                parameter.fill_(float("nan"))
    model(X)
    return bool((model[0].weight == 0).any())


def compiles(mask):
    torch._dynamo.reset()
    torch.compile(net(mask), fullgraph=True, backend="eager")(X)
    return True


def masks_complex(mask):
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.cfloat))
    mask(model, ["0.weight"])
    return int((model[0].weight == 0).sum()) == 8


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def masks_every_place(mask):
    model = Tied()
    mask(model, ["head.weight"])
    return torch.equal(model.embedding.weight, model.head.weight)


def stores_a_byte(mask):
    model = net(mask)
    return any(b.numel() == 64 and b.element_size() == 1 for b in model.buffers())


ROWS = {
    "`deepcopy` of a model in training (EMA, best model)": is_copied,
    "`torch.save(model)`, pickle": is_pickled,
    "a dense checkpoint loads strictly into the masked model": loads_a_dense_checkpoint,
    "`layer.weight` is up to date after `optimizer.step()`": is_fresh,
    "a masked entry is 0 where the stored one is NaN or inf": masks_nan,
    "`torch.compile(fullgraph=True)`": compiles,
    "complex weights": masks_complex,
    "a tied weight is masked everywhere it is used": masks_every_place,
    "a mask takes 1 byte per entry": stores_a_byte,
}


# Where they raise, and what; anything else is a mistake of ours.
REFUSALS = {
    ("torch.nn.utils.prune", is_copied): RuntimeError,
    ("torch.nn.utils.prune", loads_a_dense_checkpoint): RuntimeError,
    ("torch.ao.pruning", is_pickled): RuntimeError,
    ("torch.ao.pruning", loads_a_dense_checkpoint): RuntimeError,
    ("torch.ao.pruning", compiles): torch._dynamo.exc.Unsupported,
    ("torch.ao.pruning", masks_complex): TypeError,
}


def answer(ask, tool):
    refusal = REFUSALS.get((tool, ask))
    if refusal is None:
        return "yes" if ask(TOOLS[tool]) else "no"
    with pytest.raises(refusal):
        ask(TOOLS[tool])
    return "no"


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.skipif(not "2.15" <= torch.__version__ < "2.16", reason="README tells of torch 2.15")
@pytest.mark.parametrize("row", ROWS)
def test_readme_says_what_each_does(row):
    line = re.search(rf"^\| {re.escape(row)} \|(.*)\|$", README.read_text(), re.MULTILINE)
    said = [cell.strip() for cell in line[1].split("|")][: len(TOOLS)]
    assert said == [answer(ROWS[row], tool) for tool in TOOLS]


@pytest.mark.parametrize("row", ROWS)
def test_ours_does_all_of_it(row):
    assert ROWS[row](by_parasparse)
