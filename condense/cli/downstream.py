"""The verb `downstream`."""

from __future__ import annotations

from typing import Annotated

import typer

from condense.cli.parameters import (
    Data,
    DataSettings,
    Device,
    Download,
    Force,
    Precision,
    ProtocolOption,
    RecordFile,
    Runs,
    Seed,
    SetFile,
    load_set_and_data,
    number_option,
)
from condense.errors import CondenseError
from condense.tracking import is_main_process


def downstream(
    file: SetFile,
    data: Data,
    settings: DataSettings = None,
    checks: Annotated[
        str, typer.Option(help="some of robustness,privacy,continual,ranking; the last one trains many networks")
    ] = "robustness,privacy,continual",
    network: Annotated[str | None, typer.Option(help="architecture; by default that of the set")] = None,
    runs: Runs = None,
    protocol: ProtocolOption = None,
    class_steps: Annotated[
        int, number_option("--class-steps", int, "groups of classes of the check `continual`", maximum=10_000)
    ] = 5,
    widths: Annotated[str, typer.Option(help="A,B,...: widths of the ConvNets that `ranking` trains")] = "16,32",
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
    out: RecordFile = None,
    download: Download = False,
    force: Force = False,
) -> None:
    """Measures robustness, privacy and further uses of a set."""
    from condense import judge
    from condense.files import write_json

    distilled, real = load_set_and_data(file, data, settings, download=download, record=out, force=force)
    record = judge.downstream(
        distilled,
        real,
        checks=checks.split(","),
        network=network,
        runs=runs,
        protocol=protocol,
        steps=class_steps,
        widths=_numbers("--widths", widths),
        seed=seed,
        device=device,
        precision=precision,
        quiet=False,
    )
    if not is_main_process():
        return
    print(
        f"{distilled.name} on {real.name}, {record['protocol']['name']}, {record['network']}; mean ± std of "
        f"{record['runs']} students; {record['random_images']:,} random images have the bytes of the set"
    )
    print(judge.format_downstream(record))
    if out is not None:
        write_json(out, record)
        print(f"record: {out}")


def _numbers(flag: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and 0 < int(word) < 10_000 for word in words):
        raise CondenseError(f"{flag} {text}: must be whole numbers from 1 to 9,999, joined by commas")
    return [int(word) for word in words]
