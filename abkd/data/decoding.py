"""One image file or array -> RGB pixels. Imports no torch."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

GREY = {"1", "L", "LA", "La"}
"""PIL's names of what has one channel, with or without transparency."""
COLOUR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


class Unreadable(Exception):
    """What is given is no image, or a torn one; the message says why."""


def pixels(image: np.ndarray | bytes | Path, size: int | None = None) -> tuple[np.ndarray, bool]:
    """(uint8 `[H, W, 3]`, whether it was stored in grey).

    Args:
        image: uint8 `[H, W]`, `[H, W, 1]` or `[H, W, 3]`, or a file or its bytes, as `read_rgb`.
        size: pixels; what is not `size` x `size` becomes so, see `fitted`.

    Raises:
        Unreadable: it is none of these.
    """
    if not isinstance(image, np.ndarray):
        decoded, is_grey = read_rgb(image)
        return np.asarray(fitted(decoded, size) if size else decoded), is_grey
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise Unreadable(f"it is {image.dtype} {list(image.shape)}; give uint8 [height, width] or [height, width, 3]")
    is_grey = image.ndim == 2 or image.shape[2] == 1
    if is_grey:
        image = np.broadcast_to(image.reshape(*image.shape[:2], 1), (*image.shape[:2], 3))
    if size and image.shape[:2] != (size, size):
        image = np.asarray(fitted(Image.fromarray(np.ascontiguousarray(image)), size))
    return image, is_grey


def read_rgb(file: Path | bytes) -> tuple[Image.Image, bool]:
    """(the first frame, upright as its EXIF data say, in RGB; whether it was stored in grey). Transparency is dropped.

    Raises:
        Unreadable: it is missing, no image, torn, or of more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about transparency of palettes
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
                mode = opened.mode
                opened.load()
                upright = ImageOps.exif_transpose(opened)
            if mode in GREY | COLOUR:
                return upright.convert("RGB"), mode in GREY
    except Exception as error:  # PIL raises a dozen kinds for torn files, and nothing of ours runs in there
        raise _unreadable(error) from None
    raise Unreadable(f"mode {mode} is not 8 bits a channel; convert it")


def read_size(file: Path) -> tuple[int, int]:
    """(height, width) of what `read_rgb` gives, by its header alone.

    Raises:
        Unreadable: it is missing or no image.
    """
    try:
        with Image.open(file) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return opened.size if turned else opened.size[::-1]
    except Exception as error:
        raise _unreadable(error) from None


def fitted(image: Image.Image, size: int) -> Image.Image:
    """`size` x `size` pixels: the largest square in the middle, bicubic with antialiasing. As it is where it fits."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def height_x_width(image: np.ndarray) -> str:
    """For messages."""
    return f"{image.shape[0]} x {image.shape[1]}"


def _unreadable(error: Exception) -> Unreadable:
    return Unreadable((str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: "))
