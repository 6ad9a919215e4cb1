"""Pictures of every kind, made here with known colours, arrive upright and in those colours."""

import struct
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sgm.inference import pictures
from sgm.inference.pictures import (
    cut_out_object,
    fit_picture,
    isolate_object,
    load_picture,
    native_size,
)

GREYS = np.array([0, 85, 170, 255])
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [250, 200, 100]])
ALPHAS = np.array([255, 0, 128, 255])
INKS = np.array([[0, 255, 255, 0], [255, 0, 255, 0], [255, 255, 0, 0], [0, 0, 0, 255]])
INKS_SEEN = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]])
BINARY = np.array([0, 255, 255, 0])
LOSSY = 6  # levels, for flat blocks after jpeg or webp

HEIGHT, WIDTH = 48, 64


def blocks(values, height=HEIGHT, width=WIDTH):
    """Four equal blocks in reading order: (height, width) or (height, width, channels)."""
    values = np.asarray(values)
    rows = np.arange(height) * 2 // height
    columns = np.arange(width) * 2 // width
    return values[rows[:, None] * 2 + columns]


def centres(pixels):
    """The four blocks' middle pixels, in reading order."""
    height, width = pixels.shape[:2]
    rows, columns = [height // 4, 3 * height // 4], [width // 4, 3 * width // 4]
    return np.array([pixels[r, c] for r in rows for c in columns]).astype(int)


def encode(image, format, **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture_of(values, mode):
    dtype = {"I": np.int32, "F": np.float32, "I;16": np.uint16}.get(mode, np.uint8)
    if mode == "1":
        return Image.fromarray(blocks(values).astype(np.uint8)).convert("1")
    pixels = blocks(values).astype(dtype)
    if mode == "CMYK":
        return Image.frombytes("CMYK", (WIDTH, HEIGHT), pixels.tobytes())
    return Image.fromarray(pixels)


def palette_picture(transparent=None):
    image = Image.fromarray(blocks(np.arange(4)).astype(np.uint8), mode="L")
    image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    image.putdata(blocks(np.arange(4)).ravel().tolist())
    image.putpalette(COLOURS.ravel().tolist())
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def png(rows, width, height, depth, kind):
    """A png from raw rows, for what Pillow cannot write; kind 2 is RGB, 4 grey + alpha, 6 RGBA."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(values, kind):
    """A 16-bit png of blocks, whose values are given in 8 bits."""
    pixels = (blocks(values).astype(np.uint32) * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return png(rows, WIDTH, HEIGHT, 16, kind)


def grey(values):
    return np.repeat(np.asarray(values)[:, None], 3, axis=1)


def join(values, alphas):
    return np.column_stack([values, alphas])


OPAQUE = [
    ("JPEG", "L", GREYS, grey(GREYS)),
    ("JPEG", "RGB", COLOURS, COLOURS),
    ("JPEG", "CMYK", INKS, INKS_SEEN),
    ("PNG", "1", BINARY, grey(BINARY)),
    ("PNG", "L", GREYS, grey(GREYS)),
    ("PNG", "RGB", COLOURS, COLOURS),
    ("PNG", "I;16", GREYS * 257, grey(GREYS)),
    ("WEBP", "RGB", COLOURS, COLOURS),
    ("GIF", "L", GREYS, grey(GREYS)),
    ("GIF", "RGB", COLOURS, COLOURS),
    ("BMP", "1", BINARY, grey(BINARY)),
    ("BMP", "L", GREYS, grey(GREYS)),
    ("BMP", "RGB", COLOURS, COLOURS),
    ("TIFF", "1", BINARY, grey(BINARY)),
    ("TIFF", "L", GREYS, grey(GREYS)),
    ("TIFF", "RGB", COLOURS, COLOURS),
    ("TIFF", "CMYK", INKS, INKS_SEEN),
    ("TIFF", "I;16", GREYS * 257, grey(GREYS)),
    ("TIFF", "I", GREYS * 257, grey(GREYS)),
    ("TIFF", "F", GREYS / 255, grey(GREYS)),
    ("TIFF", "F", GREYS, grey(GREYS)),
]


@pytest.mark.parametrize(("format", "mode", "values", "seen"), OPAQUE)
def test_every_format_and_mode_without_alpha(format, mode, values, seen):
    """Caught: 16 bits cut to their low or clipped to 255; CMYK inverted; float truncated to 0."""
    picture = load_picture(encode(picture_of(values, mode), format))
    assert picture.image.mode == "RGB"
    assert picture.size == (HEIGHT, WIDTH)
    tolerance = LOSSY if format in ("JPEG", "WEBP") else 0
    assert np.abs(centres(np.asarray(picture.image)) - seen).max() <= tolerance


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes(format):
    picture = load_picture(encode(palette_picture(), format))
    assert np.array_equal(centres(np.asarray(picture.image)), COLOURS)


TRANSPARENT = [
    ("PNG", join(GREYS[:, None], ALPHAS), join(grey(GREYS), ALPHAS)),
    ("PNG", join(COLOURS, ALPHAS), join(COLOURS, ALPHAS)),
    ("WEBP", join(COLOURS, ALPHAS), join(COLOURS, ALPHAS)),
    ("TIFF", join(GREYS[:, None], ALPHAS), join(grey(GREYS), ALPHAS)),
    ("TIFF", join(COLOURS, ALPHAS), join(COLOURS, ALPHAS)),
]


@pytest.mark.parametrize(("format", "values", "seen"), TRANSPARENT)
def test_alpha_is_kept(format, values, seen):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    picture = load_picture(
        encode(Image.fromarray(blocks(values).astype(np.uint8)), format, **options)
    )
    assert picture.has_alpha
    assert np.array_equal(centres(np.asarray(picture.image)), seen)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_transparent(format):
    picture = load_picture(encode(palette_picture(transparent=2), format, transparency=2))
    assert np.array_equal(centres(np.asarray(picture.image))[:, 3], [255, 255, 0, 255])
    white = centres(np.asarray(shown(picture)))
    assert np.array_equal(white, [*COLOURS[:2], [255, 255, 255], COLOURS[3]])


@pytest.mark.parametrize(
    ("kind", "values", "seen"),
    [
        (2, COLOURS, COLOURS),
        (4, join(GREYS[:, None], ALPHAS), join(grey(GREYS), ALPHAS)),
        (6, join(COLOURS, ALPHAS), join(COLOURS, ALPHAS)),
    ],
    ids=["RGB", "grey and alpha", "RGBA"],
)
def test_16_bits_per_channel(kind, values, seen):
    picture = load_picture(deep_png(values, kind))
    assert np.array_equal(centres(np.asarray(picture.image)), seen)


def test_an_alpha_channel_without_transparency_is_dropped():
    values = join(COLOURS, np.full(4, 255))
    assert not load_picture(blocks(values).astype(np.uint8)).has_alpha


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_taken(format):
    first, second = (picture_of(values, "RGB") for values in (COLOURS, COLOURS[::-1]))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(first, format, save_all=True, append_images=[second], **options)
    assert np.array_equal(centres(np.asarray(load_picture(data).image)), COLOURS)


STORED = {  # the file's rows and columns, from the upright picture, as the EXIF standard has them
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright[::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(format, orientation):
    """Caught: 6 and 8 exchanged; the orientation ignored, or applied twice (tiff)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(
        np.ascontiguousarray(STORED[orientation](blocks(COLOURS))).astype(np.uint8)
    )
    picture = load_picture(encode(stored, format, exif=exif))
    assert picture.size == (HEIGHT, WIDTH)
    tolerance = LOSSY if format in ("JPEG", "WEBP") else 0
    assert np.abs(centres(np.asarray(picture.image)) - COLOURS).max() <= tolerance


@pytest.mark.parametrize(
    "junk", [b"", b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x09"]
)
def test_broken_metadata_does_not_hide_the_picture(junk):
    data = encode(picture_of(COLOURS, "RGB"), "JPEG", exif=b"Exif\0\0" + junk)
    assert load_picture(data).size == (HEIGHT, WIDTH)


ARRAYS = {
    "uint8": blocks(COLOURS).astype(np.uint8),
    "uint16": (blocks(COLOURS) * 257).astype(np.uint16),
    "float32": (blocks(COLOURS) / 255).astype(np.float32),
    "float64": blocks(COLOURS) / 255,
    "not contiguous": blocks(COLOURS).astype(np.uint8)[:, ::-1][:, ::-1],
    "with alpha": blocks(join(COLOURS, np.full(4, 255))).astype(np.uint8),
    "tensor": torch.tensor(blocks(COLOURS)).permute(2, 0, 1).to(torch.uint8),
    "float tensor": torch.tensor(blocks(COLOURS) / 255).permute(2, 0, 1).requires_grad_(),
    "Pillow": Image.fromarray(blocks(COLOURS).astype(np.uint8)),
}


@pytest.mark.parametrize("source", ARRAYS.values(), ids=ARRAYS)
def test_arrays_tensors_and_images(source):
    picture = load_picture(source)
    assert np.array_equal(centres(np.asarray(picture.image)), COLOURS)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 1)])
