"""Options that several commands have, and what is done with them."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import torch
import typer

from fastconv import machine
from fastconv.operations import backends
from fastconv.training import data, labels
from fastconv.training.checkpoint import Checkpoint
from fastconv.training.data import DataError, Dataset
from fastconv.training.graphed import Graph
from fastconv.training.recipe import RECIPES, Recipe
from fastconv.training.sweep import axes
from fastconv.training.sweep.plan import Plan

Command = TypeVar("Command", bound=Callable[..., None])


def nonempty_path(text: str) -> Path:
    """Return a path that was typed. An empty one, as an unset variable gives, would be the current folder."""
    if not text:
        raise typer.BadParameter("it is empty; give a path")
    return Path(text)


def out_option(text: str, kind: str = "") -> Any:
    """Return the option --out, whose default is what `folder.make` makes for a kind."""
    default = f"runs/{f'{kind}-' if kind else ''}<date>-<time>"
    return typer.Option(
        parser=nonempty_path, metavar="PATH", help=f"{text}  \\[default: {default}]", show_default=False
    )


DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        parser=nonempty_path,
        metavar="PATH",
        help="Directory that holds CIFAR-10 (cifar-10-batches-py or cifar-10-batches-bin), or images of one "
        "size in train/<class>/ and test/<class>/. Without it a checkpoint's own data is used; a new run "
        "downloads CIFAR-10 once, into $FASTCONV_CACHE or ~/.cache/fastconv.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps", rich_help_panel="Machine")
]
BackendOption = Annotated[
    Literal["auto", "triton", "native", "portable", "reference"],
    typer.Option(help="Implementation of the fused operations.", rich_help_panel="Machine"),
]
GraphOption = Annotated[
    Graph,
    typer.Option(
        help="Replay each step as a CUDA graph, which changes no number: auto, on a GPU where it can be.",
        rich_help_panel="Machine",
    ),
]
TensorBoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Also write event files for TensorBoard beside the checkpoint.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, and all else on standard error.")
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="checkpoint.pt of a training run.", show_default=False)
]
RecipeOption = Annotated[
    Literal["lecture", "modern"],
    typer.Option(
        help="The defaults of the other options: the lecture's, or what measured best here.",
        rich_help_panel="Recipe",
    ),
]
# The fields of Recipe that are the classifier's.
MODEL = ("width", "depth", "patch")


def recipe_options(*names: str, lists: bool = False) -> Callable[[Command], Command]:
    """Give a command an option for each of these fields of Recipe; it takes their values as `**keywords`.

    With `lists` a value is the text of a list, such as "32,64", or None if none was typed.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        options = map(_list_option if lists else _option, names)
        parameters = [*options, *(each.replace(kind=each.KEYWORD_ONLY) for each in own)]
        # Typer reads a command's options from its signature.
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _option(name: str) -> inspect.Parameter:
    hint, default, modern = _field(name)
    text = hint.__metadata__[0] + (f"  \\[modern: {labels.shown(modern)}]" if modern != default else "")
    return _parameter(name, hint.__origin__, default, typer.Option(help=text, rich_help_panel=_panel(name)))


def _list_option(name: str) -> inspect.Parameter:
    hint, default, modern = _field(name)
    # A sweep's own, where it has one.
    default, *_ = axes.DEFAULTS.get(name, [default])
    choices = axes.choices(name)
    values = f"{', '.join(choices)}; " * bool(choices) + f"default: {labels.shown(default)}"
    if name not in axes.DEFAULTS and modern != default:
        values += f"; modern: {labels.shown(modern)}"
    text = f"{hint.__metadata__[0]}  \\[{values}]"
    option = typer.Option(help=text, rich_help_panel=_panel(name), metavar="LIST", show_default=False)
    return _parameter(name, str | None, None, option)


def _field(name: str) -> tuple[Any, Any, Any]:
    """Return the type hint of a field of Recipe, and its values in the lecture's and in the modern recipe."""
    hint = get_type_hints(Recipe, include_extras=True)[name]
    return hint, getattr(Recipe, name), getattr(RECIPES["modern"], name)


def _panel(name: str) -> str:
    return "Model" if name in MODEL else "Recipe"


def _parameter(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def resume_command(context: typer.Context, command: str, out: Path, options: Mapping[str, str]) -> str:
    """Return the line that goes on with what is in a folder, with the options that were typed.

    Args:
        options: those to repeat, by the names of their parameters.
    """
    words = ["fastconv", command, "--out", str(out), "--resume"]
    for name, option in options.items():
        if is_typed(context, name):
            value = context.params[name]
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def chosen_recipe(context: typer.Context, base: str, options: dict[str, Any]) -> Recipe:
    """Return the recipe called `base` with the options that were typed.

    Raises:
        ValueError: a value is out of range.
    """
    return replace(RECIPES[base], **{name: value for name, value in options.items() if is_typed(context, name)})


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError about an argument into the command line's own kind of error, with exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def load_data(directory: Path | None, trained: Checkpoint | Plan | None = None) -> Dataset:
    """Return the data set in a directory that was typed; else a checkpoint's or sweep's own, or CIFAR-10.

    Raises:
        DataError: it cannot be used.
    """
    if directory is not None or trained is None or trained.data_directory is None:
        return data.load(directory)
    try:
        return data.load(Path(trained.data_directory))
    except DataError as error:
        raise DataError(f"{error}; the run's data was there: if it has moved, name it with --data") from error


def choose(device: str, backend: str) -> torch.device:
    """Return the device of that name, and run the operations on that backend."""
    with usage_errors():
        place = machine.choose_device(device)
        backends.force(backend, place)
    return place
