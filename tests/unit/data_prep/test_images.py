"""data_prep/images.py against pictures whose right pixels are known, and against damaged, hostile and extreme files."""

import io
import pickle
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from data_prep.images import MAX_PIXELS, UNUSABLE_REASONS, Unusable, decode, resize_and_crop, to_array

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
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{reason}"' in source for reason in UNUSABLE_REASONS)


# --------------------------------------------------------------------------------------------------- resize and crop


@pytest.mark.parametrize("size", [(256, 256), (257, 256), (256, 301), (1000, 256)])
def test_a_side_that_fits_is_cropped_and_not_interpolated(size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    left, top = (size[0] - 256) // 2, (size[1] - 256) // 2
    expected = pixels(noise)[top : top + 256, left : left + 256]
    assert np.array_equal(pixels(resize_and_crop(noise, 256)), expected)


@pytest.mark.parametrize("size", [(96, 64), (65, 333), (641, 480), (64, 64), (1000, 700)])
def test_it_is_a_resize_and_a_centre_crop(size: tuple[int, int]) -> None:
    """Against the two steps one after the other, on a scale where no rounding of the longer side shows."""
    image = colourful(*size)
    found = resize_and_crop(image, 32)
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
        inner = pixels(resize_and_crop(board, 200))[5:-5, 5:-5]
        assert np.abs(inner - 127.5).max() <= 3


def test_the_speed_up_changes_little() -> None:
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((2400, 1800))
    plain = rough.resize((256, 256), Image.Resampling.LANCZOS, box=(300, 0, 2100, 1800))
    assert np.abs(pixels(resize_and_crop(rough, 256)) - pixels(plain)).max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (255, 256), (10_000, 255)])
def test_too_small(size: tuple[int, int]) -> None:
    with pytest.raises(Unusable) as caught:
        resize_and_crop(Image.new("RGB", size), 256)
    assert caught.value.reason == "too_small"


def test_extremes() -> None:
    assert decode(encode(Image.new("RGB", (1, 1), "red"))).size == (1, 1)
    assert resize_and_crop(Image.new("RGB", (1, 1), "red"), 1).getpixel((0, 0)) == (255, 0, 0)
    wide = decode(encode(Image.new("RGB", (10_000, 300), "red"), "JPEG"))
    assert resize_and_crop(wide, 256).size == (256, 256)
    assert resize_and_crop(wide.transpose(Image.Transpose.ROTATE_90), 256).size == (256, 256)


# ------------------------------------------------------------------------------------------------------------- array


def test_to_array() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (255, 51, 0))
    array = to_array(image)
    assert (array.shape, array.dtype, array.flags["C_CONTIGUOUS"]) == ((3, 2, 3), np.float32, True)
    assert array[:, 1, 2].tolist() == pytest.approx([1.0, -0.6, -1.0])
    assert array[0, 1, 2] == 1.0
    assert (array[:, 0] == -1.0).all()


def test_all_values_survive_the_way_back() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    back = np.rint((to_array(ramp) + 1) * 127.5).astype(int)
    assert np.array_equal(back.transpose(1, 2, 0), pixels(ramp))
