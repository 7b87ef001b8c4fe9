"""Subsets of real images with and without a teacher's labels: ``python -m condense.benchmarks.kd_pruning --data DATA``.

The table of "Distilling the Knowledge in Data Pruning": subsets at random and by scores, labels of the class or of a
strong or a weak teacher, several sizes. Every student makes the same steps. Teachers and the scores are trained once.
Existing files are kept: the same command continues a stopped one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from condense.benchmarks.equal_time import data_name, distill_if_missing, run_condense
from condense.benchmarks.speed.measure import Parser, guarded, positive, read_counts
from condense.formatting import aligned
from condense.judge import means_by_arm, read_record

CHOICES = ("random", "el2n", "forgetting")
"""How the images are chosen; scores take the hardest, as published."""

LABELS = ("class", "strong", "weak")
"""Labels: of the class alone (alpha=0), or as ``kdprune`` mixes them with a teacher's."""


def train_teacher(path: Path, data: str, network: str, epochs: int, options: Sequence[str]) -> None:
    """Trains a teacher on all data unless the file exists, holding out a tenth of the images to measure it."""
    if not path.exists():
        line = ["teachers", "--data", data, "--networks", network, "--epochs", str(epochs), "--out", str(path)]
        run_condense(*line, "--held-out", "0.1", "teacher_lr=0.02", *options)


def table(found: dict[tuple[int, str, str], list[float]]) -> str:
    """One row for each size and choice: the mean accuracy of each kind of labels over the seeds."""
    rows = [["images per class", "chosen by", *LABELS, "seeds"]]
    for ipc, choice in dict.fromkeys((ipc, choice) for ipc, choice, _ in found):
        values = [found.get((ipc, choice, label), []) for label in LABELS]
        cells = [f"{mean(each):.1f}" if each else "-" for each in values]
        rows.append([str(ipc), choice, *cells, str(min(len(each) for each in values))])
    return aligned(rows)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.kd_pruning", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="real images, as for `condense distill`")
    parser.add_argument("--out", type=Path, required=True, help="folder for all files and the table")
    parser.add_argument("--ipc", default="50,250", help="images per class of the subsets, A,B,...")
    parser.add_argument("--network", default="convnet-d3-w32-in", help="of students and of the strong teacher")
    parser.add_argument("--weak", default="convnet-d3-w8-in", help="network of the weak teacher and of the scores")
    parser.add_argument("--epochs", type=positive, default=4, help="of the strong teacher")
    parser.add_argument("--weak-epochs", type=positive, default=2)
    parser.add_argument("--score-epochs", type=positive, default=6)
    parser.add_argument("--seeds", type=positive, default=1)
    parser.add_argument("--protocol", default="equal-steps-soft-v1")
    parser.add_argument("settings", nargs="*", help="of the data, e.g. resize=16")
    options = parser.parse_args(arguments)
    out, data, of_data = options.out, options.data, options.settings
    sizes = read_counts("--ipc", options.ipc)
    out.mkdir(parents=True, exist_ok=True)
    teachers = {"strong": out / "strong.h5", "weak": out / "weak.h5"}
    train_teacher(teachers["strong"], data, options.network, options.epochs, of_data)
    train_teacher(teachers["weak"], data, options.weak, options.weak_epochs, of_data)
    scores = out / "scores.h5"
    if not scores.exists():
        early = max(1, options.score_epochs // 2)
        line = ["scores", "--data", data, "--network", options.weak, "--out", str(scores)]
        run_condense(*line, f"score_epochs={options.score_epochs}", f"score_early={early}", *of_data)
    found: dict[tuple[int, str, str], list[float]] = {}
    for seed, ipc, choice, label in itertools.product(range(options.seeds), sizes, CHOICES, LABELS):
        stem = f"kdprune-{data_name(data).partition('=')[0]}-ipc{ipc}-{choice}-{label}-seed{seed}"
        path, record = out / "sets" / f"{stem}.h5", out / "records" / f"{stem}.json"
        settings = [f"teachers={teachers['strong' if label == 'class' else label]}", f"choose={choice}"]
        settings += [f"scores={scores}"] if choice != "random" else []
        settings += ["alpha=0"] if label == "class" else []
        flags = ["--seed", str(seed), "--tag", f"{choice}-{label}", *settings, *of_data]
        distill_if_missing(path, "kdprune", data, ipc, options.network, out / "runs" / stem, *flags)
        if not record.exists():
            record.parent.mkdir(parents=True, exist_ok=True)
            line = ["evaluate", str(path), "--data", data, "--protocol", options.protocol, "--runs", "1"]
            run_condense(*line, "--controls", "none", "--seed", str(seed), "--json", str(record))
        accuracy = 100 * means_by_arm(read_record(record))["distilled"]
        found.setdefault((ipc, choice, label), []).append(accuracy)
        text = table(found)
        (out / "table.txt").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    guarded(_main, None)
