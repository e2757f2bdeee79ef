"""Random networks of up to a dozen operations, and random masks for them."""

import torch
import torch.nn.functional as F
from torch import nn

import parasparse as ps


class Do(nn.Module):
    """A function of tensors, with sizes as attributes and perhaps a parameter."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *x):
        return self.function(self, *x)


class Graph(nn.Module):
    """Each step makes one tensor of earlier ones; the last one is the output."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList()
        self.operands = []

    def forward(self, x):
        values = [x]
        for step, places in zip(self.steps, self.operands, strict=True):
            values.append(step(*(values[place] for place in places)))
        return values[-1]


def _divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def _conv(pick, x):
    if x.ndim not in (3, 4):
        return None
    groups = pick([1, 1, *_divisors(x.shape[1])])
    out = groups * pick([1, 2, 3] if groups > 1 else [2, 3, 4, 6])
    padding = pick([0, 1])
    kernel = pick([k for k in (1, 2, 3) if k <= min(x.shape[2:]) + 2 * padding])
    kind = nn.Conv1d if x.ndim == 3 else nn.Conv2d
    stride, bias = pick([1, 1, 2]), pick([True, True, False])
    return kind(x.shape[1], out, kernel, stride, padding, groups=groups, bias=bias)


def _transposed(pick, x):
    if x.ndim not in (3, 4):
        return None
    groups = pick([1, 1, *_divisors(x.shape[1])])
    kind = nn.ConvTranspose1d if x.ndim == 3 else nn.ConvTranspose2d
    return kind(x.shape[1], groups * pick([2, 3]), 2, pick([1, 2]), groups=groups)


def _linear(pick, x):
    return nn.Linear(x.shape[-1], pick([2, 3, 4, 6, 8]), bias=pick([True, True, False]))


def _norm(pick, x):
    channels = x.shape[1]
    groups = pick(_divisors(channels))
    kinds = [lambda: nn.LayerNorm(x.shape[-1])]
    if x.ndim > 2:
        kinds += [lambda: nn.GroupNorm(groups, channels)]
    if x.ndim < 5:
        kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[x.ndim - 2]
        kinds += [lambda: kind(channels)] * 3
    if x.ndim in (3, 4) and x[0, 0].numel() > 1:
        kind = (nn.InstanceNorm1d, nn.InstanceNorm2d)[x.ndim - 3]
        kinds += [lambda: kind(channels, affine=True)]
    return pick(kinds)()


def _act(pick, x):
    functions = [nn.ReLU, nn.Sigmoid, nn.GELU, nn.Tanh, nn.Dropout, nn.LeakyReLU, nn.ELU]
    kinds = [*functions, lambda: nn.ReLU(inplace=False), lambda: nn.PReLU(x.shape[1])]
    return pick(kinds)()


def _pool(pick, x):
    if x.ndim not in (3, 4) or min(x.shape[2:]) < 2:
        return None
    one = x.ndim == 3
    kinds = [
        lambda: (nn.MaxPool1d if one else nn.MaxPool2d)(2),
        lambda: (nn.AvgPool1d if one else nn.AvgPool2d)(2, 1, padding=1),
        lambda: (nn.AdaptiveAvgPool1d if one else nn.AdaptiveAvgPool2d)(2),
        lambda: nn.Upsample(scale_factor=2),
    ]
    return pick(kinds)()


