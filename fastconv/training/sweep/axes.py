"""The axes of a sweep: options with the values they take, and the recipes that are their combinations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastconv.training.labels import shown, words
from fastconv.training.recipe import RECIPES, Recipe

# What differs from the recipes' own values where nothing else is asked for: it costs no time.
DEFAULTS: dict[str, list[Any]] = {"train_metrics": ["running"]}
# More is a mistake.
LARGEST = 1_000


def values(name: str, text: str) -> list[Any]:
    """Return the values of an option of Recipe, or of "recipe", out of a list such as "32,64".

    Raises:
        ValueError: one is not of the option's type, or comes twice.
    """
    read, expected = _reader(name)
    found = []
    for part in text.split(","):
        try:
            found.append(read(part.strip()))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{name} is {text!r}; expected {expected}, separated by commas: {part!r} is none"
            ) from error
    for value in found:
        if found.count(value) > 1:
            raise ValueError(f"{name} is {text!r}; {shown(value)} is there twice: give each value once")
    return found


def _reader(name: str) -> tuple[Callable[[str], Any], str]:
    """Return how one value of an option is read, and what values are called."""
    if name == "recipe":
        return _one_of({base: base for base in RECIPES})
    hint = get_type_hints(Recipe)[name]
    if NoneType in get_args(hint):
        kind = next(each for each in get_args(hint) if each is not NoneType)
        return lambda text: None if text == shown(None) else kind(text), f"integers or {shown(None)}"
    if get_origin(hint) is Literal:
        return _one_of({each: each for each in get_args(hint)})
    if hint is bool:
        return _one_of({shown(value): value for value in (True, False)})
    return hint, {int: "integers", float: "numbers"}[hint]


def _one_of(choices: Mapping[str, Any]) -> tuple[Callable[[str], Any], str]:
    return choices.__getitem__, f"some of {', '.join(choices)}"


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[Recipe]:
    """Return a recipe for every combination of values.

    Seeds vary slowest, so that there is soon a run of every variant; else the last axis varies fastest.

    Args:
        axes: values by option; "recipe" holds the names of those whose other options are kept.

    Raises:
        ValueError: a combination is no recipe; the message names it. Or there are too many, or two are equal.
    """
    axes = {"seed": [Recipe.seed], "recipe": ["lecture"], **DEFAULTS, **axes}
    if (count := math.prod(map(len, axes.values()))) > LARGEST:
        raise ValueError(f"the sweep has {count:,} runs; expected at most {LARGEST:,}: give shorter lists")
    varying = sorted((name for name, found in axes.items() if len(found) > 1), key=lambda name: name == "seed")
    recipes: dict[Recipe, str] = {}
    for chosen in itertools.product(*axes.values()):
        options = dict(zip(axes, chosen, strict=True))
        name = words({each: options[each] for each in varying})
        base = RECIPES[options.pop("recipe")]
        with naming(name):
            recipe = replace(base, **options)
        if recipe in recipes:
            raise ValueError(f"{name} is the same run as {recipes[recipe]}; give one of them")
        recipes[recipe] = name
    return list(recipes)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a combination's name, if it has one, before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from error
