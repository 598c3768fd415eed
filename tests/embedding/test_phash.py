"""The hash against PDQ's formula written out, what copies and other pictures differ in, and pictures without detail."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from embedding.backbone import load_backbone
from embedding.decode import decode_reduced, decode_rgb
from embedding.embed import embed_images
from embedding.known_copies import TRANSFORMS, known_copies
from embedding.phash import LEAST_SPREAD, PHASH_LEAST_SIDE, phash_bits, phash_input, phash_vectors

CHINA, FLOWER = (np.ascontiguousarray(x) for x in load_sample_images().images)  # 427 x 640
# By pdqhash 0.2.8, the binding of Meta's C++, with quality 100: pdqhash.compute(CHINA), its bits turned round.
PDQ = {
    "china": "70afd5ea8fc08c1efa3576204b3a711966028bec98dcc1671e617e02cf7318fd",
    "flower": "c96571a7cd24669a9a659269d84599a6e29569866659659926654eed3b669ce6",
}


def bits_of(image: np.ndarray) -> np.ndarray:
    return phash_bits(phash_input(image)[None])[0]


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int((a != b).sum())


def pdq_points(image: np.ndarray) -> np.ndarray:
    """PDQ's 64 x 64 picture: two running means in each direction, then a pixel of every cell."""

    def running_mean(x: np.ndarray) -> np.ndarray:
        width = -(-len(x) // 128)
        ahead = (width + 2) // 2
        return np.array([x[max(0, i + ahead - width) : i + ahead].mean(axis=0) for i in range(len(x))])

    grey = image @ np.array([0.299, 0.587, 0.114])
    for _ in range(2):
        grey = running_mean(running_mean(grey).T).T
    rows, columns = (((np.arange(64) + 0.5) * n / 64).astype(int) for n in grey.shape)
    return grey[np.ix_(rows, columns)]


def pdq_bits(points: np.ndarray) -> np.ndarray:
    """A double sum for every frequency, and the 128 that are above the others."""
    waves = np.array([[np.cos(np.pi / 128 * (k + 1) * (2 * i + 1)) for i in range(64)] for k in range(16)])
    terms = np.einsum("ki,ij,lj->kl", waves, points, waves).ravel()
    bits = np.zeros(256, bool)
    bits[np.argsort(terms)[128:]] = True
    return bits


def waves(seed: int, n: int = 1, side: tuple[int, int] = (240, 320)) -> list[np.ndarray]:
    """Pictures with the spectrum of photographs."""
    rng = np.random.default_rng(seed)
    y, x = (np.fft.fftfreq(m)[:, None] * m for m in side)
    fall = 1 / np.maximum(np.hypot(y, x.T), 1)
    found = []
    for _ in range(n):
        field = np.fft.ifft2(np.fft.fft2(rng.normal(size=side)) * fall).real
        found.append(np.repeat(np.clip(128 + 45 * field / field.std(), 0, 255).astype("u1")[:, :, None], 3, axis=2))
    return found


def encoded(image: np.ndarray, kind: str = "PNG", **settings) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **settings)
    return out.getvalue()


@pytest.mark.parametrize(("name", "image"), [("china", CHINA), ("flower", FLOWER)])
def test_the_formula_of_this_test_is_pdq(name, image):
    assert np.packbits(pdq_bits(pdq_points(image))).tobytes().hex() == PDQ[name]


@pytest.mark.parametrize("image", [CHINA, FLOWER, CHINA[:300, :400], FLOWER[:, ::-1], *waves(0, 4)])
def test_bits_are_near_those_of_pdq(image):
    """Its makers take 10 bits for the same hash of another decoder; a shift of a pixel is a few more."""
    assert distance(bits_of(image), pdq_bits(pdq_points(image))) <= 16


