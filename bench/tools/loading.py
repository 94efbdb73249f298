"""What an image costs on its way through the lecture's loader, part by part, in one thread.

    python -m bench.tools.loading

prints the microseconds of the processor for an image, in the fastest of some rounds, and what that makes of the
lecture's five epochs. The pixels are random: the cost does not depend on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, default_collate

from fastconv.training.data import ImageSet

from .. import lecture, results, tables

# Training images for training and for their evaluation, then validation images, in five epochs.
LOADED = 5 * (2 * 40_000 + 10_000)
TIMED, ROUNDS = 8 * lecture.BATCH_SIZE, 15


def main() -> None:
    torch.set_num_threads(1)
    pixels = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
    dataset = lecture.CIFAR10(ImageSet(pixels, torch.zeros(50_000, dtype=torch.int64)))
    chosen = torch.randperm(50_000)[:TIMED].tolist()
    arrays = [dataset.data[i] for i in chosen]
    pictures = [Image.fromarray(array) for array in arrays]
    items = [dataset[i] for i in chosen]
    part: Subset[lecture.Batch] = Subset(dataset, chosen)
    loader = DataLoader(part, batch_size=lecture.BATCH_SIZE, shuffle=True)
    calls: dict[str, Callable[[], object]] = {
        "array and label, by index": lambda: [(dataset.data[i], dataset.targets[i]) for i in chosen],
        "`Image.fromarray`": lambda: [Image.fromarray(array) for array in arrays],
        "`ToTensor`": lambda: [dataset.transform(picture) for picture in pictures],
        "an item: these three": lambda: [dataset[i] for i in chosen],
        "collating 128 items": lambda: [
            default_collate(items[i : i + lecture.BATCH_SIZE]) for i in range(0, TIMED, lecture.BATCH_SIZE)
        ],
        "the whole loader": lambda: list(loader),
    }
    lines = []
    for name, call in calls.items():
        microseconds = 1e6 * min(processor_seconds(call) for _ in range(ROUNDS)) / TIMED
        lines.append([name, f"{microseconds:.1f}", f"{LOADED * microseconds / 1e6:.0f}"])
    print(f"{tables.machine(results.provenance(torch.device('cpu')))}:\n")
    print(tables.table(["", "microseconds an image", f"seconds for {LOADED:,}"], lines))


def processor_seconds(call: Callable[[], object]) -> float:
    """The time that a call keeps a processor busy, however many programs share it."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
