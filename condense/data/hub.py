"""Reads data sets of the Hugging Face Hub, ``hf:OWNER/NAME``, through the library ``datasets``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from condense.errors import CondenseError, missing_package

HUB_PREFIX = "hf:"
"""Start of DATA that names a data set of the Hub, or a folder that ``datasets`` wrote."""

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_hub(data: str, download: bool) -> Any:
    """Loads ``hf:OWNER/NAME`` or ``hf:FOLDER`` as a ``DatasetDict`` or a ``Dataset``.

    Args:
        data: the text, with its prefix. FOLDER contains data files such as Parquet, or was written by
            ``save_to_disk``.
        download: fetch data that are not in the cache of ``datasets``.

    Raises:
        CondenseError: ``datasets`` is not installed, or the data are neither on disk nor fetched.
    """
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", "hub", f"data '{data}'") from None
    place = data.removeprefix(HUB_PREFIX)
    folder = Path(place).expanduser()
    if not folder.is_dir() and not _NAME.fullmatch(place):
        raise CondenseError(f"data '{data}': write hf:OWNER/NAME as on the Hub, or hf: and an existing folder")
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(folder))
        datasets.config.HF_HUB_OFFLINE = offline or not download  # the cache of `datasets` is still read
        return datasets.load_dataset(str(folder) if folder.is_dir() else place)
    except Exception as error:  # the library raises many types, also those of its parsers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "" if download or folder.is_dir() else "; give --download to fetch it"
        raise CondenseError(f"data '{data}': {reason}{hint}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