def _reshape(pick, x):
    """Shapes change by numbers, attributes, or what the program reads from the shape."""
    c, *rest = x.shape[1:]
    g = pick(_divisors(c))
    d = pick(_divisors(x.shape[-1]))
    kinds = [
        Do(lambda m, x: x.flatten(1)),
        Do(lambda m, x: x.flatten(-2) if x.ndim > 2 else x),
        Do(lambda m, x: x.reshape(x.shape[0], m.g, -1), g=g),
        Do(lambda m, x: x.view(x.shape[0], x.shape[1] // g, g, *x.shape[2:]).transpose(1, 2)
           .reshape(x.shape)),
        Do(lambda m, x: x.reshape(x.shape[0], m.g, m.c, *x.shape[2:]).flatten(1, 2),
           g=g, c=c // g),
        Do(lambda m, x: x.unflatten(-1, (m.d, -1)).transpose(-1, -2).flatten(-2), d=d),
        Do(lambda m, x: x.unflatten(-1, (d, -1)).sum(-2)),
        Do(lambda m, x: x.unflatten(1, (g, -1)).mean(2)),
        Do(lambda m, x: x.reshape(x.shape[0], -1, m.d), d=d),
    ]  # fmt: skip
    if x.ndim == 4 and c % 4 == 0:
        kinds += [nn.PixelShuffle(2)] * 3
    if x.ndim > 2:
        kinds.append(nn.ChannelShuffle(g))
    if x.ndim == 4 and all(size % 2 == 0 for size in rest):
        kinds.append(nn.PixelUnshuffle(2))
    return pick(kinds)


def _permute(pick, x):
    a, b = pick(range(1, x.ndim)), pick(range(1, x.ndim))
    kinds = [lambda m, x: x.transpose(a, b)] * 2 + [lambda m, x: x.roll(1, a)]
    return Do(pick([*kinds, lambda m, x: x.flip(a)]))


def _pieces(pick, x):
    dim = pick([1, 1, -1])
    size = x.shape[dim]
    if size < 2:
        return None
    n = pick([2, 2, 3])
    at = pick(range(1, size))
    kinds = [
        Do(lambda m, x: torch.cat(x.chunk(n, dim)[::-1], dim)),
        Do(lambda m, x: x.chunk(n, dim)[0]),
        Do(lambda m, x: torch.cat(x.split([m.at, m.rest], dim)[::-1], dim), at=at, rest=size - at),
        Do(lambda m, x: x.split(m.at, dim)[-1], at=at),
        Do(lambda m, x: x.narrow(dim, 0, m.at) * 2, at=at),
        Do(lambda m, x: x.transpose(1, dim)[:, m.at :].transpose(1, dim), at=at),
        Do(lambda m, x: x.transpose(1, dim)[:, x.shape[dim] // 2 :].transpose(1, dim)),
        Do(lambda m, x: torch.stack([x, -x], dim).flatten(dim - (dim < 0), dim + (dim > 0))),
    ]
    if size % 2 == 0:
        kinds += [
            Do(lambda m, x: F.glu(x, dim)),
            Do(lambda m, x: (lambda a, b: a.sigmoid() * b)(*x.chunk(2, dim))),
            Do(lambda m, x: (lambda a, b: a.tanh() + b)(*x.split(x.shape[dim] // 2, dim))),
        ] * 2
    return pick(kinds)


def _with_parameter(pick, x):
    dims = pick([[1], [-1], [1, -1], range(1, x.ndim)])
    shape = [1] * x.ndim
    for dim in dims:
        shape[dim] = x.shape[dim]
    shape = shape[pick([0, 1]) :]
    weight = nn.Parameter(torch.randn(shape))
    functions = [
        lambda m, x: x * m.weight,
        lambda m, x: x + m.weight,
        lambda m, x: torch.maximum(x, m.weight),
        lambda m, x: m.weight - x,
        lambda m, x: torch.cat([x, m.weight.expand_as(x)], 1),
    ]
    return Do(pick(functions), weight=weight)


def _reduce(pick, x):
    dim = pick(range(1, x.ndim))
    functions = [
        lambda m, x: x * x.mean(dim, keepdim=True).sigmoid(),
        lambda m, x: x + x.sum(dim, keepdim=True),
        lambda m, x: x - x.amax(dim, keepdim=True),
        lambda m, x: x.softmax(dim),
        lambda m, x: x / (1 + x.norm(dim=dim, keepdim=True)),
        lambda m, x: x.cumsum(dim),
    ]
    if x.ndim > 2:
        functions += [lambda m, x: x.mean(dim), lambda m, x: x.sum(dim), lambda m, x: x.amax(dim)]
    return Do(pick(functions))


def _attention(pick, x):
    if x.ndim != 3:
        return None
    functions = [
        lambda m, x: x @ x.transpose(1, 2),
        lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
        lambda m, x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
        lambda m, x: torch.einsum("nlc,nmc->nlm", x, x.relu()),
    ]
    return Do(pick(functions))


def _plain(pick, x):
    dim = pick(range(1, x.ndim))
    functions = [
        lambda m, x: torch.fft.ifft(torch.fft.fft(x, dim=dim) * 1j, dim=dim).imag,
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=dim), n=x.shape[dim], dim=dim),
        lambda m, x: x + x.new_zeros(x.shape),
        lambda m, x: torch.zeros(x.size()).to(x).index_add(0, torch.arange(len(x)), x),
        lambda m, x: x.new_ones(1, *x.shape[1:]).expand(x.shape) * x,
        lambda m, x: x * x,
        lambda m, x: x.abs() + 0.5,
        lambda m, x: 1 - x,
        lambda m, x: torch.zeros_like(x) + x.exp().clamp(max=3),
        lambda m, x: F.pad(x, (1, 0)),
        lambda m, x: F.normalize(x, dim=1),
        lambda m, x: x.clone().mul_(0.5).add_(0.1),
        lambda m, x: x[:, None].squeeze() if 1 not in x.shape else x,
        lambda m, x: torch.where(x > 0, x, 0.5 * x),
        lambda m, x: x.unsqueeze(1).squeeze(1).repeat(*[1] * (x.ndim - 1), 2),
    ]
    return Do(pick(functions))


def _pair(pick, x, y):
    """Two tensors meet."""
    kinds = []
    if x.shape == y.shape:
        kinds += [
            Do(lambda m, x, y: x + y),
            Do(lambda m, x, y: x * y),
            Do(lambda m, x, y: x - y.sigmoid()),
            Do(lambda m, x, y: torch.maximum(x, y)),
            Do(lambda m, x, y: torch.stack([x, y], 1).sum(1)),
            Do(lambda m, x, y: torch.stack([x, y], 2).flatten(1, 2)),
        ]
    if x.ndim == y.ndim:
        kinds += [
            Do(lambda m, x, y, dim=dim: torch.cat([x, y], dim))
            for dim in range(1, x.ndim)
            if x.shape[:dim] + x.shape[dim + 1 :] == y.shape[:dim] + y.shape[dim + 1 :]
        ]
        if x.shape != y.shape and _broadcast(x.shape, y.shape):
            kinds += [Do(lambda m, x, y: x * y), Do(lambda m, x, y: x + y)]
    if x.ndim == y.ndim == 3 and x.shape[2] == y.shape[1]:
        kinds.append(Do(lambda m, x, y: x @ y))
    return pick(kinds) if kinds else None


def _broadcast(a, b):
    return all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True))


LAYERS = [_conv, _linear, _conv, _linear, _act, _act, _norm]
REST = [_transposed, _norm, _pool, _reshape, _reshape, _permute, _pieces, _pieces,
        _with_parameter, _reduce, _attention, _plain]  # fmt: skip


def random_graph(pick, depth):
    """Return a network of `depth` operations and a layer, and inputs for it."""
    shape = pick([(2, 3, 4, 4), (2, 3, 5), (2, 4), (2, 3, 4, 3)])
    example = torch.randn(shape, dtype=torch.double)
    graph, values = Graph(), [example]

    def add(step, *places):
        step = step.double().eval()
        with torch.no_grad():
            out = step(*(values[place] for place in places))
        if out.numel() > 3000 or out.ndim > 4 or out.ndim < 2 or out.shape[0] != shape[0]:
            return
        graph.steps.append(step)
        graph.operands.append(places)
        values.append(out)

    add(pick([_conv, _linear])(pick, example) or _linear(pick, example), 0)
    for _ in range(20 * depth):
        if len(graph.steps) > depth:
            break
        recent = range(max(1, len(values) - 3), len(values))
        first, second = pick([*recent, recent[-1]]), pick(recent)
        if pick([False, False, True]):
            step, places = _pair(pick, values[first], values[second]), (first, second)
        else:
            step, places = pick(pick([LAYERS, REST]))(pick, values[first]), (first,)
        if step is not None:
            add(step, *places)
    last = len(values) - 1
    layer = pick([_conv, _linear])(pick, values[last]) or _linear(pick, values[last])
    add(layer, last)
    return graph, example


def randomize(graph):
    """Give vectors, buffers included, values of both signs that are not 0."""
    for name, tensor in graph.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.3, 1.2) if "var" in name else tensor.uniform_(-1, 1)


def random_masks(pick, graph):
    """Return masks of units, slices and entries for some of the parameters."""
    masks = {}
    for name, tensor in graph.named_parameters():
        kind = pick(["none", "rows", "rows", "columns", "entries"])
        kept = torch.ones(tensor.shape, dtype=torch.bool)
        if kind == "entries":
            kept = torch.rand(tensor.shape) > pick([0.3, 0.8])
        elif kind != "none":
            dim = 0 if kind == "rows" or tensor.ndim < 2 else 1
            shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
            line = torch.rand(tensor.shape[dim]) > pick([0.3, 0.6, 0.6, 0.9])
            kept = line.view(shape).expand(tensor.shape).clone()
        if not bool(kept.all()):
            masks[name] = kept
    return masks


def other_inputs(graph, example):
    """Return inputs of other batch and image sizes that the network accepts."""
    shapes = [(3, *example.shape[1:]), (1, *example.shape[1:-1], example.shape[-1] + 2)]
    shapes.append((*example.shape[:2], *(n + 3 for n in example.shape[2:])))
    found = [torch.randn(example.shape, dtype=torch.double)]
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.double)
        try:
            with torch.no_grad():
                graph(x)
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue
        found.append(x)
    return found


def masked_graph(pick, depth):
    """Return a masked random network and an example input."""
    torch.manual_seed(pick(range(1000)))
    graph, example = random_graph(pick, depth)
    randomize(graph)
    if pick([False, True]):
        units = ps.coupled(graph, example)
        if units._shapes:
            score = lambda tensor, name: torch.rand(tensor.shape)  # noqa: E731
            return ps.sparsify(graph, units.rules(pick([0.3, 0.6]), score=score)), example
    masks = random_masks(pick, graph)
    return (ps.sparsify(graph, masks) if masks else graph), example
