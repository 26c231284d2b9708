"""The bytes of an image in, a square float array out: pure functions, the second step of data prep.

The story, in the order of the code:

1. `Unusable`: an image that cannot be trained on, with a reason of the fixed set `UNUSABLE_REASONS`.
2. `decode`: bytes → upright 8-bit sRGB picture. Only JPEG, PNG and WebP are tried, whatever the file is called. The
   size is judged by the header, before a pixel is decoded. Then all pixels are read (a truncated file is broken),
   16 bits become 8, the embedded colour profile is converted to sRGB, what is transparent is laid over white, and the
   picture is turned as its EXIF says.
3. `resize_and_crop`: shorter side to `size`, then the centre.
4. `to_array`: float32 [3, H, W] in [-1, 1], as the VAE wants it.

Shapes: H height, W width, C = 3 colours (red, green, blue). Sizes are in pixels.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
from einops import rearrange
from PIL import ExifTags, Image, ImageCms

# ----------------------------------------------------------------------------------------------- 1. what is dropped

UnusableReason = Literal[
    "unsupported_format",  # neither JPEG nor PNG nor WebP by its first bytes
    "broken_image",  # one of these, but damaged or truncated
    "too_large",  # more pixels than the limit, by the header: a decompression bomb
    "animated",  # an APNG or WebP of several frames: no caption says which of them it is about
    "too_small",  # the shorter side is below the wanted size: nothing is ever scaled up
]
UNUSABLE_REASONS: tuple[str, ...] = get_args(UnusableReason)

MAX_PIXELS = 178_956_970  # where Pillow itself refuses to open an image: a square of 13,377


class Unusable(ValueError):
    """An image to drop: `reason` is one of `UNUSABLE_REASONS`, `detail` is for people."""

    def __init__(self, reason: UnusableReason, detail: str) -> None:
        super().__init__(reason, detail)  # all of the arguments, so that it crosses from a worker process
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


# -------------------------------------------------------------------------------------------------------- 2. decode


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright picture in `data`: mode RGB, 8 bits, sRGB, over white, without metadata.

    `max_pixels` limits width × height; above `MAX_PIXELS` it has no effect, as Pillow refuses such images itself.

    Raises `Unusable`: unsupported_format, broken_image, too_large, animated.
    """
    image = _load(data, max_pixels)
    colour, alpha = _colour_and_alpha(image)
    rgb = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        rgb = white
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # profile and orientation are used up: nothing may apply them again
    return rgb


def _may_be_supported(data: bytes) -> bool:
    """Whether the first bytes, or the few that there are, are those of a JPEG, PNG or WebP."""
    first, without_size = data[:8], data[:4] + data[8:12]
    pairs = ((first, b"\xff\xd8\xff"), (first, b"\x89PNG\r\n\x1a\n"), (without_size, b"RIFFWEBP"))
    return any(head.startswith(magic) or magic.startswith(head) for head, magic in pairs)


def _load(data: bytes, max_pixels: int) -> Image.Image:
    """The first and only frame with all its pixels, in the file's own mode and orientation."""
    if not _may_be_supported(data):
        raise Unusable("unsupported_format", f"neither JPEG nor PNG nor WebP: starts with {data[:12]!r}")
    with _damage_is_unusable():
        image = Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"])
    width, height = image.size
    if width * height > max_pixels:
        raise Unusable("too_large", f"{width} × {height} pixels, limit {max_pixels}")
    # Not asked of a JPEG: phones append further pictures (MPO), of which the first is the photograph.
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise Unusable("animated", f"{image.format} of several frames")
    with _damage_is_unusable():
        image.load()
    return image


@contextmanager
def _damage_is_unusable() -> Iterator[None]:
    """Around calls to Pillow alone: it promises no set of exceptions for damaged data.

    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error and IndexError are all known from it.
    """
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable("too_large", str(error)) from error
    except MemoryError:  # says something of the machine and not of the image
        raise
    except Exception as error:
        raise Unusable("broken_image", f"{type(error).__name__}: {error}") from error


def _colour_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in mode L, RGB or CMYK, 8 bits a channel, and the opacity in mode L (None: opaque everywhere)."""
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
    """RGB in sRGB. A profile that is damaged or made for another mode says nothing about the colours: it is ignored."""
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


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) to 8. A damaged EXIF block says nothing about it: 1."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as for damaged pixels, Pillow promises no set of exceptions
        return 1


# ------------------------------------------------------------------------------------------------- 3. resize and crop


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre of `image` at [size, size]: its shorter side becomes `size`, the longer one is cropped on both ends.

    The filter is Lanczos, which widens with the factor and so does not alias; from a factor of six on, Pillow first
    averages whole blocks (`reducing_gap`), which is faster and hardly to be told from the plain filter.

    Raises `Unusable`: too_small.
    """
    width, height = image.size
    side = min(width, height)
    if side < size:
        raise Unusable("too_small", f"{width} × {height} pixels, shorter side below {size}")
    # Crop and resize in one: the box is in whole pixels of the source, so that a side that fits is not interpolated.
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


# ---------------------------------------------------------------------------------------------------------- 4. array


def to_array(image: Image.Image) -> np.ndarray:
    """float32 [3, H, W] in [-1, 1] of an RGB picture: 0 is -1, 255 is 1."""
    assert image.mode == "RGB", image.mode
    array_HWC = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return np.ascontiguousarray(rearrange(array_HWC, "H W C -> C H W"))
