import io
import json
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from embedding.decode import BadImage, ImageFacts, check_size, decode_rgb, inspect_image

REPO = Path(__file__).parents[2]
ODD_IMAGES = REPO.parent / "shared" / "data" / "odd-images"
RULES = {"min_side": 32, "max_aspect_ratio": 8, "max_pixels": 178_956_970}


def picture(h=60, w=80, seed=0):
    """Smooth colours with grain: neither trivial nor noise to any codec."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    waves = np.stack([127 + 100 * np.sin((y * a + x * b) / 17) for a, b in ((1, 2), (3, 1), (2, -2))], -1)
    return (waves + rng.integers(0, 25, (h, w, 3))).clip(0, 255).astype("u1")


def encode(image, fmt, **options):
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, fmt, **options)
    return out.getvalue()


def png(width, height, depth, colour, rows, *, extra=b"", claim=None):
    """A PNG by hand: what Pillow does not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", *(claim or (width, height)), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def transparency(*values):
    body = struct.pack(f">{len(values)}H", *values)
    return struct.pack(">I", len(body)) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))


def strip_tiff(image, rows):
    """A deflated TIFF with its directory in front, so that a cut file still shows all its tags."""
    h, w, _ = image.shape
    strips = [zlib.compress(image[i : i + rows].tobytes()) for i in range(0, h, rows)]
    n, bits = len(strips), 8 + 2 + 12 * 10 + 4
    starts, lengths = bits + 6, bits + 6 + 4 * len(strips)
    offsets = np.cumsum([lengths + 4 * n] + [len(s) for s in strips[:-1]]).tolist()
    tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 3, bits), (259, 4, 1, 8), (262, 4, 1, 2), (273, 4, n, starts)]
    tags += [(277, 4, 1, 3), (278, 4, 1, rows), (279, 4, n, lengths), (284, 4, 1, 1)]
    out = b"II*\0" + struct.pack("<IH", 8, 10) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    out += struct.pack("<3H", 8, 8, 8) + struct.pack(f"<{n}I", *offsets)
    return out + struct.pack(f"<{n}I", *map(len, strips)) + b"".join(strips)


