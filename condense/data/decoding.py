"""PIL images to arrays, in worker processes."""

from __future__ import annotations

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

from condense.data.loaded import _resized
from condense.errors import CondenseError


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


def _pixels(image: Any, mode: str, resize: int | None) -> np.ndarray:
    """uint8 (1,H,W) or (3,H,W) of a PIL image: upright, alpha dropped, 16-bit grey scaled to 8 bits.

    Raises:
        ValueError: the image has floating-point pixels, whose range nobody knows.
    """
    from PIL import Image, ImageOps

    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion clips 16 bits at 255
        image = Image.fromarray(((np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    elif image.mode != mode and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode != mode:
        image = image.convert(mode)
    if resize is not None and image.size != (resize, resize):
        high, wide, top, left = _resized(image.height, image.width, resize)
        image = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + resize, top + resize))
    array = np.asarray(image)
    return array[None] if mode == "L" else array.transpose(2, 0, 1)


def _open(path: str, use: Callable[[Any], Any]) -> Any:
    """``use(PIL image)``; whatever a broken file makes PIL raise becomes one line that names the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return use(image)
    except Exception as error:
        # PIL names the file in its own words as well: the part in front of the path is enough
        reason = "unknown format" if "cannot identify" in str(error) else str(error) or type(error).__name__
        raise CondenseError(f"'{path}' cannot be read as an image: {reason}") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode(paths: Sequence[str], shape: tuple[int, ...], mode: str, resize: int | None) -> Iterator[np.ndarray]:
    """Chunks of decoded images in order, uint8 (n, *shape).

    Measured on two cores, CIFAR-10 as JPEG, µs an image: one process 97, two threads 145 (at 32x32 PIL holds the GIL
    for most of the time), two forked processes 65. Threads win from about 128x128 on (167 against 218; 512x512: 858
    against 1806). So processes are forked where that is safe (they touch neither torch nor a GPU), else threads used.

    Raises:
        CondenseError: a file is corrupt, or its size is not ``shape``.
    """
    rows = max(1, min(256, 2**20 // math.prod(shape)))
    spans = [range(start, min(start + rows, len(paths))) for start in range(0, len(paths), rows)]

    def chunk(span: range) -> np.ndarray:
        out = np.empty((len(span), *shape), np.uint8)
        for row, index in enumerate(span):
            image = _open(paths[index], lambda image: _pixels(image, mode, resize))
            if image.shape != shape:
                raise CondenseError(
                    f"images differ in size: '{paths[0]}' is {shape[2]}x{shape[1]} but '{paths[index]}' is "
                    f"{image.shape[2]}x{image.shape[1]}; give resize=N to bring all to NxN"
                )
            out[row] = image
        return out

    workers = min(_cores(), len(spans))
    if workers < 2 or multiprocessing.current_process().daemon:
        yield from map(chunk, spans)
    elif sys.platform == "linux":
        yield from _forked(chunk, spans, workers)
    else:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(chunk, spans)


def _forked(work: Callable[[range], np.ndarray], spans: Sequence[range], workers: int) -> Iterator[np.ndarray]:
    """``map(work, spans)`` in forked processes: worker w takes every ``workers``-th span and sends results down its own
    pipe, so they arrive in order, no worker runs far ahead, and all end when the parent is gone, even killed."""
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
                warnings.simplefilter(
                    "ignore", DeprecationWarning
                )  # Python 3.12 warns of forking beside torch's threads
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
    """What a forked worker does; an error is sent as its text."""
    for reader in readers:  # else a worker's pipe would stay open, and itself alive, after the parent is gone
        reader.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers; its own handlers are not for them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for span in spans:
            writer.send(work(span))
    except CondenseError as error:
        writer.send(str(error))
    except BrokenPipeError:
        pass
