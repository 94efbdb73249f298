"""The command line: fastconv train, evaluate, predict, summary, check, bench, swap-report, info."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastconv import (
    backends,
    check_display,
    checkpoint,
    curves,
    data,
    environment,
    prediction,
    problems,
    selftest,
    swapping,
    training,
    zoo,
)
from fastconv import check as checking
from fastconv.bench.command import bench
from fastconv.display import Display, model_summary
from fastconv.extras import MissingPackage, import_extra
from fastconv.progress import progress
from fastconv.training import Recipe

CHECKPOINT = "checkpoint.pt"
# The exit code of a program that Ctrl-C stopped.
INTERRUPTED = 130
RESUMED_FLAGS = [("deterministic", "--deterministic"), ("json_output", "--json")]
DEFAULTS = Recipe()

app = typer.Typer(
    help="Train the lecture's CIFAR-10 classifier with fused convolution modules, and use the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Directory that holds CIFAR-10 (cifar-10-batches-py or cifar-10-batches-bin), or images of one "
        "size in train/<class>/ and test/<class>/. Without it CIFAR-10 is downloaded once, into "
        "$FASTCONV_CACHE or ~/.cache/fastconv.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps", rich_help_panel="Machine")
]
BackendOption = Annotated[
    Literal["auto", "triton", "portable", "reference"],
    typer.Option(help="Implementation of the fused operations.", rich_help_panel="Machine"),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, and all else on standard error.")
]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", help="checkpoint.pt of a training run.", show_default=False)
]
WidthOption = Annotated[int, typer.Option(help="Channels of the first stage.", rich_help_panel="Model")]
DepthOption = Annotated[int, typer.Option(help="Blocks in each of the two stages.", rich_help_panel="Model")]
PatchOption = Annotated[int, typer.Option(help="Side of the stem's patches, pixels.", rich_help_panel="Model")]


def main() -> None:
    """Run the command line. Known errors become one line on standard error and exit code 2."""
    # OSError is what a full disk or a directory without permission raises; its text names the file.
    known = (data.DataError, checkpoint.CheckpointError, backends.BackendUnavailable, MissingPackage, OSError)
    for stream in (sys.stdout, sys.stderr):
        # Tables and file names have characters that not every terminal's encoding has.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except known as error:
        print(f"fastconv: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def callback(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        print(f"fastconv {environment.package_version('fastconv')}")
        raise typer.Exit


@app.command()
def train(
    context: typer.Context,
    data_directory: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to save the run.  \\[default: runs/<date>-<time>]", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run saved in --out.")] = False,
    json_output: JsonOption = False,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training images.", rich_help_panel="Recipe")
    ] = DEFAULTS.epochs,
    batch_size: Annotated[
        int,
        typer.Option(
            help="Images per step, and in evaluation: the layer norm spans the batch.",
            rich_help_panel="Recipe",
        ),
    ] = DEFAULTS.batch_size,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.", rich_help_panel="Recipe")] = DEFAULTS.lr,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's weight decay.", rich_help_panel="Recipe")
    ] = DEFAULTS.weight_decay,
    seed: Annotated[
        int, typer.Option(help="Of the initial weights and the order of images.", rich_help_panel="Recipe")
    ] = DEFAULTS.seed,
    split_seed: Annotated[
        int, typer.Option(help="Of the split into training and validation images.", rich_help_panel="Recipe")
    ] = DEFAULTS.split_seed,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="bf16 uses torch.autocast.", rich_help_panel="Recipe")
    ] = "fp32",
    limit: Annotated[
        int | None,
        typer.Option(
            help="For a quick try: use only the first so many training, validation and test images.",
            show_default=False,
            rich_help_panel="Recipe",
        ),
    ] = DEFAULTS.limit,
    width: WidthOption = DEFAULTS.width,
    depth: DepthOption = DEFAULTS.depth,
    patch: PatchOption = DEFAULTS.patch,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Refuse operations that do not repeat bit for bit. On a CPU all repeat.",
            rich_help_panel="Machine",
        ),
    ] = False,
) -> None:
    """Train the classifier by the lecture's recipe; with no options, on CIFAR-10, for five epochs.

    Saves config.json, metrics.jsonl, curves.png and checkpoint.pt. Ctrl-C saves too, and so does a run that is
    killed, every half minute: [bold]fastconv train --out DIR --resume[/bold] goes on from there.
    """
    console = Console(stderr=json_output)
    for package in ("torchinfo", "matplotlib"):
        import_extra(package)
    if resume and out is None:
        raise typer.BadParameter("--resume goes on with the run in a directory; name it with --out DIR")
    out = out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out is {out}, a file; give a directory")
    path = out / CHECKPOINT
    resumed = checkpoint.load(path) if resume else None
    if resumed is None and path.exists():
        raise typer.BadParameter(f"{out} holds a run; go on with it by --resume, or give another --out")
    with usage_errors():
        if resumed is None:
            recipe = Recipe(**{field.name: context.params[field.name] for field in fields(Recipe)})
        else:
            recipe = resumed_recipe(context, resumed)
        place = environment.choose_device(device)
        environment.choose_backend(backend, place)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    dataset = data.load(data_directory)
    console.print(f"Data: {dataset.source}", highlight=False, soft_wrap=True)
    image_size = dataset.train.images.shape[1:]
    with usage_errors():
        training.check_patch(recipe, image_size)
    layers = model_summary(recipe, image_size, len(dataset.classes), depth=2)
    console.print(layers, highlight=False, markup=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "recipe": asdict(recipe),
        "device": str(place),
        "backend": backends.current(),
        "data": dataset.source,
        "versions": environment.versions(),
    }
    text = json.dumps(config, indent=2) + "\n"
    checkpoint.write_atomically(out / "config.json", lambda file: file.write(text.encode()))

    display = Display(console, recipe.epochs, out / "metrics.jsonl", json_output)
    try:
        with display:
            final = training.train(recipe, dataset, place, path, display, resumed)
    except (training.Interrupted, KeyboardInterrupt) as error:
        console.print(f"\n{str(error) or 'stopped at once'}", soft_wrap=True)
        if path.exists():
            console.print(f"go on with:\n  {resume_command(context, out)}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from error
    except training.NonFiniteLoss as error:
        console.print(
            f"\n{error}; {path} is from before that. For a smaller --lr start a new run in another --out.",
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(1) from error
    display.write_metrics(final.history)
    checkpoint.write_atomically(out / "curves.png", lambda file: curves.plot(final.history, file))
    display.finished(final, out)


def resumed_recipe(context: typer.Context, resumed: checkpoint.Checkpoint) -> Recipe:
    """The recipe of a checkpoint, with the number of epochs that was typed.

    Raises:
        ValueError: another option was typed that contradicts it, or the epochs are done.
    """
    try:
        recipe = Recipe(**resumed.recipe)
    except TypeError as error:
        raise checkpoint.CheckpointError(f"the checkpoint's recipe cannot be used: {error}") from error
    typed = {name for name in context.params if is_typed(context, name)}
    for name, trained_with in asdict(recipe).items():
        given = context.params[name]
        if name in typed and name != "epochs" and given != trained_with:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"the run was started with {option} {trained_with}; got {given}: leave {option} out")
    if "epochs" not in typed:
        return recipe
    if context.params["epochs"] < resumed.epoch:
        raise ValueError(f"the run has done {resumed.epoch} epochs; got --epochs {context.params['epochs']}")
    return Recipe(**{**resumed.recipe, "epochs": context.params["epochs"]})


def is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def resume_command(context: typer.Context, out: Path) -> str:
    words = ["fastconv", "train", "--out", str(out), "--resume"]
    for name, option in [("data_directory", "--data"), ("device", "--device"), ("backend", "--backend")]:
        if is_typed(context, name):
            words += [option, str(context.params[name])]
    words += [option for name, option in RESUMED_FLAGS if context.params[name]]
    return shlex.join(words)


@app.command()
def evaluate(
    checkpoint_path: CheckpointOption,
    data_directory: DataOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Measure a checkpoint's loss and accuracy on its validation images and on the test images."""
    state = checkpoint.load(checkpoint_path)
    with usage_errors():
        place = environment.choose_device(device)
        environment.choose_backend(backend, place)
    model = prediction.load_model(state, place)
    dataset, recipe = data.load(data_directory), Recipe(**state.recipe)
    sets = training.make_sets(dataset, recipe, place)
    training.check_data(state, list(dataset.classes), list(dataset.train.images.shape[1:]), len(sets.train))
    results: dict[str, float] = {}
    for name, images in [("validation", sets.validation), ("test", sets.test)]:
        loss, accuracy = training.evaluate(model, images, recipe)
        results |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        if not json_output:
            print(f"{name + ':':<12}loss {loss:.4f}, accuracy {100 * accuracy:.2f} %, {len(images):,} images")
    if json_output:
        print(json.dumps(results))


