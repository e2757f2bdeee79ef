"""The tables that the laws run over: every kind of module that users bring."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Case:
    """A module, a rule that masks it, inputs, and what of the laws does not hold for it.

    The flags name what even the dense module cannot do.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    rules: object = 0.5
    underneath: bool = False  # other parametrizations lie under the mask
    compiles: bool = True  # into one graph
    pickles: bool = True


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(self.body(self.embedding(index)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x).relu())


class PairLinear(nn.Module):
    """A complex layer in two real tensors, as attributes."""

    def __init__(self, real="weight_re", imag="weight_im"):
        super().__init__()
        self.names = real, imag
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.randn(4, 6)))

    def forward(self, x):
        real, imag = (getattr(self, name) for name in self.names)
        return torch.cat([x @ real.T, x @ imag.T], -1)


class DictLinear(nn.Module):
    """A complex layer as cplxmodule has it: a ParameterDict with `real` and `imag`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.ParameterDict({"real": torch.randn(4, 6), "imag": torch.randn(4, 6)})

    def forward(self, x):
        return torch.cat([x @ self.weight["real"].T, x @ self.weight.imag.T], -1)


class OddNames(nn.Module):
    """Parameters with the names of ModuleDict's methods, a buffer, and a list."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(6, 6))
        self.items = nn.ParameterList([torch.randn(6, 6), torch.randn(6, 6)])
        self.register_buffer("values", torch.randn(6, 6))
        self.register_buffer("scratch", torch.full((6,), 2.0), persistent=False)

    def forward(self, x):
        return x @ self.keys @ self.items[0] @ self.items[1] @ self.values * self.scratch


class Decorated(nn.Linear):
    """A subclass with state, a constructor of its own and slots of its own making."""

    def __init__(self, width, *, scale):
        super().__init__(width, width)
        self.scale = scale

    def forward(self, x):
        return super().forward(x) * self.scale


def frozen_linear():
    model = nn.Linear(6, 4)
    model.weight.requires_grad_(False)
    return model


def floats(*shape, dtype=torch.float32):
    return lambda: (torch.randn(*shape, dtype=dtype),)


def indices(*shape, high=12):
    return lambda: (torch.randint(high, shape),)


def attention(x):
    return lambda: (torch.randn(*x),) * 3


CASES = {
    "linear": Case(lambda: nn.Linear(6, 4), floats(3, 6)),
    "linear_of_many_dimensions": Case(lambda: nn.Linear(6, 4), floats(2, 3, 5, 6)),
    "sequential": Case(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
        floats(3, 6),
        {"*": 0.5, "0.bias": 0.5},
    ),
    "conv1d": Case(lambda: nn.Conv1d(3, 4, 3), floats(2, 3, 9)),
    "conv2d": Case(lambda: nn.Conv2d(4, 4, 3, groups=2), floats(2, 4, 6, 6)),
    "conv2d_channels_last": Case(
        lambda: nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), floats(2, 4, 6, 6)
    ),
    "conv3d": Case(lambda: nn.Conv3d(2, 3, 2), floats(1, 2, 4, 4, 4)),
    "conv_transpose2d": Case(lambda: nn.ConvTranspose2d(3, 4, 2), floats(2, 3, 4, 4)),
    "bilinear": Case(lambda: nn.Bilinear(4, 5, 3), lambda: (torch.randn(2, 4), torch.randn(2, 5))),
    "embedding": Case(lambda: nn.Embedding(12, 6), indices(2, 5), {"weight": 0.5}),
    "embedding_bag": Case(lambda: nn.EmbeddingBag(12, 6), indices(2, 5), {"weight": 0.5}),
    "batchnorm_weight": Case(lambda: nn.BatchNorm1d(6), floats(3, 6), {"weight": 0.5}),
    "lstm": Case(
        lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True), floats(3, 2, 4), compiles=False
    ),
    "gru_one_of_two_weights": Case(
        lambda: nn.GRU(4, 5), floats(3, 2, 4), {"weight_hh_l0": 0.5}, compiles=False
    ),
    "rnn": Case(lambda: nn.RNN(4, 5), floats(3, 2, 4), compiles=False),
    "lstm_cell": Case(lambda: nn.LSTMCell(4, 5), floats(3, 4)),
    "mha": Case(lambda: nn.MultiheadAttention(8, 2), attention((3, 2, 8))),
    "mha_apart": Case(lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=8), attention((3, 2, 8))),
    "transformer_layer": Case(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), floats(3, 2, 8)
    ),
    "tied": Case(Tied, indices(2, 5), {"head.weight": 0.5, "body": 0.5}),
    "shared": Case(Shared, floats(2, 6)),
    "frozen_parameter": Case(frozen_linear, floats(3, 6)),
    "weight_norm": Case(
        lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        floats(3, 6),
        underneath=True,
        pickles=False,  # torch registers a local function
    ),
    "spectral_norm": Case(
        lambda: parametrizations.spectral_norm(nn.Linear(6, 4)).eval(),
        floats(3, 6),
        underneath=True,
    ),
    "orthogonal": Case(
        lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
        floats(3, 6),
        underneath=True,
        compiles=False,  # matrix_exp and householder break dense graphs as well
    ),
    "complex": Case(
        lambda: nn.Linear(6, 4, dtype=torch.cfloat),
        floats(3, 6, dtype=torch.cfloat),
        compiles=False,
    ),
    "complex128": Case(
        lambda: nn.Linear(6, 4, dtype=torch.cdouble),
        floats(3, 6, dtype=torch.cdouble),
        compiles=False,
    ),
    "pair": Case(PairLinear, floats(3, 6)),
    "pair_real_imag": Case(lambda: PairLinear("w_real", "w_imag"), floats(3, 6), {"w": 0.5}),
    "pair_in_a_dict": Case(DictLinear, floats(3, 6)),
    "half": Case(lambda: nn.Linear(6, 4, dtype=torch.half), floats(3, 6, dtype=torch.half)),
    "bfloat16": Case(
        lambda: nn.Linear(6, 4, dtype=torch.bfloat16), floats(3, 6, dtype=torch.bfloat16)
    ),
    "double": Case(lambda: nn.Linear(6, 4).double(), floats(3, 6, dtype=torch.double)),
    "odd_names": Case(OddNames, floats(2, 6), {"keys": 0.5, "items.*": 0.5, "values": 0.5}),
    "subclass": Case(lambda: Decorated(6, scale=math.pi), floats(3, 6)),
}

TREATMENTS = {
    "bool": lambda tensor: torch.rand(tensor.shape) < 0.5,
    "all": lambda tensor: torch.tensor(1.0),
    "none": lambda tensor: torch.tensor(0.0),
    "real": lambda tensor: torch.rand(tensor.shape) * (torch.rand(tensor.shape) < 0.5),
    "row": lambda tensor: torch.rand(tensor.shape[:1] + (1,) * (tensor.ndim - 1)) < 0.5,
}
