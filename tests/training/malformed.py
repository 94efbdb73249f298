"""Malformed checkpoints, by kinds: each case changes a good checkpoint's content, or its file."""

import os
import pickle
import random
import zipfile

import numpy as np
import torch

from fastconv.training.checkpoint import FORMAT

WEIGHT = "conv_block_1.0.conv1.weight"


class Trap:
    """Makes a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def contents():
    """Yield a name, and a function that changes the content of a good checkpoint in place."""
    yield from types()
    yield from numbers()
    yield from tensors()
    yield from states()


def put(*keys, value):
    """Return a function that puts a value at these keys of nested dicts and lists."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value() if callable(value) else value

    return change


def remove(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def types():
    samples = {
        "none": None,
        "int": 7,
        "float": 0.5,
        "text": "text",
        "list": ["text"],
        "dict": {"text": []},
        "tensor": lambda: torch.ones(2),
    }
    right = {
        "recipe": (),
        "classes": ("list",),
        "image_size": (),
        "train_images": ("int",),
        "data_directory": ("none", "text"),
        "data_checksum": ("text",),
        "environment": (),
        "model": (),
        "averaged": (),
        "optimizer": (),
        "rng": (),
        "epoch": ("int",),
        "step": ("int",),
        "losses": ("tensor",),
        "correct": ("int",),
        "history": (),
        "test": ("none",),
        "seconds": ("int", "float"),
        "evaluation_seconds": ("int", "float"),
    }
    for field, allowed in right.items():
        yield f"lacks {field}", remove(field)
        # Each field meets half of them.
        for name, value in list(samples.items())[len(field) % 2 :: 2]:
            if name not in allowed:
                yield f"{field} is {name}", put(field, value=value)
    for keys in (["format"], ["epoch"], ["seconds"], ["recipe", "lr"], ["history", 0, "train_loss"]):
        yield f"{keys[-1]} is an int of 10,000 digits", put(*keys, value=10**9999)
    yield "history is a tuple", put("history", value=())
    for name in ("none", "float", "tensor", "list"):
        yield f"format is {name}", put("format", value=samples[name])
    yield "format of the version before", put("format", value=FORMAT - 1)
    yield "format of a newer version", put("format", value=FORMAT + 1)
    yield "lacks format", remove("format")
    yield "unknown field", put("extra", value=1)
    yield "unknown field with a number for a name", put(7, value=1)
    for field in (
        "epochs",
        "batch_size",
        "lr",
        "weight_decay",
        "width",
        "depth",
        "seed",
        "split_seed",
        "precision",
        "norm",
        "crop",
        "flip",
        "cutout",
        "warmup",
        "schedule",
        "ema",
    ):
        for name in ("none", "tensor"):
            yield f"recipe's {field} is {name}", put("recipe", field, value=samples[name])
    yield "recipe lacks a field", remove("recipe", "limit")
    yield "recipe has an unknown field", put("recipe", "extra", value=1)
    yield "environment lacks a field", remove("environment", "threads")
    for field in ("device", "backend", "threads", "versions"):
        yield f"environment's {field} is a float", put("environment", field, value=0.5)
    yield "environment's version is a number", put("environment", "versions", "torch", value=2)


def numbers():
    nan, inf = float("nan"), float("inf")
    for field, values in {
        "epochs": (0, -1, 10**9, 1),
        "batch_size": (0, -1, 2**40),
        "lr": (0.0, -1e-3, nan, inf, 1e30),
        "weight_decay": (-1.0, nan, inf, 1e30),
        "width": (0, 3, 10_000, 10**9),
        "depth": (0, 2, 10**9),
        "patch": (0, 1, 5, 10**9),
        "seed": (-1, 2**40),
        "split_seed": (-1, 2**40),
        "precision": ("fp8", ""),
        "limit": (0, -1, 2**40),
        "norm": ("batch",),
        "crop": (-1, 9, 2**40),
        "cutout": (-1, 9, 2**40),
        "label_smoothing": (-0.1, 1.0, nan),
        "schedule": ("cosine",),
        "warmup": (-0.1, 1.0, inf),
        "decay": ("weights",),
        "ema": (-0.1, 1.0, nan),
    }.items():
        for value in values:
            yield f"recipe's {field} is {value}", put("recipe", field, value=value)
    for field, values in {
        "classes": ([], ["a"], ["a"] * 4, [1, 2, 3], [None] * 3),
        "image_size": (
            [],
            [3],
            [3, 8],
            [3, 8, 8, 8],
            [1, 8, 8],
            [3, 0, 8],
            [3, -8, 8],
            [3, 10**9, 10**9],
            [3, 8.0, 8],
        ),
        "train_images": (0, -1, 1, 2**62),
        "epoch": (-1, 0, 2, 3, 2**62),
        "step": (-1, 0, 1, 6, 2**62),
        "correct": (-1, 33, 2**62),
        "seconds": (-1.0, nan, inf),
        "evaluation_seconds": (-1.0, nan, 1e9),
        "losses": (
            lambda: torch.ones(3),
            lambda: torch.ones(2, 1),
            lambda: torch.ones(2).double(),
            lambda: torch.ones(2).long(),
            lambda: torch.tensor([1.0, nan]),
            lambda: torch.tensor([inf, 1.0]),
            lambda: torch.ones(()),
        ),
        "test": ({}, {"test_loss": 1.0, "test_accuracy": 0.5}, {"test_loss": "1"}),
    }.items():
        for i, value in enumerate(values):
            yield f"{field}, number {i} of wrong ones", put(field, value=value)
    yield "history is empty", put("history", value=[])
    yield "history is too long", lambda content: content["history"].append(dict(content["history"][0]))
    yield "history lacks a metric", remove("history", 0, "train_loss")
    for key in ("epoch", "train_loss"):
        for value in (nan, -1.0, 1e300, "1"):
            yield f"history's {key} is {value!r}", put("history", 0, key, value=value)
    yield "history has an unknown metric", put("history", 0, "extra", value=1.0)


def tensors():
    shape = (16, 1, 7, 7)
    wrong = {
        "another shape": lambda: torch.zeros(16, 1, 7, 5),
        "transposed": lambda: torch.zeros(1, 16, 7, 7),
        "a scalar": lambda: torch.zeros(()),
        "empty": lambda: torch.zeros(0),
        "float64": lambda: torch.zeros(shape, dtype=torch.float64),
        "float16": lambda: torch.zeros(shape, dtype=torch.float16),
        "integers": lambda: torch.zeros(shape, dtype=torch.int32),
        "bool": lambda: torch.zeros(shape, dtype=torch.bool),
        "complex": lambda: torch.zeros(shape, dtype=torch.complex64),
        "NaN": lambda: torch.full(shape, float("nan")),
        "one infinity": lambda: torch.zeros(shape).index_fill_(0, torch.tensor(3), float("-inf")),
        "sparse": lambda: torch.zeros(shape).to_sparse(),
        "on the meta device": lambda: torch.zeros(shape, device="meta"),
        "expanded": lambda: torch.zeros(1, 1, 1, 1).expand(shape),
        "expanded to a terabyte": lambda: torch.zeros(1).expand(2**38),
        "on the meta device, of a terabyte": lambda: torch.zeros(2**38, device="meta"),
        "not contiguous": lambda: torch.zeros(16, 1, 7, 14)[..., ::2],
        "a list": [0.0],
        "none": None,
    }
    for name, value in wrong.items():
        yield f"weight is {name}", put("model", WEIGHT, value=value)
    for name in ("another shape", "float64", "NaN", "expanded to a terabyte", "none"):
        yield f"first moment is {name}", put("optimizer", 2, "exp_avg", value=wrong[name])
    for name in ("another shape", "float64", "NaN", "one infinity", "none"):
        yield f"averaged weight is {name}", put("averaged", WEIGHT, value=wrong[name])
    yield "averaged lacks a weight", remove("averaged", WEIGHT)
    yield "averaged weights without an ema", put("recipe", "ema", value=0.0)
    yield "model lacks a weight", remove("model", WEIGHT)
    yield "model has an unknown weight", put("model", "extra", value=lambda: torch.zeros(3))
    yield "model's weight has a number for a name", put("model", 7, value=lambda: torch.zeros(3))
    yield "model is empty", put("model", value={})


def states():
    yield "optimizer is empty", put("optimizer", value={})
    yield "optimizer lacks a state", remove("optimizer", 3)
    yield (
        "optimizer has an unknown state",
        lambda content: content["optimizer"].update({99: content["optimizer"][0]}),
    )
    yield (
        "optimizer in the format of PyTorch",
        lambda content: content.update(
            optimizer={"state": content["optimizer"], "param_groups": [{"params": []}]}
        ),
    )
    for key in ("step", "exp_avg", "exp_avg_sq"):
        yield f"optimizer's state lacks {key}", remove("optimizer", 0, key)
    yield (
        "optimizer's state has an unknown part",
        put("optimizer", 0, "max_exp_avg_sq", value=lambda: torch.ones(1)),
    )
    for value in (0.0, -1.0, float("nan"), float("inf")):
        yield f"optimizer's step is {value}", put("optimizer", 0, "step", value=torch.tensor(value))
    yield "optimizer's step has a shape", put("optimizer", 0, "step", value=torch.ones(1))
    yield "optimizer's step is an integer", put("optimizer", 0, "step", value=7)
    yield "second moment is negative", lambda content: content["optimizer"][0]["exp_avg_sq"].neg_()
    yield "rng is empty", put("rng", value={})
    yield "rng of an unknown device", put("rng", "tpu", value=torch.get_rng_state())
    for name, value in {
        "short": torch.zeros(10, dtype=torch.uint8),
        "zeros": torch.zeros(5056, dtype=torch.uint8),
        "ones": torch.full((5056,), 255, dtype=torch.uint8),
        "floats": torch.zeros(5056),
        "flat": torch.zeros(1, 5056, dtype=torch.uint8),
    }.items():
        yield f"rng's state is {name}", put("rng", "cpu", value=value)


def files():
    """Yield a name, and a function that damages the file at a path; it gets the content, too."""
    for part in (0, 1, 4, 30, 64, 200, 0.2, 0.5, 0.9, 0.99):

        def truncate(path, _, part=part):
            content = path.read_bytes()
            path.write_bytes(content[: part if part >= 1 or part == 0 else int(part * len(content))])

        yield f"truncated at {part}", truncate
    yield (
        "a byte is missing",
        lambda path, _: path.write_bytes(path.read_bytes()[:1000] + path.read_bytes()[1001:]),
    )
    yield (
        "a byte too many",
        lambda path, _: path.write_bytes(path.read_bytes()[:999] + b"x" + path.read_bytes()[999:]),
    )
    for seed in range(10):

        def flip(path, _, seed=seed):
            rng = random.Random(seed)
            stored = bytearray(path.read_bytes())
            with zipfile.ZipFile(path) as archive:
                entry = rng.choice([entry for entry in archive.infolist() if entry.file_size > 8])
                found = stored.index(archive.read(entry))
            stored[found + rng.randrange(entry.file_size)] ^= 1 << rng.randrange(8)
            path.write_bytes(stored)

        yield f"bit flip {seed}", flip

    def write(make):
        return lambda path, _: path.write_bytes(make(path))

    yield "text", write(lambda _: b"not a checkpoint")
    yield "zeros", write(lambda _: bytes(5000))
    yield "random bytes", write(lambda _: random.Random(0).randbytes(5000))
    yield "the beginning of a zip", write(lambda _: b"PK\x03\x04" + bytes(100))
    yield "pickle", write(lambda _: pickle.dumps({"format": FORMAT}))
    yield "malicious pickle", write(lambda path: pickle.dumps(Trap(path.parent / "executed")))
    yield (
        "malicious pickle, then a good zip",
        write(lambda path: pickle.dumps(Trap(path.parent / "executed")) + path.read_bytes()),
    )

    def saved(make, **options):
        return lambda path, content: torch.save(make(path, content), path, **options)

    yield "a list", saved(lambda *_: [1, 2])
    yield "a tensor", saved(lambda *_: torch.ones(3))
    yield "a state_dict", saved(lambda _, content: content["model"])
    yield "a module", saved(lambda *_: torch.nn.Linear(2, 2))
    yield "in PyTorch's old format", saved(lambda _, content: content, _use_new_zipfile_serialization=False)
    yield "malicious", saved(lambda path, _: Trap(path.parent / "executed"))
    for field in ("recipe", "model", "history"):

        def trap(path, content, field=field):
            return {**content, field: Trap(path.parent / "executed")}

        yield f"malicious {field}", saved(trap)
    yield "array of NumPy", saved(lambda _, content: {**content, "losses": np.ones(2, np.float32)})

    def archive(*entries, compression=zipfile.ZIP_STORED):
        def make(path, _):
            with zipfile.ZipFile(path, "w", compression) as file:
                for name, content in entries:
                    file.writestr(name, content)

        return make

    bomb = b"\x80\x02cbuiltins\nbytearray\nM\xff\xff\x85R."
    deep = b"\x80\x02)" + b"\x85" * 100_000 + b"."
    yield "zip of nothing", archive()
    yield "zip of a text", archive(("readme.txt", "text"))
    yield "zip of a pickle", archive(("archive/data.pkl", pickle.dumps({"format": FORMAT}, 2)))
    yield (
        "zip of a malicious pickle",
        archive(("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00exit\x85R.")),
    )
    yield "zip of a call", archive(("archive/data.pkl", bomb), ("archive/version", "3"))
    yield "zip of tuples in tuples", archive(("archive/data.pkl", deep), ("archive/version", "3"))
    yield "zip of an empty pickle", archive(("archive/data.pkl", b""), ("archive/version", "3"))
    yield (
        "zip bomb",
        archive(("archive/data.pkl", bytes(10**7)), ("archive/version", "3"), compression=zipfile.ZIP_DEFLATED),
    )

    def compress(path, _):
        with zipfile.ZipFile(path) as stored:
            entries = [(entry.filename, stored.read(entry)) for entry in stored.infolist()]
        archive(*entries, ("archive/zeros", bytes(10**6)), compression=zipfile.ZIP_DEFLATED)(path, None)

    yield "good, but compressed", compress
    yield "arrays of NumPy", lambda path, _: np.savez(path.open("wb"), weight=np.ones(3))
    yield "a directory", lambda path, _: (path.unlink(), path.mkdir())
    yield "nothing", lambda path, _: path.unlink()
    yield "a pipe", lambda path, _: (path.unlink(), os.mkfifo(path))
    yield "a device", lambda path, _: (path.unlink(), path.symlink_to("/dev/zero"))
    yield "a link to nothing", lambda path, _: (path.unlink(), path.symlink_to("nothing"))
    yield "a link to itself", lambda path, _: (path.unlink(), path.symlink_to(path.name))


def cases():
    """Return, by name, functions of a path and of its content; each makes the file there a malformed one."""
    found = dict(files())
    for name, change in contents():

        def save(path, content, change=change):
            change(content)
            torch.save(content, path)

        assert name not in found
        found[name] = save
    return found


def content_of(path):
    # Faster than weights_only.
    return torch.load(path, weights_only=False)
