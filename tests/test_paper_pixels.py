"""Grey pixels of image files: the right value for every mode that Pillow knows, or a refusal that names the file."""

import io
import struct
import zlib

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
ImageChops = pytest.importorskip("PIL.ImageChops")
PngImagePlugin = pytest.importorskip("PIL.PngImagePlugin")

from benchmarks.paper.pixels import RefusedError, grey, read_grey  # noqa: E402

SHAPE = (8, 6)


def full(value, dtype):
    return Image.fromarray(np.full(SHAPE, value, dtype))


def with_alpha(mode, alpha):
    image = full(100, np.uint8).convert(mode)
    image.putalpha(Image.fromarray(np.broadcast_to(np.asarray(alpha, np.uint8), SHAPE).copy()))
    return image


def palette(colours, index=1, mode="P", **info):
    image = Image.new(mode, SHAPE[::-1], index)
    image.putpalette([one for colour in colours for one in colour])
    image.info |= info
    return image


def named(image, format_):
    """As if it had been opened from a file of this format."""
    image.format = format_
    return image


def tiff(value, dtype=np.uint16, **tags):
    buffer = io.BytesIO()
    full(value, dtype).save(buffer, "TIFF", tiffinfo={int(key[1:]): one for key, one in tags.items()})
    return Image.open(buffer)