def small_files():
    x, turned = picture(), Image.fromarray(picture(seed=1))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.fromarray(x).quantize(32)
    return {
        "jpeg": encode(x, "JPEG", exif=exif),
        "jpeg progressive": encode(x, "JPEG", progressive=True),
        "jpeg restart": encode(x, "JPEG", restart_marker_rows=1),
        "jpeg cmyk": encode(Image.fromarray(x).convert("CMYK"), "JPEG"),
        "png": encode(x, "PNG", exif=exif),
        "png palette": encode(palette, "PNG", transparency=3),
        "png 16": encode(np.arange(4800, dtype="u2").reshape(60, 80) * 13, "PNG"),
        "gif": encode(x, "GIF"),
        "gif animated": encode(palette, "GIF", save_all=True, append_images=[turned], transparency=2),
        "webp": encode(x, "WEBP", exif=exif),
        "webp lossless": encode(Image.fromarray(x).convert("RGBA"), "WEBP", lossless=True),
        "webp animated": encode(x, "WEBP", save_all=True, append_images=[turned]),
        "tiff": encode(x, "TIFF", exif=exif),
        "tiff lzw": encode(x, "TIFF", compression="tiff_lzw"),
        "tiff strips": strip_tiff(x, 16),
        "tiff float": encode(np.linspace(0, 1, 4800, dtype="f4").reshape(60, 80), "TIFF"),
        "bmp": encode(x, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "ppm": encode(x, "PPM"),
        "mpo": encode(x, "MPO", save_all=True, append_images=[turned]),
    }


FILES = small_files()


@pytest.mark.parametrize("name", FILES)
def test_whole_files_decode_and_say_their_format(name):
    fmt = "jpeg" if name == "mpo" else name.split()[0]
    pixels = decode_rgb(FILES[name])
    upright = name in ("jpeg", "png", "webp", "tiff")  # orientation 6 turns these on their side
    assert pixels.dtype == np.uint8
    assert pixels.shape == ((80, 60, 3) if upright else (60, 80, 3))
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert inspect_image(FILES[name]) == ImageFacts(fmt, pixels.shape[1], pixels.shape[0])


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_bad_or_the_whole_picture(name):
    """Never half a picture: at each place of the cut, all the pixels of the first frame or none."""
    data, whole = FILES[name], decode_rgb(FILES[name])
    for cut in sorted({*range(0, len(data), 37), *range(max(0, len(data) - 60), len(data))}):
        pixels = decode_rgb(data[:cut])
        if isinstance(pixels, BadImage):
            assert pixels.reason == "undecodable"
        else:
            np.testing.assert_array_equal(pixels, whole, err_msg=f"cut at {cut}")
            assert cut > 0.25 * len(data)
    assert isinstance(decode_rgb(data[: len(data) // 4]), BadImage)
    assert isinstance(inspect_image(data[: len(data) // 4]), BadImage)


@pytest.mark.parametrize("name", ["JPEG", "WEBP"])
def test_a_cut_file_of_more_than_one_read_buffer_is_bad(name):
    data = encode(picture(700, 900), name, quality=95)
    assert len(data) > 3 * 65536
    for part in (0.3, 0.5, 0.9, 0.99):
        assert decode_rgb(data[: int(part * len(data))]).reason == "undecodable"


def mutated(data, rng):
    """The bytes with one to five damages, half of them near the header."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        i = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 600)))
        kind = rng.integers(4)
        if kind == 0:
            data[i] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[i : i + 4] = rng.bytes(4)
        elif kind == 2:
            del data[i : i + int(rng.integers(1, 20))]
        else:
            data[i:i] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_never_raise(name):
    outcomes = set()
    for seed in range(300):
        damaged = mutated(FILES[name], np.random.default_rng([seed, len(FILES[name])]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels = decode_rgb(damaged, max_pixels=4_000_000)
        outcomes.add(type(pixels))
        if isinstance(pixels, BadImage):
            assert pixels.reason in ("undecodable", "too_large")
            assert pixels.detail.isascii()
            assert " at 0x" not in pixels.detail  # an address would differ from run to run
            assert len(pixels.detail) <= 200
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.size
    assert BadImage in outcomes


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"<html>404</html>", b"\xff\xd8\xff", b"BM", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_image_is_undecodable(data):
    assert decode_rgb(data).reason == "undecodable"
    assert inspect_image(data) == decode_rgb(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_as_pillow_turns(orientation, fmt):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), fmt, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decode_rgb(data), np.asarray(ImageOps.exif_transpose(image).convert("RGB")))


@pytest.mark.parametrize("fmt", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*" + b"\xff" * 40, b"Exif\0\0junk" + bytes(20)])
def test_a_broken_exif_block_does_not_cost_the_picture(fmt, exif):
    data = encode(picture(), fmt, exif=exif)
    assert exif[6:] in data
    np.testing.assert_array_equal(decode_rgb(data), decode_rgb(encode(picture(), fmt)))


@pytest.mark.parametrize("values", [[0, 257, 32896, 65535], [0, 1, 2, 3]])
def test_16_bit_gray_is_scaled_not_clipped(values):
    gray = np.array([values], "u2")
    want = np.round(gray / 257).astype("u1")
    for data in (encode(gray, "PNG"), encode(gray, "TIFF"), encode(gray.astype("i4"), "TIFF")):
        np.testing.assert_array_equal(decode_rgb(data), np.repeat(want[:, :, None], 3, 2))
    big_endian = png(4, 1, 16, 0, [gray.astype(">u2").tobytes()])
    np.testing.assert_array_equal(decode_rgb(big_endian)[:, :, 1], want)


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 32896.0, 65535.0], [0, 128, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([1e6, 2e6, 3e6], [0, 128, 255]),
        ([np.nan, np.inf, 1.0], [0, 0, 255]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
    ],
)
def test_float_images_are_scaled_by_rule(values, want):
    np.testing.assert_array_equal(decode_rgb(encode(np.array([values], "f4"), "TIFF"))[0, :, 0], want)


def test_wide_integers_are_stretched_when_16_bits_do_not_hold_them():
    np.testing.assert_array_equal(
        decode_rgb(encode(np.array([[-100, 0, 100_000]], "i4"), "TIFF"))[0, :, 2], [0, 0, 255]
    )


def test_transparency_is_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], "u1")
    want = [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]
    for data in (encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True, exact=True), encode(rgba, "TIFF")):
        np.testing.assert_array_equal(decode_rgb(data), want)
    gray = Image.fromarray(rgba[:, :, [0, 3]], "LA")
    np.testing.assert_array_equal(decode_rgb(encode(gray, "PNG"))[0, :, 0], [10, 255, 127])


def test_transparent_palette_entries_are_white():
    image = Image.new("P", (3, 1))
    image.putpalette([9, 8, 7, 50, 60, 70, 1, 2, 3])
    image.putdata([0, 1, 2])
    for data in (encode(image, "PNG", transparency=1), encode(image, "GIF", transparency=1)):
        np.testing.assert_array_equal(decode_rgb(data), [[[9, 8, 7], [255, 255, 255], [1, 2, 3]]])
    half = encode(image, "PNG", transparency=bytes([255, 0, 255]))
    np.testing.assert_array_equal(decode_rgb(half)[0, 1], [255, 255, 255])


def test_colour_keys_of_png():
    row = struct.pack(">6H", 0xFFFF, 0, 0, 0x1234, 0x5678, 0x9ABC)
    keyed = png(2, 1, 16, 2, [row], extra=transparency(0x1234, 0x5678, 0x9ABC))
    np.testing.assert_array_equal(decode_rgb(keyed), [[[255, 0, 0], [255, 255, 255]]])
    gray = png(2, 1, 16, 0, [struct.pack(">2H", 0x1234, 0x8080)], extra=transparency(0x1234))
    np.testing.assert_array_equal(decode_rgb(gray)[0, :, 0], [255, 128])


def test_one_bit_cmyk_and_gray_become_rgb():
    bits = Image.fromarray(np.array([[0, 255, 255, 0]], "u1")).convert("1")
    for fmt in ("PNG", "TIFF", "BMP", "GIF"):
        np.testing.assert_array_equal(decode_rgb(encode(bits, fmt))[0, :, 0], [0, 255, 255, 0])
    x = picture()
    near = decode_rgb(encode(Image.fromarray(x).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(near.astype(int) - x).mean() < 3
    gray = decode_rgb(encode(Image.fromarray(x).convert("L"), "PNG"))
    np.testing.assert_array_equal(gray, np.repeat(np.asarray(Image.fromarray(x).convert("L"))[:, :, None], 3, 2))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (40, 40), c) for c in ((250, 0, 0), (0, 250, 0))]
    for fmt in ("GIF", "PNG", "TIFF"):
        data = encode(frames[0], fmt, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode_rgb(data)[5, 5], [250, 0, 0])


def test_max_pixels_is_a_limit_of_this_call():
    data = FILES["jpeg"]
    assert decode_rgb(data, max_pixels=4799) == BadImage("too_large", "80x60 > 4799 pixels")
    assert not isinstance(decode_rgb(data, max_pixels=4800), BadImage)


def test_bombs_are_refused_from_the_header_with_flat_memory():
    script = """
import resource, sys
from tests_decode import FILES, png, encode, picture
from embedding.decode import decode_rgb, inspect_image
import struct
decode_rgb(FILES["webp"])
gif, bmp = bytearray(FILES["gif"]), bytearray(FILES["bmp"])
gif[6:10], bmp[18:26] = struct.pack("<HH", 60000, 60000), struct.pack("<ii", 60000, 60000)
webp = bytearray(FILES["webp animated"])
at = webp.find(b"VP8X")
webp[at + 12 : at + 18] = (59999).to_bytes(3, "little") * 2
jpeg = bytearray(FILES["jpeg progressive"])
at = jpeg.find(bytes([255, 0xC2]))
jpeg[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
bomb = png(1, 1, 8, 2, [bytes(3)], claim=(60000, 60000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in (bomb, bytes(gif), bytes(bmp), bytes(webp), bytes(jpeg), b"P6 60000 60000 255 "):
    assert decode_rgb(data).reason == inspect_image(data).reason == "too_large", decode_rgb(data)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    script = script.replace("tests_decode", Path(__file__).stem)
    code = f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(Path(__file__).parent)!r}]\n{script}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 20_000  # kB; one of them decoded would take 10 GB


def test_pillows_global_limit_does_not_matter(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_rgb(FILES["jpeg"]).shape == (80, 60, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_warning_filters_are_as_before_even_with_threads(recwarn):
    before = list(warnings.filters)
    noisy = [mutated(FILES["tiff"], np.random.default_rng(seed)) for seed in range(60)]
    threads = [threading.Thread(target=lambda: [decode_rgb(data) for data in noisy]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
    assert not recwarn.list


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((32, 32), None),
        ((31, 400), "too_small"),
        ((400, 31), "too_small"),
        ((256, 32), None),
        ((32, 257), "aspect_ratio"),
        ((4000, 2), "too_small"),
    ],
)
def test_check_size(size, reason):
    found = check_size(ImageFacts("png", *size), min_side=32, max_aspect_ratio=8)
    assert (found and found.reason) == reason


def outcome(data, rules):
    facts = inspect_image(data, rules["max_pixels"])
    bad = facts if isinstance(facts, BadImage) else check_size(facts, rules["min_side"], rules["max_aspect_ratio"])
    pixels = decode_rgb(data, rules["max_pixels"])
    if isinstance(facts, BadImage):
        assert pixels == facts
    else:
        assert (facts.height, facts.width, 3) == pixels.shape
    return f"reject:{bad.reason}" if bad else "keep"


def odd_files():
    """Files like those of the folder of odd images, made here, with their outcomes."""
    x = picture(240, 320)
    jpeg = encode(x, "JPEG")
    return {
        "trailing garbage": (jpeg + b"\0garbage" * 500, "keep"),
        "truncated": (jpeg[: len(jpeg) // 2], "reject:undecodable"),
        "zero bytes": (b"", "reject:undecodable"),
        "text": (b"<html>404 not found</html>", "reject:undecodable"),
        "tiny": (encode(x[:1, :1], "PNG"), "reject:too_small"),
        "sliver": (encode(np.zeros((2, 4000, 3), "u1"), "PNG"), "reject:too_small"),
        "banner": (encode(np.zeros((200, 3000, 3), "u1"), "JPEG"), "reject:aspect_ratio"),
        "bomb": (png(1, 1, 8, 2, [bytes(3)], claim=(60000, 60000)), "reject:too_large"),
        **{name: (data, "keep") for name, data in FILES.items()},
    }


def test_odd_files_have_their_outcomes():
    for name, (data, want) in odd_files().items():
        assert outcome(data, RULES) == want, name


@pytest.mark.skipif(not ODD_IMAGES.is_dir(), reason="needs the folder of odd images; the test above makes its own")
def test_the_folder_of_odd_images_has_its_outcomes():
    expected = json.loads((ODD_IMAGES / "expected.json").read_text("utf-8"))
    for name, file in expected["files"].items():
        want = file["outcome"].replace("reject:exact_duplicate", "keep")  # not a matter of one file
        assert outcome((ODD_IMAGES / name).read_bytes(), expected["rules"]) == want, name
    facts = inspect_image((ODD_IMAGES / "exif-rotated.jpg").read_bytes())
    assert (facts.width, facts.height) == (240, 320)
    assert inspect_image((ODD_IMAGES / "wrong-extension.png").read_bytes()).format == "jpeg"
    deep = decode_rgb((ODD_IMAGES / "sixteen-bit.png").read_bytes())
    assert 20 < deep.mean() < 235
    assert len(np.unique(deep)) > 50
