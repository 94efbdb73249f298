"""Images are read exactly as their files have them, or refused in one line that says why."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import encoded, png, refused, tiff
from PIL import Image

from fastconv.training.images import LARGEST_IMAGE, read_image

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
TWO_COLOURS = bytes([10, 20, 30, 255, 0, 0])
# 128 and 129 lie on either side of half an 8-bit level, which is 257 16-bit levels.
LEVELS_16 = [0, 128, 129, 257, 256 * 128, 65535]
LEVELS_8 = [0, 0, 1, 1, 128, 255]


def grey(*levels: int) -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in levels]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(png(2, 8, RGB, bytes([1, 2, 3, 4, 5, 255])), [(1, 2, 3), (4, 5, 255)], id="RGB"),
        pytest.param(
            png(2, 8, RGB, bytes([1, 2, 3, 4, 5, 6]), trns=bytes([0, 4, 0, 5, 0, 6])),
            [(1, 2, 3), (255, 255, 255)],
            id="RGB with a transparent colour",
        ),
        # High bytes and low bytes agree, so that cutting off and rounding do.
        pytest.param(png(1, 16, RGB, bytes([9, 9, 128, 128, 255, 255])), [(9, 128, 255)], id="RGB of 16 bits"),
        pytest.param(
            png(3, 8, RGB_ALPHA, bytes([255, 0, 7, 255, 10, 20, 30, 0, 255, 0, 100, 51])),
            # With an alpha of a fifth, 0 becomes 0.8 * 255 and 100 becomes 0.2 * 100 + 0.8 * 255.
            [(255, 0, 7), (255, 255, 255), (255, 204, 224)],
            id="RGBA",
        ),
        pytest.param(png(2, 8, GREY, bytes([0, 77])), grey(0, 77), id="grey"),
        pytest.param(png(2, 8, GREY, bytes([0, 77]), trns=bytes([0, 77])), grey(0, 255), id="grey, transparent"),
        pytest.param(
            png(3, 8, GREY_ALPHA, bytes([100, 255, 100, 0, 0, 51])), grey(100, 255, 204), id="grey and alpha"
        ),
        pytest.param(png(4, 1, GREY, bytes([0b01100000])), grey(0, 255, 255, 0), id="1 bit"),
        pytest.param(png(4, 2, GREY, bytes([0b00011011])), grey(0, 85, 170, 255), id="2 bits"),
        pytest.param(png(2, 8, PALETTE, b"\1\0", TWO_COLOURS), [(255, 0, 0), (10, 20, 30)], id="palette"),
        pytest.param(
            png(2, 8, PALETTE, b"\0\1", TWO_COLOURS, trns=bytes([0, 51])),
            [(255, 255, 255), (255, 204, 204)],
            id="palette with alpha",
        ),
        pytest.param(png(6, 16, GREY, struct.pack(">6H", *LEVELS_16)), grey(*LEVELS_8), id="16-bit grey, PNG"),
        # The transparent level is 256; 255 and 257 are the same in 8 bits, but are not transparent.
        pytest.param(
            png(4, 16, GREY, struct.pack(">4H", 255, 256, 257, 0), trns=struct.pack(">H", 256)),
            grey(1, 255, 1, 0),
            id="16-bit grey with a transparent level",
        ),
        pytest.param(tiff("I;16", 6, struct.pack("<6H", *LEVELS_16)), grey(*LEVELS_8), id="16-bit grey, TIFF"),
        pytest.param(
            tiff("I;16B", 6, struct.pack(">6H", *LEVELS_16)), grey(*LEVELS_8), id="16-bit grey, big-endian"
        ),
        pytest.param(tiff("I", 6, struct.pack("=6i", *LEVELS_16)), grey(*LEVELS_8), id="16-bit grey in 32"),
        # Red is what cyan leaves: (255 - C) * (255 - K) / 255, and so on.
        pytest.param(
            tiff("CMYK", 3, bytes([0, 255, 255, 0, 255, 0, 0, 0, 0, 0, 0, 51])),
            [(255, 0, 0), (0, 255, 255), (204, 204, 204)],
            id="CMYK",
        ),
    ],
)
def test_read_image_of_each_mode(tmp_path: Path, content: bytes, expected: list[tuple[int, int, int]]) -> None:
    (tmp_path / "image").write_bytes(content)
    image = read_image(tmp_path / "image")
    assert image.mode == "RGB"
    assert image.size == (len(expected), 1)
    assert [image.getpixel((x, 0)) for x in range(image.width)] == expected


# What EXIF's definition of each orientation asks for, in terms of the stored rows and columns.
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, ["abc", "def"]),
        (2, ["cba", "fed"]),
        (3, ["fed", "cba"]),
        (4, ["def", "abc"]),
        (5, ["ad", "be", "cf"]),
        (6, ["da", "eb", "fc"]),
        (7, ["fc", "eb", "da"]),
        (8, ["cf", "be", "ad"]),
    ],
)
@pytest.mark.parametrize(
    ("format", "mode"), [("PNG", "L"), ("PNG", "I;16"), ("TIFF", "L"), ("TIFF", "I;16"), ("JPEG", "L")]
)
def test_read_image_upright(tmp_path: Path, orientation: int, upright: list[str], format: str, mode: str) -> None:
    # Blocks of 8 x 8 equal pixels, which JPEG keeps.
    block, scale = np.ones((8, 8), dtype=np.uint16), 1 if mode == "L" else 257
    stored = np.kron(np.array([[0, 40, 80], [120, 160, 200]], dtype=np.uint16), block) * scale
    image = Image.fromarray(stored.astype(np.uint8) if mode == "L" else stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "image", format, exif=exif)

    levels = np.kron(np.array([[40 * "abcdef".index(letter) for letter in row] for row in upright]), block)
    pixels = np.asarray(read_image(tmp_path / "image")).astype(int)
    assert pixels.shape == (*levels.shape, 3)
    tolerance = 2 if format == "JPEG" else 0
    assert np.abs(pixels - levels[..., None]).max() <= tolerance


def noise(format: str) -> bytes:
    return encoded(format, np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        pytest.param(noise("PNG")[:20], "Truncated File Read", id="PNG cut in its header"),
        pytest.param(noise("PNG")[:2000], "truncated", id="truncated PNG"),
        pytest.param(noise("JPEG")[:1000], "truncated", id="truncated JPEG"),
        pytest.param(tiff("F", 1, struct.pack("=f", 0.5)), r"mode F with levels 0\.5 to 0\.5", id="floats"),
        pytest.param(tiff("I", 2, struct.pack("=2i", 0, 65536)), "mode I with levels 0 to 65536", id="17 bits"),
        pytest.param(tiff("I", 2, struct.pack("=2i", -1, 9)), "mode I with levels -1 to 9", id="negative"),
    ],
)
def test_read_image_refuses(tmp_path: Path, content: bytes, pattern: str) -> None:
    (tmp_path / "image.png").write_bytes(content)
    with refused(rf"image\.png cannot be read as an image: .*{pattern}.*; expected a complete image file"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize("content", [b"", b"text\n" * 100], ids=["empty", "text"])
def test_read_image_needs_an_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.png").write_bytes(content)
    with refused(f"^{tmp_path}/image.png is not an image; expected PNG, JPEG, WEBP, GIF, BMP, TIFF or PPM$"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: None, "missing"),
        (Path.mkdir, "a folder"),
        (os.mkfifo, "a named pipe"),
        (lambda path: path.symlink_to("nowhere"), "a broken link"),
        (lambda path: path.symlink_to(path), "a broken link"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
    ids=["nothing", "folder", "pipe", "link to nothing", "link to itself", "device"],
)
def test_read_image_opens_only_files(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    make(tmp_path / "image.png")
    with refused(f"^{tmp_path}/image.png is {kind}; expected an image file$"):
        read_image(tmp_path / "image.png")


def test_read_image_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "stored").write_bytes(png(1, 8, RGB, bytes([1, 2, 3])))
    (tmp_path / "image.png").symlink_to("stored")
    assert read_image(tmp_path / "image.png").getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_read_image_takes_the_first_frame(tmp_path: Path, format: str) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "image", format, save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "image").getcolors() == [(12, (255, 0, 0))]


@pytest.mark.parametrize(
    ("width", "height"),
    [
        pytest.param(LARGEST_IMAGE // 8 + 1, 8, id="beyond our limit"),
        # Pillow warns of the first and refuses the second.
        pytest.param(13_000, 13_000, id="beyond Pillow's"),
        pytest.param(2**31 - 1, 2**31 - 1, id="beyond memory"),
    ],
)
def test_read_image_looks_at_the_size_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, width: int, height: int
) -> None:
    def decode(*arguments: object) -> None:
        raise AssertionError("the image is decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    (tmp_path / "image.png").write_bytes(png(width, 1, GREY, b"", height=height))
    with refused(r"image\.png has too many pixels \(.*\); expected at most 67,108,864; scale it down$"):
        read_image(tmp_path / "image.png")
    assert not recwarn.list


def test_read_image_runs_no_program(tmp_path: Path) -> None:
    """Pillow gives PostScript to Ghostscript."""
    (tmp_path / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    with refused("is not an image; expected"):
        read_image(tmp_path / "image.png")