@app.command()
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(help="Image files of any size and mode.", metavar="IMAGE...", show_default=False),
    ],
    checkpoint_path: CheckpointOption,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Name the three most probable classes of images.

    An image is scaled and cropped in the middle to the size trained on. The layer norm spans the batch, so each
    image goes through the model by itself: what else is in the call does not change its answer.
    """
    state = checkpoint.load(checkpoint_path)
    with usage_errors():
        place = environment.choose_device(device)
        environment.choose_backend(backend, place)
    model = prediction.load_model(state, place)
    # All are read before any is answered: a wrong name is found at once.
    inputs = [prediction.read_input(path, state.image_size) for path in images]
    for path, image in zip(images, inputs, strict=True):
        top = prediction.predict(model, image.to(place), min(3, len(state.classes)))
        named = [(state.classes[label], probability) for label, probability in top]
        if json_output:
            classes = [{"class": name, "probability": probability} for name, probability in named]
            print(json.dumps({"image": str(path), "classes": classes}))
        else:
            print(f"{path}: {', '.join(f'{name} {100 * probability:.1f} %' for name, probability in named)}")


@app.command()
def summary(
    width: WidthOption = DEFAULTS.width,
    depth: DepthOption = DEFAULTS.depth,
    patch: PatchOption = DEFAULTS.patch,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = DEFAULTS.batch_size,
) -> None:
    """Print the layers and parameters of the classifier, for CIFAR-10."""
    image_size = (3, 32, 32)
    with usage_errors():
        recipe = Recipe(width=width, depth=depth, patch=patch, batch_size=batch_size)
        training.check_patch(recipe, image_size)
    print(model_summary(recipe, image_size, len(data.CIFAR10_CLASSES), depth=3))


@app.command()
def check(
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    json_output: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option(help="Keep each result here as soon as it is there, as a line of JSON.")
    ] = None,
) -> None:
    """Tell whether all results are right on this machine; the exit code is 0 if they are, else 1.

    Every operation and module, forward and each gradient, is compared with float64, and PyTorch's own with it: an
    error is right up to twice PyTorch's. Then the fused and the reference classifier are trained for 50 steps.
    [bold]TRITON_INTERPRET=1 fastconv check --backend triton[/bold] checks the kernels on a CPU, in minutes.
    """
    with usage_errors():
        place = environment.choose_device(device)
        environment.choose_backend(backend, place)
    console = Console(stderr=json_output)
    cases = problems.cases()
    with (
        nullcontext() if out is None else out.open("w") as kept,
        progress(console, checking.steps(cases)) as advanced,
    ):
        report = checking.run(place, cases, advanced, kept)
    check_display.show(report, console)
    if json_output:
        print(json.dumps(report.as_json()))
    raise typer.Exit(0 if report.right else 1)


app.command()(bench)


@app.command()
def swap_report(
    model: Annotated[
        str, typer.Argument(help="Of torchvision or timm, for example convnext_tiny, timm/convnext_tiny.")
    ],
    json_output: JsonOption = False,
) -> None:
    """Tell which modules of a model fastconv.swap takes, which it leaves, and why; with random weights."""
    with usage_errors():
        network = zoo.create_model(model)
    with warnings.catch_warnings():
        # The report says it, too.
        warnings.simplefilter("ignore")
        report = swapping.swap(network)
    print(json.dumps([candidate._asdict() for candidate in report.candidates]) if json_output else report)


@app.command()
def info(json_output: JsonOption = False) -> None:
    """Tell the versions, the devices, which backend runs each operation, why, and which kernels are right."""
    facts = environment.describe()
    facts["kernels"] = {
        name: selftest.describe(torch.device(name)) for name in facts["devices"] if name.startswith("cuda")
    }
    if json_output:
        print(json.dumps(facts, indent=2))
        return
    console = Console()
    for name, found in facts["versions"].items():
        console.print(f"{name:<12}{found}", highlight=False)
    devices = ", ".join(facts["devices"].values())
    console.print(f"{'devices':<12}{devices}; {facts['threads']} threads", highlight=False)
    console.print(f"{'backend':<12}{backends.current()}\n", highlight=False)
    table = Table("device", "operation", "runs on", "because")
    for device, operations in facts["operations"].items():
        for operation, choice in operations.items():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in choice["refused"].items())
            table.add_row(device, operation, choice["runs"] or "nothing", reasons)
    console.print(table)
    for device, kernels in facts["kernels"].items():
        console.print(
            f"\nTriton kernels on {device}, {kernels['architecture']}: {kernels['status']}", highlight=False
        )
        for subject in kernels["right"]:
            console.print(f"  right: {subject}", highlight=False)
        for subject, reason in kernels["wrong"].items():
            console.print(f"  wrong: {subject}: {reason}; auto takes portable", highlight=False, markup=False)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError about an argument into the command line's own kind of error, with exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
