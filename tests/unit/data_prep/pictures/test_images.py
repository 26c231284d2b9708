"""data_prep/pictures/images.py against pictures whose right pixels are known, and against damaged, hostile and extreme files."""

import io
import pickle
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from data_prep.encoders import DOWNSAMPLE
from data_prep.pictures.images import (
    BUCKET_STEP,
    BUCKETS,
    MAX_PIXELS,
    UNUSABLE_REASONS,
    Cut,
    Unusable,
    bucket_of,
    cut,
    decode,
    resize_and_crop,
    shape_of,
)

pytestmark = pytest.mark.timeout(120)

ORIENTATION = 0x0112


def encode(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def colourful(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture without symmetry: JPEG keeps it nearly, and every turn of it differs."""
    y, x = np.mgrid[0:height, 0:width]
    red, green, blue = x / width, y / height, (x + 2 * y) / (width + 2 * height)
    return Image.fromarray((np.stack([red, green, blue], axis=-1) * 255).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png_of(width: int, height: int, bits: int, colour_type: int, *chunks: bytes, data: bytes = b"") -> bytes:
    """A PNG chunk by chunk: IHDR, the given chunks, IDAT of `data`."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def reason_of(data: bytes, **options: int) -> str:
    with pytest.raises(Unusable) as caught:
        decode(data, **options)
    assert caught.value.reason in UNUSABLE_REASONS
    return caught.value.reason


# ------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(("fmt", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_come_back_exactly(fmt: str, options: dict) -> None:
    image = decode(encode(colourful(), fmt, **options))
    assert (image.mode, image.info) == ("RGB", {})
    assert np.array_equal(pixels(image), pixels(colourful()))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg(options: dict) -> None:
    image = decode(encode(colourful(), "JPEG", quality=95, **options))
    assert np.abs(pixels(image) - pixels(colourful())).max() <= 8


def test_grey_and_black_and_white() -> None:
    grey = colourful().convert("L")
    assert np.array_equal(pixels(decode(encode(grey))), pixels(grey.convert("RGB")))
    black_white = grey.convert("1")
    assert np.array_equal(pixels(decode(encode(black_white))), pixels(black_white.convert("RGB")))


def test_palette() -> None:
    palette = colourful().quantize(16)
    assert np.array_equal(pixels(decode(encode(palette))), pixels(palette.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65278, 65535]], dtype=np.uint16)
    image = decode(encode(Image.fromarray(values)))
    assert np.array_equal(pixels(image)[..., 0], np.rint(values / 257).astype(int))


def test_sixteen_bit_colour() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 32896, 0, 257, 257, 65535)
    image = decode(png_of(2, 1, 16, 2, data=row))
    assert pixels(image).tolist() == [[[255, 128, 0], [1, 1, 255]]]


def test_sixteen_bit_grey_with_alpha() -> None:
    row = b"\0" + struct.pack(">4H", 0, 65535, 0, 0)
    assert pixels(decode(png_of(2, 1, 16, 4, data=row)))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("cmyk", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
def test_cmyk_jpeg(cmyk: tuple[int, ...]) -> None:
    """Ink on paper: what is not inked is white. Adobe's inverted storing is undone."""
    cyan, magenta, yellow, black = cmyk
    expected = [(255 - ink) * (255 - black) // 255 for ink in (cyan, magenta, yellow)]
    image = decode(encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=95))
    assert np.abs(pixels(image) - expected).max() <= 4


# ------------------------------------------------------------------------------------------------------ transparency


def test_transparency_is_laid_over_white() -> None:
    rgba = Image.new("RGBA", (4, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128), (0, 0, 255, 51)])
    for data in (encode(rgba), encode(rgba, "WEBP", lossless=True, exact=True)):
        expected = [[255, 0, 0], [255, 255, 255], [127, 127, 127], [204, 204, 255]]
        assert np.abs(pixels(decode(data))[0] - expected).max() <= 1