def tiff_of_12_bits(value):
    """Two values in three bytes, which Pillow reads and does not write."""
    height, width = SHAPE
    pair = ((value << 12) | value).to_bytes(3, "big")
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 3 * width * height // 2}
    pixels = pair * (width * height // 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, one) for tag, one in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return Image.open(io.BytesIO(b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory))


STRIPES = np.where(np.arange(SHAPE[1]) % 2, 255, 0)
RIGHT = {
    "1": (lambda: Image.new("1", SHAPE[::-1], 1), 255),
    "L": (lambda: full(100, np.uint8), 100),
    "LA": (lambda: with_alpha("LA", 0), 100),
    "PA": (lambda: palette([(0, 0, 0), (100, 100, 100)], mode="PA"), 100),
    "P grey": (lambda: palette([(9, 9, 9), (100, 100, 100)]), 100),
    "P backwards": (lambda: palette([(255 - i,) * 3 for i in range(256)], index=55), 200),
    "P colours": (lambda: palette([(0, 0, 0), (255, 0, 0)]), 76),
    "RGB": (lambda: Image.new("RGB", SHAPE[::-1], (10, 200, 30)), round(0.299 * 10 + 0.587 * 200 + 0.114 * 30)),
    "RGBX": (lambda: Image.new("RGBX", SHAPE[::-1], (100, 100, 100, 7)), 100),
    "RGBA": (lambda: with_alpha("RGBA", 0), 100),
    "RGBA opaque": (lambda: with_alpha("RGBA", 255), 100),
    "RGBa opaque": (lambda: with_alpha("RGBA", 255).convert("RGBa"), 100),
    "La opaque": (lambda: with_alpha("LA", 255).convert("La"), 100),
    "CMYK": (lambda: Image.new("CMYK", SHAPE[::-1], (0, 0, 0, 155)), 100),
    "YCbCr": (lambda: Image.new("YCbCr", SHAPE[::-1], (100, 128, 128)), 100),
    "HSV": (lambda: Image.new("HSV", SHAPE[::-1], (0, 0, 100)), 100),
    "I;16": (lambda: named(full(200 * 257, np.uint16), "PNG"), 200),
    "I;16B": (lambda: tiff(200 * 257, ">u2"), 200),
    "I;16, white is zero": (lambda: tiff(200 * 257, t262=0), 55),
    "I;16 of 12 bits": (lambda: tiff_of_12_bits(1000), 1000 * 255 / 4095),
    "I of a PNG": (lambda: named(full(200 * 257, np.int32), "PNG"), 200),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_modes(kind):
    make, expected = RIGHT[kind]
    image = make()
    assert image.mode == kind.split()[0].rstrip(","), "the case is of another mode than it says"
    values = grey(image)
    assert values.shape == SHAPE
    assert values.min() == values.max() == pytest.approx(expected, abs=0.01)


REFUSED = {
    "F": (lambda: full(0.5, np.float32), "mode F.*floating-point numbers.*save it as an image of 8 or 16 bits"),
    "LAB": (lambda: Image.new("LAB", SHAPE[::-1], (100, 0, 0)), "mode LAB.*colours of this kind"),
    "I": (lambda: tiff(70000, np.int32), "mode I between 70000 and 70000"),
    "I with negatives": (lambda: named(full(-1, np.int32), "PNG"), "between -1 and -1, but 16 bits hold"),
    "I;16 of a format without a white": (lambda: named(full(40000, np.uint16), "FITS"), "does not say which value"),
    "I;16 of 12 bits in 16": (lambda: named(full(4000, np.uint16), "PNG"), "largest value is 4000, which 12 bits hold"),
    "I;16 of 14 bits in 16": (lambda: tiff(16000), "which 14 bits.*--bits 16"),
    "I;16 of 12 bits, white is zero": (lambda: tiff(99, t262=0), "value is 99"),
    "LA in parts": (lambda: with_alpha("LA", STRIPES), "parts of it are transparent"),
    "RGBA in parts": (lambda: with_alpha("RGBA", STRIPES), "parts of it are transparent"),
    "La": (lambda: with_alpha("LA", 50).convert("La"), "multiplied by their transparency"),
    "RGBa": (lambda: with_alpha("RGBA", 50).convert("RGBa"), "multiplied by their transparency"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_ambiguous_modes_are_refused(kind):
    make, message = REFUSED[kind]
    image = make()
    assert image.mode == kind.split()[0]
    with pytest.raises(RefusedError, match=message):
        grey(image)


def test_every_mode_of_pillow_is_tested():
    known = {kind.split()[0].rstrip(",") for kind in (*RIGHT, *REFUSED)}
    # I;16L and I;16N are I;16B in another order of bytes; no reader gives them since Pillow 10.
    assert set(Image.MODES) - {"I;16L", "I;16N"} <= known


@pytest.mark.parametrize(("bits", "value", "expected"), [(12, 1000, 62), (10, 1000, 249), (16, 1000, 4), (14, 99, 2)])
def test_bits_say_what_is_white(tmp_path, bits, value, expected):
    full(value, np.uint16).save(tmp_path / "a.png")
    assert set(read_grey(tmp_path / "a.png", 4, bits).flat) == {expected}


def test_values_above_the_bits_given(tmp_path):
    full(5000, np.uint16).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: has values between 5000 and 5000, but 12 bits hold 0 to 4095"):
        read_grey(tmp_path / "a.png", 4, 12)


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2"])
def test_files_of_16_bits(tmp_path, suffix):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (40, 40), dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path)
    expected = Image.fromarray((values / 257).astype(np.float32)).resize((10, 10), Image.Resampling.BILINEAR)
    assert np.abs(read_grey(path, 10).astype(float) - np.asarray(expected)).max() <= 0.5 + 1e-3


def test_eight_bits_are_resized_by_pillow_as_ever(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(read_grey(tmp_path / "a.png", 16), np.asarray(expected))


def test_white_is_zero_in_tiff(tmp_path):
    for name, dtype, value in (("a", np.uint8, 100), ("b", np.uint16, 200 * 257)):
        full(value, dtype).save(tmp_path / f"{name}.tif", tiffinfo={262: 0})
    # Pillow turns 8 bits round when it saves and when it loads, 16 bits never.
    assert set(read_grey(tmp_path / "a.tif", 4).flat) == {100}
    assert set(read_grey(tmp_path / "b.tif", 4).flat) == {55}


@pytest.mark.parametrize("keep", ["png", "tif"])
def test_transparent_values(tmp_path, keep):
    """A grey PNG can name one value as transparent, without a channel for it."""
    pixels = np.full(SHAPE, 100, np.uint8)
    pixels[0, 0] = 7
    if keep == "png":
        Image.fromarray(pixels).save(tmp_path / "a.png", transparency=7)
        with pytest.raises(ValueError, match=r"a\.png: parts of it are transparent"):
            read_grey(tmp_path / "a.png", 4)
        return
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert read_grey(tmp_path / "a.tif", 4).max() == 100


def test_transparent_colours_of_a_palette(tmp_path):
    image = palette([(0, 0, 0), (100, 100, 100)])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    with pytest.raises(ValueError, match="parts of it are transparent"):
        read_grey(tmp_path / "a.png", 4)
    palette([(0, 0, 0), (100, 100, 100)]).save(tmp_path / "b.png", transparency=0)  # no pixel has that colour
    assert set(read_grey(tmp_path / "b.png", 4).flat) == {100}


def test_pictures_are_turned_as_their_tag_says(tmp_path):
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8] = 200  # bright above
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    for name, compression in (("a.png", None), ("a.tif", None), ("b.tif", "tiff_lzw")):
        options = {"compression": compression} if compression else {}
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **options)
        assert read_grey(tmp_path / name, 16)[12:].min() == 200, name


def test_a_broken_tag_turns_nothing(tmp_path):
    full(100, np.uint8).save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert set(read_grey(tmp_path / "a.png", 4).flat) == {100}


def test_files_of_several_images(tmp_path):
    images = [full(value, np.uint8) for value in (1, 2)]
    for name in ("a.tif", "a.gif", "a.png"):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:])
        with pytest.raises(ValueError, match=rf"{name}: holds 2 images; keep one of them"):
            read_grey(tmp_path / name, 4)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(("value", "read"), [(200 * 256, 200), (100 * 16, None)])
def test_colours_of_16_bits(tmp_path, value, read):
    """Pillow keeps the upper 8 bits of each: of 12-bit values in 16 bits that is next to nothing."""
    rows = (b"\0" + np.full((4, 3), value, ">u2").tobytes()) * 4
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    if read is not None:
        assert set(read_grey(path, 4).flat) == {read}
        return
    for bits in (None, 12):
        with pytest.raises(ValueError, match=r"a\.png: has colours of 16 bits of which the highest are not used"):
            read_grey(path, 4, bits)
    assert set(read_grey(path, 4, 16).flat) == {value >> 8}


def damaged(content, kind):
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut": content[:-100],
        "without its end": content[:-12],
        "a flipped byte": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        "text": b"<html>404</html>",
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "cut", "without its end", "a flipped byte", "text"])
@pytest.mark.parametrize("level", [0, 6])
def test_damage_is_named(tmp_path, kind, level):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path, compress_level=level)
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(ValueError, match=r"a\.png: cannot be decoded"):
        read_grey(path, 8)
