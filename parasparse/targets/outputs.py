"""Which output of a layer each entry of its weight belongs to."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from parasparse.targets.tensors import Site, Target


def outputs_of(target: Target, positions: Tensor) -> Tensor:
    """Return the number of the output of each entry, for positions in the flattened weight."""
    site, rest = _site(target), target.shape[1:].numel()
    rows = positions.div(rest, rounding_mode="floor")
    if not _has_outputs_second(site):
        return rows
    outputs = target.shape[1]  # of a group
    columns = (positions % rest).div(target.shape[2:].numel(), rounding_mode="floor")
    group = rows.div(target.shape[0] // _groups(site), rounding_mode="floor")
    return group * outputs + columns


def num_outputs(target: Target) -> int:
    """Return the number of outputs of a layer.

    Raises:
        ValueError: which entries belong to an output is not known.
    """
    site = _site(target)
    if isinstance(site.module, nn.Embedding | nn.EmbeddingBag):
        what = "looked up and not multiplied"
    elif len(target.shape) > 2 and not isinstance(site.module, _ConvNd | nn.Bilinear):
        what = f"a stack of matrices in a {type(site.module).__name__}"
    elif len(target.shape) < 2:
        what = "not a matrix"
    else:
        second = _has_outputs_second(site)
        return target.shape[1] * _groups(site) if second else target.shape[0]
    raise ValueError(
        f'"{target.name}" {tuple(target.shape)} must be the weight of a layer whose inputs can be '
        f"counted; it is {what}. Give it None to leave it dense."
    )


def _site(target: Target) -> Site:
    """Return the site whose module multiplies, where others only look up."""
    embeddings = nn.Embedding | nn.EmbeddingBag
    multiply = [site for site in target.sites if not isinstance(site.module, embeddings)]
    return (multiply or target.sites)[0]


def _has_outputs_second(site: Site) -> bool:
    """Whether the second dimension counts the outputs, as in the Conv1D of transformers."""
    classes = [base.__name__ for base in type(site.module).__mro__]
    return isinstance(site.module, _ConvTransposeNd) or "Conv1D" in classes


def _groups(site: Site) -> int:
    return getattr(site.module, "groups", 1)