def test_transparent_grey() -> None:
    grey = Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    assert pixels(decode(encode(grey)))[0].tolist() == [[10] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_one_colour_declared_transparent(mode: str) -> None:
    image = Image.new("RGB", (2, 1))
    image.putdata([(0, 0, 0), (255, 255, 255)])
    transparent: object = (0, 0, 0) if mode == "RGB" else 0
    assert pixels(decode(encode(image.convert(mode), transparency=transparent))).min() == 255
    assert pixels(decode(encode(image.convert(mode)))).min() == 0


def test_sixteen_bit_grey_with_one_value_declared_transparent() -> None:
    values = np.array([[0, 1000, 1001]], dtype=np.uint16)
    image = decode(encode(Image.fromarray(values), transparency=1000))
    assert pixels(image)[0, :, 0].tolist() == [0, 255, 4]


def test_sixteen_bit_colour_with_one_colour_declared_transparent() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 65535, 0)
    image = decode(png_of(2, 1, 16, 2, chunk(b"tRNS", struct.pack(">3H", 65535, 0, 0)), data=row))
    assert pixels(image)[0, 1].tolist() == [0, 255, 0]


def test_palette_with_transparent_entries() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert pixels(decode(encode(image, transparency=1)))[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    data = encode(image, transparency=bytes([255, 51, 0]))
    assert pixels(decode(data))[0].tolist() == [[255, 0, 0], [204, 255, 204], [255, 255, 255]]


# ------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_once(fmt: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(colourful(), fmt, exif=exif, **({} if fmt == "PNG" else {"quality": 100}))
    image = decode(data)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert image.size == ((64, 48) if orientation < 5 else (48, 64))
    assert np.array_equal(pixels(image), pixels(reference))
    assert image.getexif() == {}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"", b"junk", b"Exif\0\0", b"Exif\0\0junk" * 9, b"Exif\0\0MM\0\x2a\xff\xff\xff\xff"])
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(fmt: str, exif: bytes) -> None:
    assert decode(encode(colourful(), fmt, exif=exif)).size == (64, 48)


@pytest.mark.parametrize("kind", [b"\0\2\0\0\0\4six\0", b"\0\7\0\0\0\4\6\6\6\6", b"\0\3\0\0\0\1\0\0\0\0"])
@pytest.mark.parametrize("value", [0, 9, 60_000])
def test_orientations_that_do_not_exist(kind: bytes, value: int) -> None:
    """As a text, as bytes, and as numbers out of range."""
    exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\1" + struct.pack(">H", ORIENTATION) + kind + bytes(4)
    assert decode(encode(colourful(), "PNG", exif=exif)).size == (64, 48)
    exif = Image.Exif()
    exif[ORIENTATION] = value
    assert decode(encode(colourful(), "PNG", exif=exif)).size == (64, 48)


# --------------------------------------------------------------------------------------------------- colour profiles


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """sRGB with the names of its red and green primaries exchanged: valid, and unmistakable."""
    profile = srgb_profile().replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ")
    return profile.replace(b"tmpX", b"gXYZ")


D50 = (63190, 65536, 54061)  # the white of profiles, in 1/65536


def linear_grey_profile() -> bytes:
    """A grey profile of gamma 1, tag by tag: white point and tone curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", *D50)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = struct.pack(">I", 2) + b"wtpt" + struct.pack(">2I", 156, 20) + b"kTRC" + struct.pack(">2I", 176, 12)
    header = struct.pack(">I4sI4s4s4s12x4s28x3i", 188, b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp", *D50)
    return header.ljust(128, b"\0") + tags + white + curve


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_profile_is_converted(mode: str) -> None:
    """Half of the light is 188 in sRGB's curve."""
    grey = Image.new("L", (2, 2), 128).convert(mode)
    assert np.abs(pixels(decode(encode(grey, icc_profile=linear_grey_profile()))) - 188).max() <= 1


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_a_profile_is_converted(fmt: str) -> None:
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    options = {"lossless": True} if fmt == "WEBP" else {"quality": 100}
    image = decode(encode(red, fmt, icc_profile=swapped_profile(), **options))
    assert np.abs(pixels(image) - [0, 255, 0]).max() <= 3
    assert "icc_profile" not in image.info


def test_a_profile_is_converted_below_transparency() -> None:
    half_red = Image.new("RGBA", (2, 2), (255, 0, 0, 127))
    image = decode(encode(half_red, icc_profile=swapped_profile()))
    assert np.abs(pixels(image) - [128, 255, 128]).max() <= 2


def test_srgb_changes_nothing() -> None:
    image = decode(encode(colourful(), icc_profile=srgb_profile()))
    assert np.abs(pixels(image) - pixels(colourful())).max() <= 1


