"""Short names for recipes, of the options in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from fastconv.training.recipe import RECIPES, Recipe

Options = Mapping[str, Any]


def differences(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Return, for each recipe, the options that set it apart from the others; equal recipes have equal ones.

    Where recipes stand on different bases, such as the lecture's and the modern one, the option "recipe" names the
    base, and what it implies is left out. Where each recipe keeps most of its base, as when ingredients are taken
    away one at a time, only the base and the changes are named.
    """
    bases = [base(recipe) for recipe in recipes]
    # None stands for what the base implies.
    changes = [
        {name: None if value == getattr(RECIPES[of], name) else (value,) for name, value in asdict(recipe).items()}
        for recipe, of in zip(recipes, bases, strict=True)
    ]
    varying = [field.name for field in fields(Recipe) if len({each[field.name] for each in changes}) > 1]
    # The seed comes last.
    varying.sort(key=lambda name: name == "seed")
    changed = [[name for name in varying if each[name]] for each in changes]
    if all(2 * len(names) < len(varying) for names in changed):
        chosen, names_base = changed, True
    else:
        chosen, names_base = [varying] * len(recipes), len(set(bases)) > 1
    return [
        ({"recipe": of} if names_base else {}) | {name: getattr(recipe, name) for name in names}
        for recipe, of, names in zip(recipes, bases, chosen, strict=True)
    ]


def base(recipe: Recipe) -> str:
    """Return the name of the recipe that shares the most options with this one."""
    options = asdict(recipe)
    return max(
        RECIPES, key=lambda name: sum(options[key] == value for key, value in asdict(RECIPES[name]).items())
    )


def words(options: Options) -> str:
    """Return options for people: "modern, width 32, flip on"."""
    return ", ".join(_word(name, value, " ").replace("_", " ") for name, value in options.items())


def file_name(options: Options) -> str:
    """Return options as the name of a folder: "modern_width-32_flip-on"; "run" if there are none."""
    return "_".join(_word(name.replace("_", "-"), value, "-") for name, value in options.items()) or "run"


def _word(name: str, value: Any, between: str) -> str:
    return str(value) if name == "recipe" else f"{name}{between}{shown(value)}"


def shown(value: Any) -> str:
    """Return an option's value as it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
