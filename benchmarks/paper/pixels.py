"""One image file as grey pixels of 8 bits, scaled by what its format says; what is ambiguous is refused, never guessed.

Pillow's ``convert("L")`` cuts off whatever is above 255: an X-ray of 16 bits turns white, one in [0, 1] black.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inmerge_fast.demo.data import require

WHITE_16 = 65535
# Formats whose 16 bits have a known white. Pillow itself stretches PPM's and JPEG 2000's maximum to it.
FORMATS_16 = ("PNG", "TIFF", "PPM", "JPEG2000")
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
COLOUR = {"HSV": "RGB", "RGBX": "RGB", "CMYK": "RGB"}  # to where Pillow's own arithmetic leads
DIRECT = ("1", "L", "RGB", "YCbCr")  # Pillow's weights of red, green and blue are ITU-R 601's


def read_grey(path: Path, size: int, bits: int | None = None) -> npt.NDArray[np.uint8]:
    """An image file in grey, resized.

    Colours become their luma. A picture turned by its EXIF tag is turned back. Transparency is left out if it is the
    same everywhere, as in some files of ChestX-ray14.

    Args:
        path: the file, of any format that Pillow reads.
        size: side of the result.
        bits: how many bits of 16-bit pixels hold data, as 12 of many detectors: the largest value is ``2**bits - 1``.
            None: all that the format says, if one pixel uses the highest of them.

    Returns:
        uint8 ``(size, size)``.

    Raises:
        ValueError: the file cannot be decoded, holds several images, or it is not clear what its values mean; the
            message names the file and the cure.
    """
    Image = require("PIL.Image", "Pillow")
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.verify()  # checksums, which reading the pixels leaves out
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise RefusedError(f"holds {image.n_frames} images; keep one of them")
            return _resized(grey(image, bits), size)
    except RefusedError as refused:
        raise ValueError(f"{path}: {refused}") from None
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise ValueError(f"{path}: cannot be decoded: {error}") from error


class RefusedError(ValueError):
    """An image whose pixels could mean several things."""


def grey(image: Any, bits: int | None = None) -> npt.NDArray:
    """Grey values of an opened image, 0 to 255: uint8 ``(H, W)``, or float32 if it has more than 8 bits.

    Raises:
        RefusedError: it is not clear what the values mean.
    """
    raw = _raw_mode(image)
    image.load()
    format_, tags = image.format, getattr(image, "tag_v2", {})
    if format_ != "TIFF":  # which Pillow turns itself, some versions without taking the tag away
        with contextlib.suppress(Exception):  # a tag that cannot be read turns nothing
            image = require("PIL.ImageOps", "Pillow").exif_transpose(image)
    premultiplied = image.mode in ("La", "RGBa") or raw.startswith(("La", "RGBa"))
    if image.mode in ("P", "PA"):  # before the palette is applied, 7 is not darker than 8
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    alpha = _alpha(image)
    if alpha is not None:
        if alpha.min() != alpha.max():
            raise RefusedError(
                "parts of it are transparent, and what shows through them is not known: save it without transparency"
            )
        if premultiplied and alpha.min() < 255:
            raise RefusedError("its pixels were multiplied by their transparency: save it without transparency")
        image = image.convert(image.mode.removesuffix("A")) if image.mode.endswith("A") else image
    if image.mode.startswith("I"):
        return _from_integers(image, format_, tags, bits)
    image = image.convert(COLOUR.get(image.mode, image.mode))
    if image.mode not in DIRECT:
        what = "floating-point numbers" if image.mode == "F" else "colours of this kind"
        raise RefusedError(
            f"has pixels of Pillow's mode {image.mode}, and {what} have no agreed black and white: save it as an image "
            "of 8 or 16 bits, in grey or RGB"
        )
    # Of each colour of 16 bits Pillow has kept the upper 8.
    cut = re.search(r";16[BLN]$", raw) is not None
    if cut and bits != 16 and (bits is not None or max(high for _, high in _extrema(image)) < 128):
        raise RefusedError(
            "has colours of 16 bits of which the highest are not used, and Pillow keeps only those: save it in grey, "
            "or with 8 bits"
        )
    return np.asarray(image.convert("L"))


def _raw_mode(image: Any) -> str:
    """How the file stores its pixels, by Pillow's name for its unpacker; empty where its reader has none."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        for one in arguments:
            if isinstance(one, str):
                return one
    return ""


def _extrema(image: Any) -> list[tuple[int, int]]:
    found = image.getextrema()
    return list(found) if isinstance(found[0], tuple) else [found]


def _alpha(image: Any) -> npt.NDArray | None:
    if image.mode in ("LA", "RGBA"):
        return np.asarray(image.getchannel("A"))
    key = image.info.get("transparency")  # PNG: the value that is transparent
    if key is None:
        return None
    different = np.asarray(image.convert("L") if image.mode == "1" else image) != np.asarray(key)
    return different.any(axis=-1) if different.ndim == 3 else different


def _from_integers(image: Any, format_: str | None, tags: Any, bits: int | None) -> npt.NDArray[np.float32]:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    samples = tags.get(BITS_PER_SAMPLE, (16,))
    depth = samples[0] if format_ == "TIFF" else 16
    signed_or_long = image.mode == "I" and format_ == "TIFF"
    if bits is None and (format_ not in FORMATS_16 or signed_or_long):
        raise RefusedError(
            f"has integer pixels of Pillow's mode {image.mode} between {low} and {high}, and its format does not say "
            "which value is white: save it with 8 or 16 bits, or say how many bits hold data, as --bits 12"
        )
    white = 2 ** (depth if bits is None else bits) - 1
    if low < 0 or high > white:
        raise RefusedError(f"has values between {low} and {high}, but {white.bit_length()} bits hold 0 to {white}")
    if bits is None and depth == 16 and high <= white // 2:
        raise RefusedError(
            f"has pixels of 16 bits, but its largest value is {high}, which {max(8, high.bit_length())} bits hold: say "
            f"how many hold data, as --bits 12, or --bits 16 if {WHITE_16} is white, as its format says"
        )
    out = values.astype(np.float32) * np.float32(255 / white)
    # Pillow inverts what counts from white with up to 8 bits, and leaves 16 as they are.
    return 255 - out if format_ == "TIFF" and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else out


def _resized(pixels: npt.NDArray, size: int) -> npt.NDArray[np.uint8]:
    Image = require("PIL.Image", "Pillow")
    resized = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
    return resized if resized.dtype == np.uint8 else resized.round().clip(0, 255).astype(np.uint8)
