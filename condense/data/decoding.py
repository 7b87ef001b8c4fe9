"""Decodes image files to arrays, in worker processes or threads."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from condense.data.loaded import Resizing, resized_box
from condense.errors import CondenseError


def is_grey(mode: str) -> bool:
    """Whether a PIL mode has one channel of intensity."""
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


FULL_RANGE = 2**16 - 1
"""White of 16-bit images that use all bits."""

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that the values of cameras, scanners and X-ray detectors have."""

UNSAFE_FORMATS = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
"""Formats of Pillow that it does not decode itself: it runs another program or only recognises the file."""


@functools.cache
def image_formats() -> dict[str, str]:
    """Suffix (lower case, with the dot) to format, of all formats that Pillow decodes."""
    from PIL import Image

    return {
        suffix.lower(): name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in UNSAFE_FORMATS
    }


def uses_16_bits(image: Any) -> bool:
    """Whether the file of an image that is not decoded yet has more than 8 bits per channel."""
    return image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def largest_value(image: Any) -> int:
    """Largest value of an image with more than 8 bits per channel.

    Of 16-bit colour, Pillow keeps the upper 8 bits alone.
    """
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    return int(np.asarray(image.convert("RGB")).max()) * 256 + 255


def white_of(largest: int) -> int:
    """White of 16-bit images whose largest value this is: 2**bits - 1 with one of ``DEPTHS``."""
    return next((2**bits - 1 for bits in DEPTHS if largest < 2**bits), FULL_RANGE)


def range_note(white: int) -> str:
    """How 16-bit images with this white are scaled, for the user; an empty string if they use all bits."""
    if white == FULL_RANGE:
        return ""
    return f"16-bit images have values of {white.bit_length()} bits: 0..{white} becomes 0..255; bits=16 takes 0..65535"


def image_to_array(image: Any, mode: str, resizing: Resizing | None, white: int = FULL_RANGE) -> np.ndarray:
    """Converts a PIL image to uint8 (1,H,W) or (3,H,W): rotated by its EXIF tag, without alpha, 16-bit grey to 8 bits.

    Args:
        image: PIL image.
        mode: ``L`` or ``RGB``.
        resizing: scaling and centre square, or None.
        white: value of 16-bit grey that becomes 255.

    Raises:
        ValueError: the image has floating-point pixels, whose range is unknown, or values outside 0..``white``, or it
            would be scaled to more pixels than Pillow decodes.
    """
    from PIL import Image, ImageOps

    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion clips 16 bits at 255
        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > white:
            advice = "give bits=16" if low >= 0 and high <= FULL_RANGE else "save it with 8 or 16 bits, from 0"
            raise ValueError(f"its values run from {low} to {high}, not within 0..{white}; {advice}")
        image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    elif image.mode != mode and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != mode:
        image = image.convert(mode)
    if resizing is not None and image.size != resizing:
        height, width, top, left = resized_box(image.height, image.width, resizing)
        shorter, side = resizing
        if height * width > max(2 * (Image.MAX_IMAGE_PIXELS or 0), 16 * shorter * shorter):
            raise ValueError(f"its {image.width}x{image.height} pixels become {width}x{height} by resize={shorter}")
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    array = np.asarray(image)
    return array[None] if mode == "L" else array.transpose(2, 0, 1)


def read_image(path: str, use: Callable[[Any], Any]) -> Any:
    """Opens a file and returns ``use(image)``.

    Raises:
        CondenseError: the file cannot be read; one line that names it.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=tuple(image_formats().values())) as image:
            return use(image)
    except Exception as error:  # PIL raises many types for a damaged file
        reason = "unknown format" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise CondenseError(f"'{path}' cannot be read as an image: {reason}") from error


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode_images(
    paths: Sequence[str],
    shape: tuple[int, ...],
    mode: str,
    resizing: Resizing | None,
    white: int = FULL_RANGE,
    *,
    workers: int | None = None,
    fork: bool = sys.platform == "linux",
) -> Iterator[np.ndarray]:
    """Yields chunks of decoded images in order, uint8 (n, *shape).

    The function forks worker processes on Linux, which is safe because they use neither torch nor a GPU; elsewhere it
    uses threads. Time per image on two cores, CIFAR-10 as JPEG: 97 µs with one process, 145 with two threads (PIL holds
    the GIL most of the time at 32x32), 65 with two processes. Threads are faster from about 128x128 on (167 against
    218; 512x512: 858 against 1806).

    Args:
        paths: image files.
        shape: (C,H,W) of every decoded image.
        mode: ``L`` or ``RGB``.
        resizing: scaling and centre square, or None.
        white: value of 16-bit grey that becomes 255.
        workers: processes or threads; by default one per core.
        fork: use processes instead of threads.

    Raises:
        CondenseError: a file is damaged, or its size is not ``shape``.
    """
    rows = max(1, min(256, 2**20 // math.prod(shape)))
    spans = [range(start, min(start + rows, len(paths))) for start in range(0, len(paths), rows)]

    def chunk(span: range) -> np.ndarray:
        out = np.empty((len(span), *shape), np.uint8)
        for row, index in enumerate(span):
            image = read_image(paths[index], lambda image: image_to_array(image, mode, resizing, white))
            if image.shape != shape:
                raise CondenseError(
                    f"images differ in size: '{paths[0]}' is {shape[2]}x{shape[1]} but '{paths[index]}' is "
                    f"{image.shape[2]}x{image.shape[1]}; give resize=N to bring all to NxN"
                )
            out[row] = image
        return out

    workers = min(workers or _cores(), len(spans))
    if workers < 2 or multiprocessing.current_process().daemon:
        yield from map(chunk, spans)
    elif fork:
        yield from _forked(chunk, spans, workers)
    else:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(chunk, spans)


def _forked(work: Callable[[range], np.ndarray], spans: Sequence[range], workers: int) -> Iterator[np.ndarray]:
    """``map(work, spans)`` in forked processes.

    Worker w processes every ``workers``-th span and sends its results through its own pipe. So results arrive in order,
    no worker runs far ahead, and all workers end with the parent, even if it is killed.
    """
    context = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    processes = []
    try:
        for first in range(workers):
            reader, writer = context.Pipe(duplex=False)
            readers.append(reader)
            process = context.Process(
                target=_serve, args=(work, spans[first::workers], writer, list(readers)), daemon=True
            )
            with warnings.catch_warnings():
                # Python 3.12 warns about forking a process that has threads (torch's).
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            writer.close()
            processes.append(process)
        for index in range(len(spans)):
            try:
                result = readers[index % workers].recv()
            except (EOFError, OSError) as error:
                raise RuntimeError("a process that decoded images was killed") from error
            if isinstance(result, str):
                raise CondenseError(result)
            yield result
    finally:
        for reader in readers:
            reader.close()
        for process in processes:
            process.terminate()
            process.join()


def _serve(
    work: Callable[[range], np.ndarray], spans: Sequence[range], writer: Connection, readers: Sequence[Connection]
) -> None:
    """Runs in a forked worker. An error is sent to the parent as its text."""
    for reader in readers:  # an open reader would keep the worker alive after the parent has ended
        reader.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for span in spans:
            writer.send(work(span))
    except CondenseError as error:
        writer.send(str(error))
    except BrokenPipeError:
        pass