@pytest.mark.parametrize("factor", [1, 3])
def test_bits_are_those_of_the_formula_on_the_points(factor):
    """Where cells are whole pixels and the tent is one of them, or weights them 1 2 3 2 1... of an odd cell."""
    small = np.random.default_rng(factor).integers(0, 256, (64 * factor, 64 * factor), np.uint8)
    at = phash_input(np.repeat(small[:, :, None], 3, axis=2))
    if factor == 1:
        np.testing.assert_array_equal(at, small)
    else:  # a tent of 3 pixels in all, about the middle one: it takes 1/9, 7/9, 1/9 of them by its height at each
        tent = np.maximum(0, 1 - np.abs(np.arange(3) - 1) / 1.5)
        rows = np.einsum("ikj,k->ij", small.reshape(64, 3, 192), tent / tent.sum())
        np.testing.assert_allclose(at, np.einsum("ijk,k->ij", rows.reshape(64, 64, 3), tent / tent.sum()), atol=1.01)
    assert distance(phash_bits(at[None])[0], pdq_bits(at.astype(float))) == 0


def test_vectors_are_exact_and_their_cosine_tells_the_distance():
    images = [CHINA, FLOWER, *waves(1, 5)]
    inputs = np.stack([phash_input(image) for image in images])
    x, bits = phash_vectors(inputs), phash_bits(inputs)
    assert (x.dtype, x.shape) == (np.float32, (7, 256)) and set(np.unique(np.abs(x))) == {1 / 16}
    stored = x.astype(np.float16).astype(np.float32)
    expected = [[1 - distance(a, b) / 128 for b in bits] for a in bits]
    np.testing.assert_array_equal(stored @ stored.T, expected)
    np.testing.assert_array_equal(phash_bits(inputs[2:3]), bits[2:3])  # a picture does not hang on its neighbours
    assert phash_vectors(inputs[:0]).shape == (0, 256)


def test_the_backbone():
    backbone = load_backbone("phash")
    images = [CHINA, FLOWER]
    np.testing.assert_array_equal(backbone.embed(images), phash_vectors(np.stack([*map(phash_input, images)])))
    assert (backbone.width, backbone.identity["name"], backbone.patches) == (256, "phash", None)
    assert backbone.identity == load_backbone("phash").identity != load_backbone("pixels").identity
    found = embed_images(backbone, [encoded(CHINA), b"bad", encoded(FLOWER)])
    np.testing.assert_array_equal(found.embeddings, backbone.embed(images))
    assert found.good.tolist() == [0, 2] and list(found.bad) == [1]


@pytest.mark.parametrize("image", [CHINA, FLOWER, *waves(2, 2)])
def test_copies_differ_in_few_bits_and_mirrored_or_cut_ones_in_many(image):
    bits = bits_of(image)
    files = dict(zip(TRANSFORMS, known_copies(encoded(image), 0, 0, 10**7), strict=True))
    far = {name: distance(bits, bits_of(decode_rgb(file))) for name, file in files.items()}
    assert max(far[name] for name in ("jpeg", "webp", "half", "larger")) <= 12
    assert max(far[name] for name in ("blur", "light", "colour")) <= 31
    assert min(far[name] for name in ("flip", "crop", "caption")) > 80


@pytest.mark.parametrize("share", [0.5, 0.3, 0.21])
def test_size_changes_hardly_a_bit(share):
    """PDQ's formula changes 12 to 30 of them: the reason why the tent is centred."""
    for image in (CHINA, FLOWER):
        height, width = (round(n * share) for n in image.shape[:2])
        small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
        here, theirs = (distance(*(of(x) for x in (image, small)))
                        for of in (bits_of, lambda x: pdq_bits(pdq_points(x))))  # fmt: skip
        assert here <= 8 and here < theirs


def test_mirroring_changes_the_sign_of_every_other_column():
    """So the tent is centred: bits of odd frequencies turn round, but for terms at the median."""
    for image in (CHINA, FLOWER, *waves(3, 2)):
        bits, other = bits_of(image).reshape(16, 16), bits_of(image[:, ::-1]).reshape(16, 16)
        assert distance(bits[:, 1::2], other[:, 1::2]) <= 10
        assert distance(bits[:, ::2], ~other[:, ::2]) <= 10


