"""Rules as they are written on a command line or in a file of TOML."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parasparse import distributions, patterns
from parasparse.files.checkpoint import CheckpointError
from parasparse.patterns import Pattern
from parasparse.rules.prune import Prune
from parasparse.scores.weights_alone import magnitude, random

SCORES = {"magnitude": magnitude, "random": random}
DISTRIBUTIONS = {
    "uniform": None, "erk": distributions.erk, "erdos-renyi": distributions.erdos_renyi,
}  # fmt: skip
SCOPES = {"local": "local", "global": "global"}
_KEYS = ("pattern", "scope", "score", "distribution", "seed")


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors that a glob or name reaches; no `prune`: nothing."""

    target: str
    prune: Prune | None


def read_config(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options and the rules of a file of TOML.

        scope = "global"
        [rules]
        "layer*.weight" = 0.9
        "head.weight" = { sparsity = 0.5, pattern = "channel:0" }
        "*.bias" = "none"

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            config = tomllib.load(file)
    except OSError as error:
        raise CheckpointError(f'"{path}" cannot be read: {error.strerror}.') from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f'"{path}" is no TOML: {error}.') from error
    rules = config.pop("rules", None)
    if not isinstance(config.get("seed", 0), int):
        raise CheckpointError(f'"{path}" must hold a whole number as its seed.')
    unknown = [key for key in config if key not in _KEYS]
    if unknown or not isinstance(rules, dict):
        raise CheckpointError(
            f'"{path}" must hold a table [rules], and of {", ".join(_KEYS)} what it wants; '
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
    """Return the rules that are meant.

    Args:
        rules: target -> a sparsity, "none", a pattern that decides by itself ("2:4"), or a table of
            these with options of their own.
        options: `pattern`, `scope`, `score`, `distribution` of those that say no other.

    Raises:
        CheckpointError: a value that means nothing.
    """
    if not rules:
        raise CheckpointError("at least one rule must be given: --rule 'layer*.weight=0.9'.")
    return [Rule(target, _prune(target, value, options)) for target, value in rules.items()]


def _prune(target: str, value: Any, options: Mapping[str, Any]) -> Prune | None:
    if isinstance(value, Mapping):
        unknown = [k for k in value if k not in ("sparsity", *_KEYS[:-1])]
        if unknown:
            raise CheckpointError(
                f'the rule of "{target}" must hold of sparsity, {", ".join(_KEYS[:-1])} what it '
                f'wants; it holds "{unknown[0]}".'
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
    score = _one_of(SCORES, "score", options.get("score") or "magnitude")
    distribution = options.get("distribution") or "uniform"
    scope = _one_of(SCOPES, "scope", options.get("scope") or "local")
    try:
        return Prune(
            sparsity,
            pattern=pattern,
            score=score,
            scope=scope,
            distribution=_one_of(DISTRIBUTIONS, "distribution", distribution),
        )
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
        raise CheckpointError(f'the pattern "{text}" means nothing: {error}') from error
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


def _one_of(known: Mapping[str, Any], what: str, name: str) -> Any:
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f'the {what} must be one of {", ".join(known)}; got "{name}".')
    return known[name]