@pytest.mark.parametrize("profile", [b"junk", b"\0" * 200, srgb_profile()[:300], srgb_profile()[:-40]])
def test_a_broken_profile_is_ignored(profile: bytes) -> None:
    image = decode(encode(colourful(), icc_profile=profile))
    assert np.abs(pixels(image) - pixels(colourful())).max() <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_profile_of_another_mode_is_ignored(mode: str) -> None:
    image = colourful().convert(mode)
    with_profile = decode(encode(image, "JPEG", icc_profile=swapped_profile()))
    assert np.array_equal(pixels(with_profile), pixels(decode(encode(image, "JPEG"))))


# ------------------------------------------------------------------------------------------------ damaged and hostile


FILES = {
    "jpeg": encode(colourful(), "JPEG", icc_profile=srgb_profile()),
    "progressive": encode(colourful(), "JPEG", progressive=True),
    "png": encode(colourful()),
    "palette": encode(colourful().quantize(16)),
    "webp": encode(colourful(), "WEBP"),
    "lossless webp": encode(colourful(), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FILES)
def test_truncated_files(name: str) -> None:
    """At every length. A PNG has all of its pixels before its last 22 bytes (checksums and the end mark)."""
    data = FILES[name]
    spare = 22 if data.startswith(b"\x89PNG") else 0
    for length in range(len(data) - spare):
        assert reason_of(data[:length]) == "broken_image", length
    decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>404</body></html>",
        b"\0" * 100,
        encode(colourful(), "GIF"),
        encode(colourful(), "TIFF"),
        encode(colourful(), "BMP"),
        encode(colourful(), "JPEG2000"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF\x24\0\0\0WAVEfmt ",
    ],
)
def test_other_formats(data: bytes) -> None:
    assert reason_of(data) == "unsupported_format"


def test_nothing() -> None:
    assert reason_of(b"") == "broken_image"


@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (MAX_PIXELS + 1, 1)])
def test_a_pixel_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    data = png_of(*size, 8, 2)
    assert len(data) < 100
    tracemalloc.start()
    assert reason_of(data) == "too_large"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert reason_of(png_of(10_000, 10_000, 8, 2), max_pixels=10**8 - 1) == "too_large"
    assert reason_of(encode(colourful(), "JPEG"), max_pixels=64 * 48 - 1) == "too_large"


def test_the_limit_itself_is_allowed() -> None:
    assert decode(encode(colourful()), max_pixels=64 * 48).size == (64, 48)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pillows_warning_made_an_error_is_too_large() -> None:
    assert reason_of(png_of(10_000, 10_000, 8, 2)) == "too_large"


def test_a_text_bomb_in_a_png() -> None:
    bomb = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(100 * 2**20)))
    assert reason_of(png_of(1, 1, 8, 0, bomb, data=b"\0\0")) == "broken_image"
    profile_bomb = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(100 * 2**20)))
    assert reason_of(png_of(1, 1, 8, 0, profile_bomb, data=b"\0\0")) == "broken_image"


@pytest.mark.parametrize("fmt", ["PNG", "WEBP"])
def test_animations_are_dropped(fmt: str) -> None:
    other = Image.new("RGB", (64, 48), "red")
    assert reason_of(encode(colourful(), fmt, save_all=True, append_images=[other], duration=100)) == "animated"


def test_a_phones_jpeg_with_a_second_picture_is_its_first() -> None:
    data = encode(colourful(), "MPO", quality=95, save_all=True, append_images=[Image.new("RGB", (64, 48), "red")])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(pixels(decode(data)) - pixels(colourful())).max() <= 8


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_fuzz(name: str) -> None:
    """Random damage gives a picture of some size or `Unusable`, and nothing else."""
    rng = random.Random(name)
    outcomes = {"decoded": 0, "dropped": 0}
    for _ in range(150):
        data = bytearray(FILES[name])
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            data[rng.randrange(len(data) if rng.random() < 0.5 else min(200, len(data)))] = rng.randrange(256)
        try:
            outcome = decode(bytes(data), max_pixels=10**7).mode
        except Unusable as error:
            outcome = error.reason
        assert outcome in ("RGB", *UNUSABLE_REASONS)
        outcomes["decoded" if outcome == "RGB" else "dropped"] += 1
    assert min(outcomes.values()) > 0


def test_running_out_of_memory_is_no_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        decode(encode(colourful()))


