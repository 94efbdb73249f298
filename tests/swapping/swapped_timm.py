"""A pytest plugin: timm.create_model returns swapped models, and the run says how many blocks that were."""

import warnings

import timm

import fastconv

create = timm.create_model
swapped = 0


def create_swapped(*args, **options):
    global swapped
    model = create(*args, **options)
    if not any(parameter.is_meta for parameter in model.parameters()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            swapped += len(fastconv.swap(model).swapped)
    return model


def pytest_configure():
    # Before the tests import it from there.
    timm.create_model = create_swapped


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"swapped blocks: {swapped}")