def test_other_pictures_differ_in_half_of_the_bits():
    bits = np.stack([bits_of(image) for image in [CHINA, FLOWER, *waves(4, 40)]])
    far = np.array([distance(a, b) for i, a in enumerate(bits) for b in bits[:i]])
    assert 124 < far.mean() < 132 and far.min() > 80
    assert (bits.sum(axis=1) == 128).all()


def plain(kind: str, tone: int, size: tuple[int, int] = (90, 120)) -> np.ndarray:
    """A picture all of whose coefficients are zero or rounding."""
    y, x = np.mgrid[: size[0], : size[1]]
    grey = {
        "one tone": tone + 0 * x,
        "sky": tone + 60 * y // size[0],
        "stripes": tone + 80 * (x // (5 + tone % 7) % 2),
        "sum": tone + 60 * y // size[0] + 60 * x // size[1],
    }[kind]
    return np.repeat(grey.astype("u1")[:, :, None], 3, axis=2)


@pytest.mark.parametrize("kind", ["one tone", "sky", "stripes", "sum"])
def test_pictures_without_detail_are_copies_of_their_equals_alone(kind):
    """By the formula alone those of one kind would be copies of one another, or of anything."""
    tones = range(0, 120, 7)
    bits = np.stack([bits_of(plain(kind, tone)) for tone in tones])
    far = [distance(a, b) for i, a in enumerate(bits) for b in [*bits[:i], bits_of(CHINA), bits_of(FLOWER)]]
    assert min(far) > 80
    np.testing.assert_array_equal(bits, [bits_of(plain(kind, tone)) for tone in tones])
    if kind == "one tone":
        np.testing.assert_array_equal(bits, [bits_of(plain(kind, tone, (300, 41))) for tone in tones])


@pytest.mark.parametrize("image", [CHINA, FLOWER, *waves(5)])
def test_detail_ends_where_copies_are_no_longer_found(image):
    """Of a picture with less and less contrast, until rounding is all there is; then its bits are others at once."""
    deep = phash_input(image) - 128.0
    whole = phash_bits(phash_input(image)[None])[0]
    for spread in (16, 4, 2, 1.3, 0.7, 0.3):
        points = np.rint(128 + spread / spread_of(deep) * deep).astype("u1")
        far = distance(whole, phash_bits(points[None])[0])
        assert (spread_of(points) > LEAST_SPREAD) == (spread > 1)
        assert far <= 40 if spread > 1 else far > 80


def spread_of(points: np.ndarray) -> float:
    """Median distance of the coefficients of an orthonormal DCT from their median, grey levels."""
    terms = dctn(points.astype(float), norm="ortho")[1:17, 1:17].ravel()
    return float(np.median(np.abs(terms - np.median(terms))))


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (3, 2), (63, 65), (4000, 1)])
def test_every_size_has_a_hash(size):
    rng = np.random.default_rng(0)
    a, b = (bits_of(rng.integers(0, 256, (*size, 3), np.uint8)) for _ in range(2))
    assert a.shape == (256,) and distance(a, b) > 80


def test_arrays_that_are_no_images_are_refused():
    for image in (np.zeros((4, 4), "u1"), np.zeros((4, 4, 3), "f4"), np.zeros((0, 4, 3), "u1")):
        with pytest.raises(ValueError, match="an image must be uint8"):
            phash_input(image)


@pytest.mark.parametrize("times", [2, 4, 8])
def test_a_scaled_decoder_changes_hardly_a_bit(times):
    """At sizes just large enough to be decoded at 1 / times."""
    [image] = waves(6, side=(round(1.25 * 8 * PHASH_LEAST_SIDE) if times == 8 else 2 * times * PHASH_LEAST_SIDE, 1500))
    data = encoded(image, "JPEG", quality=92)
    reduced = decode_reduced(data, PHASH_LEAST_SIDE)
    assert reduced.pixels.shape[0] == -(-image.shape[0] // times)
    bits = [phash_bits(phash_input(x)[None])[0] for x in (decode_rgb(data), reduced)]
    assert distance(*bits) <= 4