def test_unusable_crosses_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Unusable("too_small", "1 × 1")))
    assert (error.reason, error.detail, str(error)) == ("too_small", "1 × 1", "too_small: 1 × 1")


def test_every_reason_is_tested() -> None:
    source = "".join(Path(__file__).with_name(f"test_{name}.py").read_text("utf-8") for name in ("images", "decoders"))
    assert all(f'"{reason}"' in source for reason in UNUSABLE_REASONS)


# --------------------------------------------------------------------------------------------------- resize and crop


@pytest.mark.parametrize("size", [(256, 256), (257, 256), (256, 301), (1000, 256)])
def test_a_side_that_fits_is_cropped_and_not_interpolated(size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    left, top = (size[0] - 256) // 2, (size[1] - 256) // 2
    expected = pixels(noise)[top : top + 256, left : left + 256]
    assert np.array_equal(pixels(resize_and_crop(noise, 256, 256)), expected)


@pytest.mark.parametrize("size", [(96, 64), (65, 333), (641, 480), (64, 64), (1000, 700)])
def test_it_is_a_resize_and_a_centre_crop(size: tuple[int, int]) -> None:
    """Against the two steps one after the other, on a scale where no rounding of the longer side shows."""
    image = colourful(*size)
    found = resize_and_crop(image, 32, 32)
    scale = 32 / min(size)
    scaled = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS)
    left, top = (scaled.width - 32) // 2, (scaled.height - 32) // 2
    expected = scaled.crop((left, top, left + 32, top + 32))
    assert found.size == (32, 32)
    assert np.abs(pixels(found) - pixels(expected)).max() <= 5


def test_it_does_not_alias() -> None:
    """A board of single pixels is grey from afar, also where the speed-up averages blocks first."""
    for side in (512, 2048):
        board = Image.fromarray((np.indices((side, side)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
        inner = pixels(resize_and_crop(board, 200, 200))[5:-5, 5:-5]
        assert np.abs(inner - 127.5).max() <= 3


def test_the_speed_up_changes_little() -> None:
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((2400, 1800))
    plain = rough.resize((256, 256), Image.Resampling.LANCZOS, box=(300, 0, 2100, 1800))
    assert np.abs(pixels(resize_and_crop(rough, 256, 256)) - pixels(plain)).max() <= 4


@pytest.mark.parametrize("size", [(512, 256), (514, 257), (700, 256), (512, 900), (5000, 256)])
def test_a_rectangle_that_fits_is_cropped_and_not_interpolated(size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    left, top = (size[0] - 512) // 2, (size[1] - 256) // 2
    found = resize_and_crop(noise, 256, 512)
    assert found.size == (512, 256)
    if size != (514, 257):  # this one fits in its aspect ratio, and is made smaller
        assert np.array_equal(pixels(found), pixels(noise)[top : top + 256, left : left + 512])


@pytest.mark.parametrize("size", [(960, 640), (650, 999), (640, 480), (1000, 300)])
def test_a_rectangle_is_the_largest_in_the_centre(size: tuple[int, int]) -> None:
    """The picture tells by its colours which part of it is seen: red is x, green is y."""
    found = pixels(resize_and_crop(colourful(*size), 48, 96)) / 255
    scale = min(size[0] / 96, size[1] / 48)
    for colour, axis, (side, wanted) in ((0, 1, (size[0], 96)), (1, 0, (size[1], 48))):
        share = wanted * scale / side  # how much of this side is kept
        expected = (1 - share) / 2 + share * (np.arange(wanted) + 0.5) / wanted
        assert np.abs(found[..., colour].mean(axis=1 - axis) - expected).max() < 0.01


@pytest.mark.parametrize("size", [(1, 1), (255, 256), (10_000, 255)])
def test_too_small(size: tuple[int, int]) -> None:
    with pytest.raises(Unusable) as caught:
        resize_and_crop(Image.new("RGB", size), 256, 256)
    assert caught.value.reason == "too_small"
    resize_and_crop(Image.new("RGB", (320, 208)), 208, 320)
    for smaller in ((319, 1000), (1000, 207)):
        with pytest.raises(Unusable, match="below 320 × 208"):
            resize_and_crop(Image.new("RGB", smaller), 208, 320)


def test_extremes() -> None:
    assert decode(encode(Image.new("RGB", (1, 1), "red"))).size == (1, 1)
    assert resize_and_crop(Image.new("RGB", (1, 1), "red"), 1, 1).getpixel((0, 0)) == (255, 0, 0)
    wide = decode(encode(Image.new("RGB", (10_000, 300), "red"), "JPEG"))
    assert resize_and_crop(wide, 256, 256).size == (256, 256)
    assert resize_and_crop(wide.transpose(Image.Transpose.ROTATE_90), 256, 256).size == (256, 256)


# ----------------------------------------------------------------------------------------------------------- buckets


def test_buckets() -> None:
    assert len(set(BUCKETS)) == len(BUCKETS) == 13
    assert {(columns, rows) for rows, columns in BUCKETS} == set(BUCKETS)
    assert all(abs(rows * columns / 256 - 1) <= 0.025 for rows, columns in BUCKETS)
    assert shape_of((13, 20), 256) == (208, 320)
    assert shape_of((26, 10), 512) == (832, 320)


def test_a_sixteenth_of_a_bucket_holds_whole_tokens() -> None:
    """The file imports no torch, and so cannot take the factor from the encoders."""
    assert BUCKET_STEP == 16 * DOWNSAMPLE * 2  # latents of a token at a patch of 2


def test_every_bucket_is_its_own_nearest() -> None:
    for rows, columns in BUCKETS:
        assert bucket_of(columns * 100, rows * 100) == (rows, columns)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), (16, 16)),
        ((1064, 1000), (16, 16)),  # the border to 15 × 17 is at the root of 17/15, 1.0646
        ((1066, 1000), (15, 17)),
        ((4000, 3000), (14, 18)),
        ((3000, 4000), (18, 14)),
        ((3000, 2000), (13, 20)),
        ((1920, 1080), (12, 21)),
        ((1080, 1920), (21, 12)),
        ((10_000, 100), (10, 26)),
        ((100, 10_000), (26, 10)),
    ],
)
def test_bucket_of(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert bucket_of(*size) == bucket


# --------------------------------------------------------------------------------------------------------------- cut


def photo(width: int, height: int, **options: object) -> bytes:
    """A photograph in a large JPEG."""
    with Image.open(get_sample_data("grace_hopper.jpg")) as image:
        scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    return encode(scaled, "JPEG", quality=90, **options)


def without_draft(data: bytes, monkeypatch: pytest.MonkeyPatch, buckets: bool = False) -> Cut:
    with monkeypatch.context() as patch:
        patch.setattr(JpegImageFile, "draft", lambda *_: None)
        return cut(data, (256, 512), buckets)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(700, 600), (512, 900), (511, 700)])