@pytest.mark.parametrize(
    ("dtype", "white"), [(bool, 1), (np.uint8, 255), (np.uint16, 65535), (np.float16, 1)]
)
def test_grey_arrays(shape, dtype, white):
    array = (blocks(BINARY) // 255 * white).astype(dtype).reshape(shape)
    assert np.array_equal(centres(np.asarray(load_picture(array).image)), grey(BINARY))


def test_half_precision_tensors():
    tensor = torch.full((1, 4, 4), 0.5, dtype=torch.bfloat16)
    assert np.asarray(load_picture(tensor).image).tolist() == [[[128] * 3] * 4] * 4


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 5)), r"shape \(h, w\) or \(h, w, 1 to 4\), got \(3, 4, 5\)"),
        (np.zeros((1, 4, 4, 3)), r"got \(1, 4, 4, 3\)"),
        (np.zeros((0, 4, 3)), r"got \(0, 4, 3\)"),
        (np.zeros((4, 4), np.int64), "bool, uint8, uint16 or float, got int64"),
        (np.full((4, 4), -1.0), r"float values must be in \[0, 1\], got -1 to -1"),
        (np.full((4, 4), 255.0), r"must be in \[0, 1\], got 255 to 255"),
        (np.full((4, 4), np.nan), r"must be in \[0, 1\], got nan"),
        (torch.zeros(4, 4), r"a tensor must have shape .* got \(4, 4\)"),
    ],
)
def test_arrays_that_mean_no_picture_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        load_picture(array)


