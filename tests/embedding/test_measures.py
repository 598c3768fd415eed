import io

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dct
from sklearn.datasets import load_sample_images

from curation import pool
from embedding.decode import BadImage
from embedding.measures import BLUR_SIDE, MEASURE, blur, brightness, entropy, measure, phash, scan_image, to_grey


def photographs() -> list[np.ndarray]:
    """Pieces of two photographs, uint8 (200, 300, 3), that do not overlap."""
    pieces = [(y, x) for y in (0, 213) for x in (0, 320)]
    return [np.ascontiguousarray(whole[y : y + 200, x : x + 300])
            for whole in load_sample_images().images for y, x in pieces]  # fmt: skip


def encoded(pixels: np.ndarray, fmt: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, fmt, **options)
    return out.getvalue()


def again(pixels: np.ndarray, fmt: str, **options) -> np.ndarray:
    """The picture, saved and read."""
    return np.asarray(Image.open(io.BytesIO(encoded(pixels, fmt, **options))).convert("RGB"))


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def differing(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def hash_of(pixels: np.ndarray) -> str:
    return phash(to_grey(pixels))


def test_grey_is_luma():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
    np.testing.assert_allclose(to_grey(pixels), pixels @ np.array([0.299, 0.587, 0.114]), atol=0.51)


@pytest.mark.parametrize("seed", range(5))
def test_entropy_and_brightness_against_their_definitions(seed):
    rng = np.random.default_rng(seed)
    grey = rng.integers(0, 4 ** (seed % 4 + 1), (17, 23), np.uint8, endpoint=seed < 3) // (seed + 1)
    shares = [np.mean(grey == level) for level in range(256)]
    assert entropy(grey) == pytest.approx(-sum(p * np.log2(p) for p in shares if p))
    assert brightness(grey) == pytest.approx(grey.astype(float).mean())


def test_entropy_of_what_is_known():
    assert entropy(np.full((5, 5), 9, np.uint8)) == 0
    assert entropy(np.array([[0, 255], [255, 0]], np.uint8)) == 1
    assert entropy(np.arange(256, dtype=np.uint8).reshape(16, 16)) == 8


@pytest.mark.parametrize("shape", [(9, 13), (1, 6), (6, 1), (1, 1), (2, 2), (BLUR_SIDE, 300)])
def test_blur_is_the_variance_of_the_laplacian(shape):
    grey = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    x, (height, width) = grey.astype(int), shape

    def at(i: int, n: int) -> int:  # mirrored at the border, without the border itself: ... 2 1 | 0 1 2 ...
        return 0 if n == 1 else -i if i < 0 else 2 * n - 2 - i if i >= n else i

    laplacian = [
        sum(x[at(i + di, height), at(j + dj, width)] for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1))) - 4 * x[i, j]
        for i in range(height)
        for j in range(width)
    ]
    assert blur(grey) == pytest.approx(np.var(laplacian))


def test_a_blurred_picture_has_less_and_its_size_hardly_counts():
    for pixels in photographs():
        grey = to_grey(pixels)
        image = Image.fromarray(grey)
        soft = np.asarray(image.resize((75, 50), Image.Resampling.BOX).resize((300, 200), Image.Resampling.BICUBIC))
        assert blur(soft) < blur(grey) / 3
        large = np.asarray(image.resize((384, 256), Image.Resampling.BICUBIC))
        huge = np.asarray(image.resize((1536, 1024), Image.Resampling.BICUBIC))
        assert blur(huge) == pytest.approx(blur(large), rel=0.15)  # four times the size


def test_the_hash_is_that_of_a_cosine_transform():
    for pixels in photographs():
        grey = to_grey(pixels)
        small = np.asarray(Image.fromarray(grey).resize((32, 32), Image.Resampling.LANCZOS)).astype(float)
        low = dct(dct(small, axis=0), axis=1)[:8, :8]
        bits = "".join("1" if bit else "0" for bit in (low > np.median(low)).ravel())
        assert hash_of(pixels) == f"{int(bits, 2):016x}"


def test_terms_that_are_equal_tie():
    assert hash_of(np.full((40, 60, 3), 200, np.uint8)) == "8000000000000000"
    assert hash_of(np.zeros((1, 1, 3), np.uint8)) == "0000000000000000"
    columns = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3))
    assert hash_of(columns)[2:] == "0" * 14  # nothing changes from row to row


def test_the_hash_of_a_copy_is_near_and_of_another_picture_far():
    pictures = photographs()
    hashes = [hash_of(pixels) for pixels in pictures]
    assert all(len(one) == 16 and one == one.lower() for one in hashes)
    for pixels, own in zip(pictures, hashes, strict=True):
        copies = [
            again(pixels, "JPEG", quality=50), again(pixels, "WEBP", quality=60), resized(pixels, 150, 100),
            resized(pixels, 900, 600), resized(pixels, 200, 200), again(resized(pixels, 120, 80), "JPEG", quality=70),
            (pixels * 0.8 + 20).astype(np.uint8),
        ]  # fmt: skip
        assert max(differing(hash_of(copy), own) for copy in copies) <= 8
        assert differing(hash_of(pixels[:, ::-1]), own) > 12  # mirrored and turned pictures are others
        assert differing(hash_of(np.rot90(pixels).copy()), own) > 12
    apart = [differing(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 12


def test_a_scan_gives_facts_and_the_measures_that_are_asked_for():
    pixels = photographs()[0]
    facts = {"format": "png", "width": 300, "height": 200}
    assert scan_image(encoded(pixels), 10**6, 1, 100.0) == facts
    found = scan_image(encoded(pixels), 10**6, 1, 100.0, ("phash", "blur"))
    grey = to_grey(pixels)
    assert found == facts | {"phash": phash(grey), "blur": blur(grey)}
    assert measure(pixels, tuple(MEASURE)).keys() == MEASURE.keys() == pool.MEASURES.keys()
    with pytest.raises(ValueError, match="must be uint8"):
        measure(grey, ("blur",))


def test_a_turned_photograph_is_measured_upright():
    pixels = photographs()[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    data = encoded(np.rot90(pixels).copy(), "PNG", exif=exif.tobytes())
    assert scan_image(data, 10**6, 1, 100.0, ("phash",)) == scan_image(encoded(pixels), 10**6, 1, 100.0, ("phash",))


@pytest.mark.parametrize(
    ("change", "limits", "reason"),
    [
        (slice(0, -60), (10**6, 1, 100.0), "undecodable"),
        (slice(None), (1000, 1, 100.0), "too_large"),
        (slice(None), (10**6, 201, 100.0), "too_small"),
        (slice(None), (10**6, 1, 1.2), "aspect_ratio"),
    ],
)
def test_what_a_pool_refuses_is_not_measured(monkeypatch, change, limits, reason):
    monkeypatch.setattr("embedding.measures.measure", None)
    found = scan_image(encoded(photographs()[0])[change], *limits, ("blur",))
    assert isinstance(found, BadImage) and found.reason == reason
