"""Decoding and cropping: the bytes of an image in, its pictures at the wanted resolutions out. Pure functions.

In the order of the code:

1. `Unusable`: an image that cannot be trained on, with a reason of the fixed set `UNUSABLE_REASONS`.
2. `decode`: bytes → upright 8-bit sRGB picture. Only JPEG, PNG and WebP are tried, by content and not by name. The
   size is judged by the header, before a pixel is decoded. Then all pixels are read (a truncated file is broken),
   16 bits become 8, the embedded colour profile is converted to sRGB, transparent pixels are laid over white, and the
   picture is turned as its EXIF says.
3. `bucket_of`: the one of a few fixed aspect ratios that is nearest to the picture's.
4. `resize_and_crop`: the largest centred part that has the wanted aspect ratio, at the wanted size.
5. `cut`: all of this together: bytes → a picture for each resolution that the image is large enough for. A large JPEG
   is decoded at a half, a quarter or an eighth of its size.

Shapes: H height, W width, 3 colours (red, green, blue). Sizes are in pixels; a (width, height) is Pillow's order, a
(height, width) or (rows, columns) that of arrays.

This file imports no torch: it is imported by the many child processes of `decoders.py`.
"""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageCms

# ---- 1. unusable images ----

UnusableReason = Literal[
    "unsupported_format",  # neither JPEG nor PNG nor WebP by its first bytes
    "broken_image",  # one of these, but damaged or truncated
    "too_large",  # more pixels than the limit, by the header: a decompression bomb
    "animated",  # an APNG or WebP of several frames: no caption says which of them it is about
    "too_small",  # a side is below the wanted size: nothing is ever scaled up
    "too_slow",  # decoding took more processor time than the limit
    "too_much_memory",  # decoding needed more than the limit
    "decoder_crashed",  # the process that decoded it died
]
UNUSABLE_REASONS: tuple[str, ...] = get_args(UnusableReason)

MAX_PIXELS = 178_956_970  # where Pillow itself refuses to open an image: a square of 13,377


class Unusable(ValueError):
    """Image that is dropped: `reason` is one of `UNUSABLE_REASONS`, `detail` is for people."""

    def __init__(self, reason: UnusableReason, detail: str) -> None:
        super().__init__(reason, detail)  # all arguments, so that it can be pickled
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


# ---- 2. decode ----


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the upright picture in `data`: mode RGB, 8 bits, sRGB, over white, without metadata.

    `max_pixels` limits width × height; above `MAX_PIXELS` it has no effect, as Pillow refuses such images itself.

    Raises `Unusable`: unsupported_format, broken_image, too_large, animated.
    """
    image = _open(data, max_pixels)
    rgb = _turned(_read_rgb(image), _orientation(image))
    rgb.info = {}  # profile and orientation are applied, and must not be applied again
    return rgb


def _may_be_supported(data: bytes) -> bool:
    """Returns whether the first bytes, if there are enough, are those of a JPEG, PNG or WebP."""
    first, without_size = data[:8], data[:4] + data[8:12]
    pairs = ((first, b"\xff\xd8\xff"), (first, b"\x89PNG\r\n\x1a\n"), (without_size, b"RIFFWEBP"))
    return any(head.startswith(magic) or magic.startswith(head) for head, magic in pairs)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Opens the only frame; reads its header but no pixels."""
    if not _may_be_supported(data):
        raise Unusable("unsupported_format", f"neither JPEG nor PNG nor WebP: starts with {data[:12]!r}")
    with _damage_is_unusable():
        image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
    width, height = image.size
    if width * height > max_pixels:
        raise Unusable("too_large", f"{width} × {height} pixels, limit {max_pixels}")
    # A JPEG is not asked: phones append further pictures (MPO), of which the first is the photograph.
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise Unusable("animated", f"{image.format} of several frames")
    return image


def _read_rgb(image: Image.Image) -> Image.Image:
    """Reads all pixels of an opened image in sRGB over white, in the file's own orientation."""
    with _damage_is_unusable():
        image.load()
    colour, alpha = _colour_and_alpha(image)
    rgb = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=alpha)
    return white


@contextmanager
def _damage_is_unusable() -> Iterator[None]:
    """Context that turns errors of Pillow into `Unusable`; Pillow promises no set of exceptions for damaged data.

    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error and IndexError are all known from it.
    """
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable("too_large", str(error)) from error
    except MemoryError:  # a matter of the machine and not of the image
        raise
    except Exception as error:
        words = re.sub(
            r" at 0x[0-9a-f]+", "", str(error)
        )  # Pillow names objects by their address, which differs in each run
        raise Unusable("broken_image", f"{type(error).__name__}: {words}") from error


