"""Features of all real train images under a frozen network, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from condense import networks
from condense.data import cache_dir
from condense.device import device_name
from condense.engine import Run
from condense.errors import CondenseError
from condense.files import atomic_write
from condense.networks import Member
from condense.pretraining.store import transform_digests

_log = logging.getLogger(__name__)


@torch.no_grad()
def load_or_compute_features(run: Run, member: Member) -> Tensor:
    """Returns the features of all train images without augmentation, float16 (n, D) on the CPU.

    They are a memory map of a file in the cache, which all methods and set sizes share. If the file cannot be written,
    they are in memory. A dry run computes some and repeats them.

    Args:
        run: its train images.
        member: the network, frozen.

    Raises:
        CondenseError: the network has no features, or some are not finite as float16.
    """
    networks.require_embedding(member.network, member.name, run.name)
    path = _cache_path(run, member)
    run.ranks.barrier()  # all ranks look before one of them writes
    found = None if run.dry_run else _read(path, len(run.task.train))
    run.ranks.barrier()
    if found is not None:
        return found
    chunks, parts = run.train_id_chunks(), []
    with run.stage("preparation", len(chunks)) as stage:
        for done, ids in enumerate(chunks[: stage.units], 1):
            with run.autocast():
                features = member.network.embed(run.task.batch(ids))
            parts.append(features.half().cpu())
            stage.report(done)
    features = torch.cat(parts)
    if not bool(features.isfinite().all()):
        raise CondenseError(f"the features of {member.name} are not finite as float16; take another network")
    if run.dry_run:
        return features[torch.arange(len(run.task.train)) % len(features)]
    if run.ranks.is_main_process:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, features.numpy())
        except (CondenseError, OSError) as fault:
            _log.warning("condense: features stay in memory, the cache cannot be written: %s", fault)
    return features


def _read(path: Path, images: int) -> Tensor | None:
    """Returns the features of a file; None if there is none, or it is damaged."""
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if features.dtype != np.float16 or features.ndim != 2 or len(features) != images:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # it is only read
        return torch.from_numpy(features)


def _cache_path(run: Run, member: Member) -> Path:
    parts = [
        member.sha256,
        run.task.fingerprint,
        transform_digests(run.task),
        run.precision,
        device_name(run.device),
        torch.__version__,
    ]
    return cache_dir() / "features" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.npy"