def test_cut_is_decode_and_resize_and_crop(fmt: str, size: tuple[int, int]) -> None:
    data = encode(colourful(*size), fmt)
    found = cut(data, (256, 512))
    assert (found.width, found.height, found.bucket) == (*size, None)
    assert sorted(found.pictures) == [256, 512][: 2 if min(size) >= 512 else 1]
    for resolution, picture in found.pictures.items():
        assert (picture.dtype, picture.flags.writeable, picture.flags.c_contiguous) == (np.uint8, True, True)
        assert np.array_equal(picture, np.asarray(resize_and_crop(decode(data), resolution, resolution)))


def test_cut_to_buckets() -> None:
    data = encode(colourful(750, 500))
    found = cut(data, (256, 512), buckets=True)
    assert (found.width, found.height, found.bucket) == (750, 500, (13, 20))
    for resolution, shape in ((256, (208, 320)), (512, (416, 640))):
        assert np.array_equal(found.pictures[resolution], np.asarray(resize_and_crop(decode(data), *shape)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1200, 800), (2601, 1735)])
def test_cut_turns_as_decode_does(size: tuple[int, int], orientation: int) -> None:
    """Also a draft, whose sides are no multiples of the picture's: 2601 and 1735 are odd."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = photo(*size, exif=exif)
    upright = decode(data)
    found = cut(data, (256, 512), buckets=True)
    assert (found.width, found.height) == upright.size == (size if orientation < 5 else size[::-1])
    assert found.bucket == bucket_of(*upright.size) == ((13, 20) if orientation < 5 else (20, 13))
    assert sorted(found.pictures) == [256, 512]
    for resolution, picture in found.pictures.items():
        expected = pixels(resize_and_crop(upright, *shape_of(found.bucket, resolution)))
        assert picture.shape == expected.shape
        assert np.abs(picture - expected).mean() < 0.8


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes at which libjpeg was told to decode."""
    sizes = []
    real = JpegImageFile.draft

    def draft(image: JpegImageFile, *args: object) -> object:
        result = real(image, *args)
        sizes.append(image.size)
        return result

    monkeypatch.setattr(JpegImageFile, "draft", draft)
    return sizes


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize(
    ("size", "decoded"), [((2101, 2500), (1051, 1250)), ((4107, 4800), (1027, 1200)), ((6000, 2049), (3000, 1025))]
)
def test_a_draft_is_nearly_the_whole_picture(
    size: tuple[int, int], decoded: tuple[int, int], options: dict, decoded_sizes: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = photo(*size, **options)
    for buckets in (False, True):
        found = cut(data, (256, 512), buckets)
        whole = without_draft(data, monkeypatch, buckets)
        assert (found.width, found.height, found.bucket) == (*size, whole.bucket)
        assert list(found.pictures) == list(whole.pictures) == [256, 512]
        for resolution, picture in found.pictures.items():
            difference = np.abs(picture.astype(int) - whole.pictures[resolution])
            assert difference.mean() < 0.5
            assert difference.max() < 25
    assert decoded_sizes[0] == decoded


@pytest.mark.parametrize("size", [(512, 5000), (1023, 1023), (2047, 3000), (3000, 2047)])
def test_a_draft_keeps_twice_the_largest_cut(size: tuple[int, int], decoded_sizes: list) -> None:
    """Else the picture is decoded whole, and its cuts are exact."""
    data = photo(*size)
    found = cut(data, (512, 256))
    assert decoded_sizes == [size]
    for resolution in (256, 512):
        expected = resize_and_crop(decode(data), resolution, resolution)
        assert np.array_equal(found.pictures[resolution], np.asarray(expected))


@pytest.mark.parametrize(("resolutions", "scale"), [((256,), 8), ((256, 512), 4), ((1024, 256), 2), ((256, 2048), 1)])
def test_a_draft_of_every_scale(resolutions: tuple[int, ...], scale: int, decoded_sizes: list) -> None:
    found = cut(photo(4096, 4100), resolutions)
    assert sorted(found.pictures) == sorted(resolutions)
    assert decoded_sizes == [(4096 // scale, -(-4100 // scale))]


@pytest.mark.parametrize("mode", ["L", "CMYK", "MPO"])
def test_a_draft_of_other_jpegs(mode: str, decoded_sizes: list, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(io.BytesIO(photo(1400, 1200)))
    if mode == "MPO":
        other = Image.new("RGB", (64, 48), "red")
        data = encode(image, "MPO", quality=95, save_all=True, append_images=[other])
    else:
        data = encode(image.convert(mode), "JPEG", quality=95)
    found, whole = cut(data, (256,)), without_draft(data, monkeypatch)
    assert decoded_sizes == [(700, 600)]
    assert np.abs(found.pictures[256].astype(int) - whole.pictures[256]).mean() < 0.5


def test_a_truncated_draft_is_broken(decoded_sizes: list) -> None:
    data = photo(2100, 2500)
    for length in (2000, len(data) // 2, len(data) - 100):
        with pytest.raises(Unusable) as caught:
            cut(data[:length], (256, 512))
        assert caught.value.reason == "broken_image"
    assert set(decoded_sizes) == {(1050, 1250)}


def test_what_the_header_tells_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for size, buckets in (((600, 255), False), ((255, 256), True)):
        with pytest.raises(Unusable, match=f"{size[0]} × {size[1]} pixels, for a resolution of 256") as caught:
            cut(encode(colourful(*size), "JPEG"), (512, 256), buckets)
        assert caught.value.reason == "too_small"
    with pytest.raises(Unusable) as caught:
        cut(encode(colourful(600, 600)), (256,), max_pixels=600 * 600 - 1)
    assert caught.value.reason == "too_large"


def test_a_bucket_needs_fewer_rows_than_a_square() -> None:
    """208 of them at 13 × 20, and more columns."""
    assert cut(encode(colourful(320, 208)), (256,), buckets=True).pictures[256].shape == (208, 320, 3)
    for size in ((319, 208), (321, 207)):
        with pytest.raises(Unusable, match="too_small"):
            cut(encode(colourful(*size)), (256,), buckets=True)