def _colour_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Returns the colours in mode L, RGB or CMYK, 8 bits a channel, and the opacity in mode L (None: opaque)."""
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        values_HW = np.asarray(image).astype(np.uint32)
        colour = Image.fromarray(((values_HW * 255 + 32767) // 65535).astype(np.uint8))
        if "transparency" not in image.info:
            return colour, None
        opaque_HW = values_HW != image.info["transparency"]
        return colour, Image.fromarray(opaque_HW.astype(np.uint8) * 255)
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("RGB"), None


def _to_srgb(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts colours to sRGB. A profile that is damaged or made for another mode is ignored."""
    if not profile:
        return colour.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(source, target, colour.mode, "RGB")
    except (OSError, ValueError):
        return colour.convert("RGB")
    return transform.apply(colour)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSING = (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 (upright) to 8; 1 where the EXIF block is damaged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as for damaged pixels, Pillow promises no set of exceptions
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


# ---- 3. buckets ----

_WIDE = ((16, 16), (15, 17), (14, 18), (13, 20), (12, 21), (11, 23), (10, 26))
# Shapes of nearly one area, as (rows, columns) in sixteenths of the resolution; transposed ones after the wide ones.
BUCKETS: tuple[tuple[int, int], ...] = (*_WIDE, *((columns, rows) for rows, columns in _WIDE[1:]))
# A sixteenth of a resolution must hold whole tokens: 16 pixels, or 2 latent pixels.
BUCKET_STEP = 256


def bucket_of(width: int, height: int) -> tuple[int, int]:
    """Returns the bucket with the nearest aspect ratio, by the ratio of both; the same at every resolution."""
    return min(BUCKETS, key=lambda bucket: abs(math.log(width / height) - math.log(bucket[1] / bucket[0])))


def shape_of(bucket: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Returns (height, width) of a bucket's pictures."""
    assert resolution % BUCKET_STEP == 0, resolution
    return bucket[0] * resolution // 16, bucket[1] * resolution // 16


# ---- 4. resize and crop ----


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Returns the centre of `image` at [height, width]: one side is kept whole, the other cropped at both ends.

    The filter is Lanczos, which widens with the factor and so does not alias; from a factor of six on, Pillow first
    averages whole blocks (`reducing_gap`), which is faster and hardly differs from the plain filter.

    Raises `Unusable`: too_small.
    """
    return _resize(image, _centre(*image.size, height, width), height, width)


def _centre(image_width: int, image_height: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the largest centred box of the aspect ratio, in whole pixels, so that a side that fits is not interpolated."""
    if image_width < width or image_height < height:
        raise Unusable("too_small", f"{image_width} × {image_height} pixels, below {width} × {height}")
    box_width = min(image_width, round(image_height * width / height))
    box_height = min(image_height, round(image_width * height / width))
    left, top = (image_width - box_width) // 2, (image_height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _resize(image: Image.Image, box: tuple[float, float, float, float], height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


# ---- 5. cut ----


@dataclass(frozen=True)
class Cut:
    """Pictures cut from an image, with width, height and bucket of the upright picture in the file."""

    width: int
    height: int
    bucket: tuple[int, int] | None  # None: cut to squares
    pictures: dict[int, np.ndarray]  # by resolution: uint8 [H, W, 3]


def cut(data: bytes, resolutions: tuple[int, ...], buckets: bool = False, max_pixels: int = MAX_PIXELS) -> Cut:
    """Decodes the picture in `data` and cuts it at each resolution that it is large enough for, to a square or its bucket.

    Raises `Unusable`: as `decode`, and too_small by the header, where it is too small for all of them.
    """
    image = _open(data, max_pixels)
    # Turning comes last, and transposes size, bucket and shapes alike.
    width, height = image.size
    bucket = bucket_of(width, height) if buckets else None
    shapes = {r: shape_of(bucket, r) if bucket else (r, r) for r in resolutions}
    shapes = {r: (h, w) for r, (h, w) in shapes.items() if h <= height and w <= width}
    if not shapes:
        raise Unusable("too_small", f"{width} × {height} pixels, for a resolution of {min(resolutions)}")
    scale = _draft(image, *shapes[max(shapes)])
    rgb, orientation = _read_rgb(image), _orientation(image)
    pictures = {}
    for resolution, shape in shapes.items():
        left, top, right, bottom = _centre(width, height, *shape)
        picture = _resize(rgb, (left / scale, top / scale, right / scale, bottom / scale), *shape)
        pictures[resolution] = np.array(_turned(picture, orientation))
    if orientation in _TRANSPOSING:
        width, height, bucket = height, width, bucket and (bucket[1], bucket[0])
    return Cut(width, height, bucket, pictures)


def _draft(image: Image.Image, height: int, width: int) -> float:
    """Sets libjpeg to decode at 1/2, 1/4 or 1/8 of the size, if that leaves twice [height, width]; returns 2, 4 or 8.

    Returns 1 where nothing is gained, and for other formats. The last row and column of a draft may lie partly outside of
    the picture: coordinates in it are the picture's divided by the number, whatever the rounded sizes.
    """
    whole = image.width
    draft = image.draft(image.mode, (2 * width, 2 * height))
    return 1 if draft is None else whole / draft[1][2]
