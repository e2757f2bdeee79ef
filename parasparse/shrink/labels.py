"""Labels: to which channel each entry of a tensor belongs.

A label is an int64 tensor with the shape of the tensor that it describes. Two entries with one id
are kept or removed together; id 0 is never removed. Along dimensions where the ids do not change,
a label is expanded (stride 0), so that it takes no memory there. A tensor may have several labels,
such as one for the rows and one for the columns of a weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_BITS = 31  # of an id: a pair of them is one number
_MANY = 10_000  # ids: where there are more, repeated ones are dropped


def tidy(label: Tensor) -> Tensor:
    """Return `label`, expanded along each dimension along which its ids do not change."""
    for dim in reversed(varying(label)):
        small = compact(label)
        first = small.narrow(dim, 0, 1)
        # The second index tells most labels that vary there, and a few others nearly all.
        if (
            torch.equal(small.narrow(dim, 1, 1), first)
            and not bool((small[(slice(None),) * dim + (slice(None, None, 61),)] != first).any())
            and not bool((small != first).any())
        ):
            label = label.narrow(dim, 0, 1).expand(label.shape)
    return label


def compact(label: Tensor) -> Tensor:
    """Return `label` with size 1 along the dimensions where it does not vary."""
    shape, strides = label.shape, label.stride()
    if 0 not in strides:
        return label
    sizes = [1 if not s else n for n, s in zip(shape, strides, strict=True)]
    return label.as_strided(sizes, strides)


def varies(label: Tensor, dim: int) -> bool:
    """Whether the ids of a tidy label change along `dim`."""
    return label.shape[dim] > 1 and label.stride(dim) != 0


def varying(label: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which the ids of a tidy label change."""
    shape = label.shape
    return tuple([dim for dim, stride in enumerate(label.stride()) if stride and shape[dim] > 1])


def fixed_along(label: Tensor, dim: int, size: int) -> Tensor:
    """Return `label` with the ids of index 0 along all of `dim`, which gets `size`."""
    dim %= label.ndim
    shape = [size if d == dim else n for d, n in enumerate(label.shape)]
    return label.narrow(dim, 0, 1).expand(shape)


def along(ids: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Return the label of a tensor of `shape` whose ids along `dim` are `ids`."""
    dim %= len(shape)
    return ids.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Create new tensors on the CPU, as labels are, whatever the default device is."""
    # In torch 2.9, `get_default_device` fails after `set_default_device(None)`: test_surroundings.
    if torch.empty(0).device.type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


def is_empty(label: Tensor) -> bool:
    """Whether all ids of a tidy label are 0."""
    return not varying(label) and not compact(label).any()


class Ties:
    """Ids, which of them belong together, and which must stay.

    Attributes:
        count: number of ids so far, with id 0.
        pins: ids that must stay, by reason.
    """

    def __init__(self) -> None:
        self.count = 1
        self.pins: dict[str, list[Tensor]] = {}
        self._edges: list[Tensor] = []

    def new(self, number: int) -> Tensor:
        """Return `number` ids that nothing else has."""
        self.count += number
        return torch.arange(self.count - number, self.count, device="cpu")

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Make the ids of `a` and `b`, of shapes that broadcast, one unit entry by entry."""
        a, b = compact(a), compact(b)
        if a.shape != b.shape:
            a, b = torch.broadcast_tensors(a, b)
        a, b = a.flatten(), b.flatten()
        if (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):  # the same ids
            return
        if not bool(torch.minimum(a, b).all()):
            self.pin(torch.where((a == 0) | (b == 0), a + b, 0), "it meets a size that stays")
            there = (a != 0) & (b != 0)
            a, b = a[there], b[there]
        edges = (a << _BITS) + b
        self._edges.append(torch.unique(edges) if len(edges) > _MANY else edges)

    def pin(self, label: Tensor, reason: str) -> None:
        """Keep all ids of `label`, for `reason`."""
        ids = compact(label).flatten()
        self.pins.setdefault(reason, []).append(torch.unique(ids) if len(ids) > _MANY else ids)

    def units(self) -> Tensor:
        """Return the unit of each id; tied ids have one. The unit of id 0 is 0."""
        units = torch.arange(self.count)
        edges = torch.cat([torch.zeros(0, dtype=torch.long), *self._edges])
        a, b = edges >> _BITS, edges & ((1 << _BITS) - 1)
        while len(a):  # tie the higher unit of each pair to the lower one, and look what is left
            units.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
            while not torch.equal(units, further := units[units]):
                units = further
            a, b = units[a], units[b]
            differ = a != b
            a, b = a[differ], b[differ]
        return units
