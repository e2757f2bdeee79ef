"""Rules as written on the command line or in a TOML file."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parasparse import distributions, patterns
from parasparse.files.checkpoint import CheckpointError
from parasparse.patterns import Pattern
from parasparse.rules.prune import Prune
from parasparse.scores.weights_alone import magnitude, random

# Option -> its values as written -> what `Prune` takes; the first is the default.
_CHOICES: dict[str, dict[str, Any]] = {
    "scope": {"local": "local", "global": "global"},
    "score": {"magnitude": magnitude, "random": random},
    "distribution": {
        "uniform": None, "erk": distributions.erk, "erdos-renyi": distributions.erdos_renyi,
    },
}  # fmt: skip
_OPTIONS = ("pattern", *_CHOICES, "max_sparsity")


@dataclass(frozen=True)
class Rule:
    """What to do with the tensors that a glob or name reaches; no `prune`: nothing."""

    target: str
    prune: Prune | None


def read_config(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options and the rules of a TOML file, as in this example.

    scope = "global"
    [rules]
    "layer*.weight" = 0.9
    "head.weight" = { sparsity = 0.5, pattern = "channel:0" }
    "*.bias" = "none"
    """
    try:
        with open(path, "rb") as file:
            config = tomllib.load(file)
    except OSError as error:
        raise CheckpointError(f'"{path}" cannot be read: {error.strerror}.') from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f'"{path}" is not valid TOML: {error}.') from error
    rules = config.pop("rules", None)
    if not isinstance(config.get("seed", 0), int):
        raise CheckpointError(f'the seed in "{path}" must be an integer.')
    unknown = [key for key in config if key not in (*_OPTIONS, "seed")]
    if unknown or not isinstance(rules, dict):
        raise CheckpointError(
            f'"{path}" must hold a table [rules] and may hold {", ".join(_OPTIONS)}, seed; '
            + (f'it holds "{unknown[0]}".' if unknown else "it has no [rules].")
        )
    return config, rules


def split_rules(texts: Sequence[str]) -> dict[str, str]:
    """Return target -> value of rules that are written `TARGET=VALUE`."""
    rules: dict[str, str] = {}
    for text in texts:
        target, equals, value = text.rpartition("=")
        if not equals or not target or not value:
            raise CheckpointError(
                f'a rule must be TARGET=VALUE, such as "layer*.weight=0.9"; got "{text}".'
            )
        if target in rules:
            raise CheckpointError(f'"{target}" must have one rule; it has two.')
        rules[target] = value
    return rules


def as_rules(rules: Mapping[str, Any], options: Mapping[str, Any]) -> list[Rule]:
    """Return rules from their written form.

    A target has a sparsity, "none", a pattern with its own sparsity ("2:4"), or a table with
    `sparsity` and its own options.
    """
    if not rules:
        raise CheckpointError("at least one rule must be given: --rule 'layer*.weight=0.9'.")
    return [Rule(target, _prune(target, value, options)) for target, value in rules.items()]


def _prune(target: str, value: Any, options: Mapping[str, Any]) -> Prune | None:
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("sparsity", *_OPTIONS)]
        if unknown:
            raise CheckpointError(
                f'the rule of "{target}" may hold sparsity, {", ".join(_OPTIONS)}; it holds '
                f'"{unknown[0]}".'
            )
        return _prune(target, value.get("sparsity", ""), {**options, **value})
    if str(value).lower() == "none":
        return None
    given = options.get("pattern") or "unstructured"
    if isinstance(value, str) and ":" in value:
        given, value = value, ""
    pattern = as_pattern(given)
    sparsity = _sparsity(target, value)
    if isinstance(pattern, patterns.n_of_m):
        own = 1 - pattern.n / pattern.m
        if sparsity is not None and sparsity != own:
            raise CheckpointError(
                f'the pattern {given} makes a sparsity of {own:g}; the rule of "{target}" asks for '
                f'{sparsity:g}. Write "{target}={given}".'
            )
        sparsity = None
    chosen = {option: _chosen(option, options.get(option)) for option in _CHOICES}
    bound = options.get("max_sparsity", 1.0)
    try:
        return Prune(sparsity, pattern=pattern, max_sparsity=bound, **chosen)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'the rule of "{target}": {error}') from error


def as_pattern(text: str) -> Pattern:
    """Return the pattern that is written "2:4", "block:16x16", "channel:0" or "unstructured".

    Examples:
        >>> as_pattern("block:16x16x*")
        block(shape=(16, 16, -1), norm=None)
    """
    kind, _, rest = str(text).partition(":")
    try:
        if kind.isdecimal():
            return patterns.n_of_m(int(kind), int(rest))
        if kind == "channel":
            return patterns.channel(int(rest or 0))
        if kind == "block":
            return patterns.block(tuple(-1 if n == "*" else int(n) for n in rest.split("x")))
        if text == "unstructured":
            return patterns.unstructured
    except ValueError as error:
        raise CheckpointError(f'the pattern "{text}" is not valid: {error}') from error
    raise CheckpointError(
        'a pattern must be unstructured, N:M, channel:0 or block:16x16 ("*" for a whole '
        f'dimension); got "{text}".'
    )


def _sparsity(target: str, value: Any) -> float | None:
    if value == "":
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise CheckpointError(
            f'the rule of "{target}" must be a sparsity in [0, 1], "none" or N:M; got "{value}".'
        ) from None


def _chosen(option: str, name: Any) -> Any:
    known = _CHOICES[option]
    name = name or next(iter(known))
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f'the {option} must be one of {", ".join(known)}; got "{name}".')
    return known[name]
