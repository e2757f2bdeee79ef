"""Short names of tensors for pictures."""

from collections.abc import Sequence


def labels(names: Sequence[str], most: int) -> list[str]:
    """Return distinct labels of about `most` characters for `names`, escaped for matplotlib.

    Parts without a digit shrink to their first letter, from the left, until a name fits.

    Examples:
        >>> labels(["encoder.layer.11.attention.query", "head"], 20)
        ['e.l.11.a.query', 'head']
    """
    short = [_shortened(name, most) for name in names]
    if len(set(short)) < len(set(names)):
        short = [f"{number} {name}" for number, name in enumerate(short, start=1)]
    # matplotlib typesets text between $ as a formula, and leaves names with _ out of legends.
    return [(" " if name.startswith("_") else "") + name.replace("$", r"\$") for name in short]


def _shortened(name: str, most: int) -> str:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= most:
            break
        if not any(character.isdigit() for character in part):
            parts[i] = part[:1]
    found = ".".join(parts)
    return found if len(found) <= most else "\N{HORIZONTAL ELLIPSIS}" + found[-most + 1 :]
