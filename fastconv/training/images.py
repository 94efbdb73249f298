"""Image files, read as 8-bit RGB."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastconv.extras import MissingPackage, import_extra
from fastconv.training.inputs import FILE, DataError, kind_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow reads more, but for some of it runs other programs: Ghostscript for EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
FORMAT_NAMES = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
# Reading an image takes some 20 bytes of memory per pixel. A file of kilobytes can have a billion of them.
LARGEST_IMAGE = 2**26


@cache
def suffixes() -> tuple[str, ...]:
    """Return the endings, in small letters, of the names of files that hold images of FORMATS.

    Raises:
        MissingPackage: Pillow is not installed.
    """
    registered = import_extra("PIL.Image").registered_extensions()
    return tuple(suffix for suffix, format in registered.items() if format in FORMATS)


def read_image(path: Path) -> Image:
    """Read an image file of any mode, and of up to LARGEST_IMAGE pixels, as an 8-bit RGB Pillow image.

    EXIF orientation is applied, transparent pixels lie over white, and 16-bit grey is scaled down. An animation is
    its first frame.

    Raises:
        DataError: `path` is not a file, not an image, too large, incomplete, or grey with floats or more than 16
            bits.
        MissingPackage: Pillow is not installed.
    """
    with open_image(path) as stored:
        return decode(stored)


@contextmanager
def open_image(path: Path) -> Iterator[Image]:
    """Open an image file, and read no more than its header: its pixels are there once `decode` is called.

    Raises:
        DataError: as `read_image`, if it is raised here or inside the `with` statement.
        MissingPackage: Pillow is not installed.
    """
    pillow = import_extra("PIL.Image")
    try:
        if (kind := kind_of(path)) != FILE:
            raise DataError(f"{path} is {kind}; expected an image file")
        # An open file, because a path may be mapped into memory, and then Pillow turns TIFF images wrongly.
        with warnings.catch_warnings(), open(path, "rb") as file:
            # Pillow warns of what is odd but readable, and of sizes, which have their own limit here.
            warnings.simplefilter("ignore")
            with pillow.open(file, formats=FORMATS) as stored:
                if stored.width * stored.height > LARGEST_IMAGE:
                    raise pillow.DecompressionBombError(f"{stored.width} x {stored.height}")
                yield stored
    except (DataError, MissingPackage):
        raise
    except pillow.UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image; expected {FORMAT_NAMES}") from error
    except pillow.DecompressionBombError as error:
        raise DataError(
            f"{path} has too many pixels ({error}); expected at most {LARGEST_IMAGE:,}; scale it down"
        ) from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError and more for files that are not what they say.
    except Exception as error:
        # An error of the system names the path once more; its strerror does not.
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read as an image: {reason}; expected a complete image file") from error


def decode(stored: Image) -> Image:
    """Return an open image upright, over white, as 8-bit RGB; Pillow's errors are for `open_image`."""
    pillow = import_extra("PIL.Image")
    image = _grey_to_8_bits(import_extra("PIL.ImageOps").exif_transpose(stored)).convert("RGBA")
    white = pillow.new("RGBA", image.size, "white")
    rgb: Image = pillow.alpha_composite(white, image).convert("RGB")
    return rgb


def pixels_of(image: Image) -> Tensor:
    """Return the pixels of an RGB image, uint8 [3, height, width]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def _grey_to_8_bits(image: Any) -> Any:
    """Scale 16-bit grey down, whose levels Pillow itself would clip; return other images as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    numpy = import_extra("numpy")
    levels = numpy.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"mode {image.mode} with levels {levels.min()} to {levels.max()} is not 16-bit grey")
    # A PNG may name one level as transparent, and scaling would merge it with its neighbours.
    levels = numpy.where(levels == image.info.get("transparency"), 65535, levels)
    return import_extra("PIL.Image").fromarray(numpy.rint(levels / 257).astype(numpy.uint8))
