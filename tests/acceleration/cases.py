"""Layers that multiply with a weight, and inputs for them."""

import torch
from torch import nn


def x(*shape):
    return torch.randn(*shape)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


q, k = x(2, 5, 32), x(2, 7, 32)
mha = {"embed_dim": 32, "num_heads": 4}
CASES = {
    "linear": (lambda: nn.Linear(32, 48), (x(2, 5, 32),)),
    "linear, one row": (lambda: nn.Linear(32, 48), (x(32),)),
    "linear, no bias, many rows": (lambda: nn.Linear(32, 48, bias=False), (x(150, 32),)),
    "linear, no rows": (lambda: nn.Linear(32, 48), (x(0, 32),)),
    "conv1d": (lambda: nn.Conv1d(16, 32, 3, padding=1, stride=2), (x(2, 16, 9),)),
    "conv1d, unbatched": (lambda: nn.Conv1d(16, 32, 1), (x(16, 9),)),
    "conv2d": (lambda: nn.Conv2d(16, 32, (3, 2), padding=(1, 0), dilation=2), (x(2, 16, 9, 8),)),
    "conv2d, 1 x 1": (lambda: nn.Conv2d(16, 32, 1, stride=(2, 1)), (x(2, 16, 9, 8),)),
    "conv2d, same": (lambda: nn.Conv2d(16, 32, (5, 3), padding="same"), (x(1, 16, 9, 8),)),
    "conv2d, valid": (lambda: nn.Conv2d(16, 32, 3, padding="valid"), (x(1, 16, 9, 8),)),
    "conv2d, reflect": (
        lambda: nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"),
        (x(1, 16, 9, 8),),
    ),
    "conv2d, channels last": (
        lambda: nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last),
        (x(2, 16, 9, 8).to(memory_format=torch.channels_last),),
    ),
    "conv3d, 1 x 1 x 1": (lambda: nn.Conv3d(16, 32, 1, bias=False), (x(2, 16, 3, 4, 5),)),
    "conv3d": (lambda: nn.Conv3d(16, 32, 2), (x(2, 16, 3, 4, 5),)),
    "conv2d, groups": (
        lambda: nn.Sequential(nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 32, 1)),
        (x(2, 16, 4, 4),),
    ),
    "self-attention": (lambda: nn.MultiheadAttention(**mha, batch_first=True), (q, q, q)),
    "cross-attention": (lambda: nn.MultiheadAttention(**mha, batch_first=True), (q, k, k)),
    "attention of three": (
        lambda: nn.MultiheadAttention(**mha, batch_first=True, bias=False),
        (q, k, k.clone()),
    ),
    "attention, kdim": (
        lambda: nn.MultiheadAttention(**mha, kdim=16, vdim=24, batch_first=True),
        (q, x(2, 7, 16), x(2, 7, 24)),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        (q,),
    ),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), (q, k)),
    "lstm": (lambda: nn.LSTM(16, 32, num_layers=2), (x(5, 3, 16),)),
    "lstm, two ways": (
        lambda: nn.LSTM(16, 32, 2, bidirectional=True, batch_first=True, bias=False),
        (x(3, 5, 16),),
    ),
    "lstm, state": (lambda: nn.LSTM(16, 32), (x(5, 3, 16), (x(1, 3, 32), x(1, 3, 32)))),
    "conv1d, same, even": (
        lambda: nn.Conv1d(16, 32, 4, padding="same", dilation=2),
        (x(1, 16, 9),),
    ),
    "lstm, projections": (lambda: nn.LSTM(16, 32, proj_size=8), (x(5, 3, 16),)),
    "gru": (lambda: nn.GRU(16, 32, num_layers=2, bidirectional=True), (x(5, 3, 16),)),
    "gru, state, unbatched": (lambda: nn.GRU(16, 32), (x(5, 16), x(1, 32))),
    "rnn": (lambda: nn.RNN(16, 32), (x(5, 3, 16),)),
    "rnn, relu": (lambda: nn.RNN(16, 32, nonlinearity="relu"), (x(5, 3, 16),)),
    "tied": (Tied, (torch.randint(48, (2, 5)),)),
    "float64": (lambda: nn.Linear(32, 48).double(), (x(5, 32).double(),)),
}