def test_a_given_image_is_left_as_it_was(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture_of(COLOURS, "RGB").save(path, exif=exif)
    with Image.open(path) as image:
        picture = load_picture(image, enough=1)
        assert (picture.size, image.size, image.mode) == ((WIDTH, HEIGHT), (WIDTH, HEIGHT), "RGB")
        assert image.getexif()[0x0112] == 6
        assert image.getpixel((0, 0)) is not None


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_cut_short_is_refused_or_complete(tmp_path, format):
    """Caught: Pillow's LOAD_TRUNCATED_IMAGES, which fills the rest with grey."""
    noise = np.random.default_rng(5).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    whole = np.asarray(load_picture(data).image)
    path, messages = tmp_path / "cut.png", []
    for length in np.linspace(0, len(data) - 1, 60).astype(int):
        path.write_bytes(data[:length])
        try:
            assert np.array_equal(np.asarray(load_picture(path).image), whole)
        except ValueError as error:
            messages.append(str(error))
    assert all(message.startswith(f"picture '{path}': ") for message in messages)
    assert len(messages) >= 57


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_damaged_file_gives_a_picture_or_one_kind_of_error(format):
    rng = np.random.default_rng(6)
    data = encode(Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)), format)
    messages = []
    for _ in range(100):
        damaged = bytearray(data)
        for position in rng.integers(0, 60, 3):
            damaged[position] = rng.integers(256)
        try:
            assert load_picture(bytes(damaged)).image.mode in ("RGB", "RGBA")
        except ValueError as error:
            messages.append(str(error))
    assert all(message.startswith("the given picture: ") for message in messages)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is text", "not a jpeg, png, webp, gif, bmp or tiff picture"),
        (b"", "the file is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a jpeg"),
    ],
    ids=["text", "empty", "PostScript"],
)
def test_what_only_looks_like_a_picture_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_picture(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.png': No such file"):
        load_picture(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=rf"{tmp_path.name}': expected a file"):
        load_picture(str(tmp_path))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device without end")
def test_a_device_is_refused_unread():
    with pytest.raises(ValueError, match="expected a file"):
        load_picture("/dev/zero")


@pytest.mark.parametrize("side", [10_955, 12_000, 100_000], ids=["just", "more", "bomb"])
def test_more_than_120_megapixels_are_refused_from_the_header(side):
    """The file holds no pixels, so an attempt to decode it would end in another message."""
    with pytest.raises(ValueError, match="larger than the 120 megapixels allowed"):
        load_picture(png(b"", side, side, 8, 2))


def test_a_much_too_large_jpeg_is_decoded_at_a_part_of_its_size():
    """Caught: `enough` taken for the longer side (a 1/8 of 250 x 375), or ignored."""
    large = Image.fromarray(blocks(COLOURS, 2000, 3000).astype(np.uint8))
    data = encode(large, "JPEG")
    assert load_picture(data).size == (2000, 3000)
    small = load_picture(data, enough=400)
    assert small.size == (500, 750)
    assert np.abs(centres(np.asarray(small.image)) - COLOURS).max() <= LOSSY
    assert load_picture(encode(large, "BMP"), enough=400).size == (2000, 3000)


class Site(BaseHTTPRequestHandler):
    content = encode(picture_of(COLOURS, "RGB"), "PNG")

    def do_GET(self):
        self.send_response(200 if self.path in ("/a.png", "/%C3%A4.png", "/cut.png") else 404)
        if self.path == "/cut.png":
            self.send_header("Content-Length", str(len(self.content) + 7))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_picture_comes_from_an_address(site):
    picture = load_picture(f"{site}/a.png")
    assert np.array_equal(centres(np.asarray(picture.image)), COLOURS)


def test_an_address_may_have_letters_of_any_script(site):
    assert load_picture(f"{site}/ä.png").size == load_picture(f"{site}/%C3%A4.png").size


def test_a_download_that_ends_too_early_or_too_late_is_refused(site, monkeypatch):
    with pytest.raises(ValueError, match="ended 7 bytes too early"):
        load_picture(f"{site}/cut.png")
    monkeypatch.setattr(pictures, "DOWNLOAD_LIMIT", -1.0)
    with pytest.raises(ValueError, match="the download was stopped"):
        load_picture(f"{site}/a.png")


def test_addresses_without_a_picture_are_refused_by_name(site, monkeypatch):
    with pytest.raises(ValueError, match=r"missing\.png': cannot be downloaded .*404"):
        load_picture(f"{site}/missing.png")
    monkeypatch.setattr(pictures, "MAX_DOWNLOAD", len(Site.content) - 1)
    with pytest.raises(ValueError, match="the download was stopped"):
        load_picture(f"{site}/a.png")


def shown(picture, **options):
    """What `fit_picture` makes of a picture at its own size, in 0 to 255."""
    return levels(fit_picture(picture, *picture.size, **options))


def levels(tensor):
    return ((tensor.permute(1, 2, 0) + 1) * 127.5).numpy()


def test_levels_map_onto_minus_one_to_one():
    tensor = fit_picture(load_picture(np.array([[0, 51, 255]], np.uint8)), 1, 3)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 1, 3)
    assert torch.allclose(tensor, torch.tensor([-1, -0.6, 1]).expand(3, 1, 3), atol=1e-6)


@pytest.mark.parametrize(
    ("background", "colour"),
    [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#ff8000", (255, 128, 0))],
)
def test_transparency_shows_the_background(background, colour):
    """Independent truth: alpha * colour + (1 - alpha) * background, here to one level."""
    rng = np.random.default_rng(7)
    rgba = rng.integers(0, 256, (32, 32, 4), dtype=np.uint8)
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * np.array(colour)
    assert np.abs(shown(load_picture(rgba), background=background) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("source", [(1, 1), (1, 5000), (5000, 1), (3, 2), (577, 1023)])
@pytest.mark.parametrize("target", [(64, 64), (64, 114), (130, 66)])
def test_every_picture_meets_every_size_exactly(mode, source, target):
    rng = np.random.default_rng(8)
    picture = load_picture(rng.integers(0, 256, (*source, 3), dtype=np.uint8))
    tensor = fit_picture(picture, *target, mode=mode)
    assert tensor.shape == (3, *target)
    assert tensor.is_contiguous()
    assert tensor.abs().max() <= 1


def test_cover_shows_the_centre():
    thirds = np.repeat(COLOURS[:3], 40, axis=0)[None].repeat(40, axis=0).astype(np.uint8)
    for stripe in (thirds, thirds.swapaxes(0, 1)):
        seen = levels(fit_picture(load_picture(stripe), 80, 80))
        assert np.abs(seen[8:-8, 8:-8] - COLOURS[1]).max() <= 1


def test_contain_shows_everything_on_the_background():
    picture = load_picture(blocks(COLOURS, 40, 80).astype(np.uint8))
    seen = levels(fit_picture(picture, 80, 80, mode="contain", background="black"))
    assert np.abs(seen[:20]).max() <= 1e-4
    assert np.abs(seen[60:]).max() <= 1e-4
    assert np.abs(centres(seen[20:60]) - COLOURS).max() <= 1


@pytest.mark.parametrize(("x", "first"), [(0.0, 0), (0.25, 30), (0.5, 60), (1.0, 120)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_place_moves_the_crop(x, first, turned):
    """Catches x and y exchanged, or a crop that does not reach the edges."""
    columns = np.arange(200, dtype=np.uint8)[None, :, None].repeat(80, axis=0)
    picture, place = columns, (x, 0.9)
    if turned:
        picture, place = columns.swapaxes(0, 1), (0.9, x)
    seen = levels(fit_picture(load_picture(picture), 80, 80, place=place))
    seen = seen.swapaxes(0, 1) if turned else seen
    assert np.abs(seen[..., 0] - np.arange(first, first + 80)).max() <= 0.01


@pytest.mark.parametrize(("y", "first"), [(0.0, 0), (0.5, 20), (0.75, 30), (1.0, 40)])
def test_the_place_moves_a_contained_picture(y, first):
    picture = load_picture(np.zeros((40, 80), np.uint8))
    seen = levels(fit_picture(picture, 80, 80, mode="contain", place=(0.0, y)))
    rows = np.flatnonzero(seen[:, 40, 0] < 128)
    assert (rows[0], rows[-1]) == (first, first + 39)


@pytest.mark.parametrize("mode", ["cover", "contain"])
def test_the_centre_is_the_old_place_to_the_bit(mode):
    """Catches another rounding of the crop, which would change every video there is."""
    rng = np.random.default_rng(9)
    picture = load_picture(rng.integers(0, 256, (101, 173, 3), dtype=np.uint8))
    height, width = (67, 64) if mode == "cover" else (91, 96)
    if mode == "cover":
        crop = 101 * width / height
        left = (173 - crop) / 2
        box = (left, 0.0, 173 - left, 101.0)
        image = picture.image.resize((width, height), Image.Resampling.LANCZOS, box, 3.0)
    else:
        size = (96, round(101 * 96 / 173))
        image = Image.new("RGB", (width, height), "white")
        whole = picture.image.resize(size, Image.Resampling.LANCZOS, None, 3.0)
        image.paste(whole, (0, (height - size[1]) // 2))
    assert np.array_equal(
        fit_picture(picture, height, width, mode).permute(1, 2, 0).numpy(),
        np.asarray(image, dtype=np.float32) / 127.5 - 1,
    )


def test_stretch_fills_the_size_with_everything():
    picture = load_picture(blocks(COLOURS, 40, 80).astype(np.uint8))
    assert (
        np.abs(centres(levels(fit_picture(picture, 90, 66, mode="stretch"))) - COLOURS).max() <= 1
    )


@pytest.mark.parametrize("mode", ["cover", "contain", "stretch"])
def test_shrinking_is_antialiased(mode):
    """A checkerboard of single pixels must become its mean. Caught: bilinear without filter."""
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    seen = levels(fit_picture(load_picture(board), 64, 64, mode=mode))
    assert np.abs(seen - 127.5).max() <= 2


def test_an_unknown_fit_is_refused():
    with pytest.raises(ValueError, match="fit must be one of cover, contain, stretch, got 'crop'"):
        fit_picture(load_picture(np.zeros((4, 4))), 64, 64, mode="crop")


@pytest.mark.parametrize(
    ("picture", "native", "chosen"),
    [
        ((1080, 1920), (576, 1024), (576, 1024)),
        ((1920, 1080), (576, 1024), (1024, 576)),
        ((500, 500), (576, 1024), (576, 1024)),
        ((500, 500), (1024, 576), (1024, 576)),
        ((1080, 1920), (1024, 576), (576, 1024)),
        ((1080, 1920), (576, 576), (576, 576)),
        ((1920, 1080), (576, 576), (576, 576)),
    ],
)
def test_native_size_follows_the_orientation(picture, native, chosen):
    assert native_size(picture, *native) == chosen


def object_picture(height=40, width=20):
    """A red object of the given size in the corner of a transparent 100 x 100 picture."""
    rgba = np.zeros((100, 100, 4), np.uint8)
    rgba[5 : 5 + height, 55 : 55 + width] = (200, 0, 0, 255)
    return load_picture(rgba)


@pytest.mark.parametrize(("height", "width"), [(40, 20), (20, 40), (30, 30), (1, 30)])
@pytest.mark.parametrize("ratio", [0.5, 1.0, None])
def test_the_object_is_centred_at_its_share_of_the_frame(height, width, ratio):
    """Caught: the ratio applied to the shorter side; the object left where it was."""
    picture = cut_out_object(object_picture(height, width), ratio, 200)
    assert picture.size == (200, 200)
    assert not picture.has_alpha
    rows, columns = np.nonzero(np.asarray(picture.image)[..., 1] < 128)
    longer = 200 * (ratio or max(height, width) / 100)
    for found, side in ((rows, height), (columns, width)):
        assert abs(found.max() - found.min() + 1 - longer * side / max(height, width)) <= 2
        assert abs(found.max() + found.min() - 199) <= 2
    assert np.asarray(picture.image)[0, 0].tolist() == [255] * 3 or ratio == 1


def test_no_object_is_an_error():
    with pytest.raises(ValueError, match="fully transparent"):
        cut_out_object(load_picture(np.zeros((8, 8, 4), np.uint8)), 1.0, 64)


def test_without_alpha_and_rembg_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"transparent background, or install rembg"):
        cut_out_object(load_picture(np.zeros((8, 8))), 1.0, 64)


@pytest.mark.parametrize("mode", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("shape", [(1, 10000), (10000, 1)])
def test_a_very_thin_picture_is_still_seen(mode, shape):
    """Caught: a contained side that rounds to nothing, which shows the background alone."""
    pixels = fit_picture(load_picture(np.zeros(shape, np.uint8)), 64, 64, mode, "white")
    assert pixels.shape == (3, 64, 64)
    assert pixels.min() == -1
    whole = 64 if mode == "contain" else 64 * 64
    assert (pixels[0] == -1).sum() == whole


def test_a_very_thin_object_is_still_seen():
    line = np.zeros((9, 10000, 4), np.uint8)
    line[4, :, 3] = 255
    seen = np.asarray(cut_out_object(load_picture(line), 1.0, 64).image)
    assert (seen == 0).any()


def test_16_bits_in_either_order_of_bytes(tmp_path):
    """Caught: a dark big-endian picture taken for one of another range, brightened by 257."""
    values = np.arange(0, 200, dtype=">u2").reshape(10, 20)
    Image.frombytes("I;16B", (20, 10), values.tobytes()).save(tmp_path / "dark.tiff")
    with Image.open(tmp_path / "dark.tiff") as stored:
        assert stored.mode == "I;16B"
    assert np.asarray(load_picture(tmp_path / "dark.tiff").image).max() == 1
    assert np.asarray(load_picture(values).image).max() == 1


def test_what_rembg_cannot_do_is_one_line(monkeypatch):
    def remove(image):
        raise RuntimeError("no model")

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=remove))
    with pytest.raises(ValueError, match=r"rembg cannot remove the background \(no model\)"):
        isolate_object(load_picture(np.zeros((8, 8))))
