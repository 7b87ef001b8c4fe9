"""Writes a card for each method, and tables of methods in a README and in pages of families, from the registry and the
recipe files.

The cards of this repository are in ``docs/methods``, the pages in ``docs/families``; a test compares cards and tables
with the output of this module.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from condense import config
from condense.benchmarks import facts
from condense.benchmarks.families import method_facts
from condense.benchmarks.speed.measure import Parser, guarded
from condense.registry import METHODS, Method

PARTS = ("When to use", "Cost", "Known failure")
"""Titles in the second paragraph of a driver's docstring, each followed by a colon."""

BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
"""Lines of a README between which the table of methods is written."""


def cards() -> dict[str, str]:
    """File name to Markdown: one card for each method, and ``README.md``, their table."""
    entries = [METHODS.get(name) for name in METHODS.names()]
    rows = [[f"[{e.name}]({e.name}.md)", e.year, e.order, e.summary] for e in sorted(entries, key=_age)]
    table = _table(["method", "year", "order", "what it does"], rows)
    about = (
        "# Methods\n\nOrder is the highest derivative that a step takes through a network. These cards are made by\n"
        "`python -m condense.benchmarks.method_cards --out docs/methods --readme README.md --families docs/families`."
        "\n\n"
    )
    return {"README.md": f"{about}{table}\n", **{f"{e.name}.md": method_card(e) for e in entries}}


def methods_table() -> str:
    """The Markdown table of all methods by year: paper, family, labels, cost and summary."""
    head = ["method", "paper", "family", "labels", "cost", "summary"]
    return _table(head, _rows("docs/methods/"))


def family_table(page: str) -> str:
    """The Markdown table of the methods of one family, for its page ``docs/families/PAGE.md``.

    Raises:
        ValueError: there is no such family.
    """
    rows = [row[:2] + row[3:] for row in _rows("../methods/") if page_name(row[2]) == page]
    if not rows:
        raise ValueError(f"no family has the page {page}.md")
    return _table(["method", "paper", "labels", "cost", "summary"], rows)


def page_name(family: str) -> str:
    """The page of a family: ``gradient-matching``."""
    return family.partition(" (")[0].replace(" ", "-")


def _rows(cards: str) -> list[list[str]]:
    """A row for each method by year, with links to the cards in the folder ``cards``."""
    rows = []
    for entry in sorted((METHODS.get(name) for name in METHODS.names()), key=_age):
        file = config.method_file(entry.name)
        paper = f"[{entry.paper}]({file.link})" if file.link else entry.paper
        rows.append(
            [
                f"[`{entry.name}`]({cards}{entry.name}.md)",
                f"{paper} ({entry.year})",
                method_facts(entry.name).family,
                entry.labels,
                file.cost,
                entry.summary,
            ]
        )
    return rows


def with_methods_table(text: str, table: str | None = None) -> str:
    """``text`` with a table of methods, by default that of all, between the lines ``BEGIN`` and ``END``.

    Raises:
        ValueError: there is no pair of such lines.
    """
    head, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text must have the lines {BEGIN} and {END}")
    return f"{head}{begin}{methods_table() if table is None else table}\n{end}{tail}"


def _age(entry: Method) -> tuple[int, str]:
    return entry.year, entry.name


def method_card(entry: Method) -> str:
    """The card of one method, Markdown."""
    doc = inspect.cleandoc(entry.function.__doc__ or "")
    summary, _, rest = doc.partition("\n\n")
    usage, _, notes = rest.partition("\n\n")
    parts = [f"# {entry.name}", " ".join(summary.split())]
    parts.append(
        f"*{entry.paper}* ({entry.year}). Labels: {entry.labels}. "
        + f"Default network: `{entry.network}`. " * bool(entry.network)
        + f"Evaluated here under `{entry.protocol}` unless another protocol is named."
    )
    parts += [f"**{title}.** {text}" for title, text in _usage(usage)]
    parts += [" ".join(paragraph.split()) for paragraph in notes.split("\n\n") if paragraph]
    tiny = f"{entry.name}/{config.TINY}"
    cells = [name for name in config.recipe_names() if name.startswith(f"{entry.name}/") and name != tiny]
    first = cells[0] if cells else tiny
    parts.append(f"```\ncondense distill --recipe {first}\ncondense show {entry.name}\n```")
    settings = [[f"`{name}`", default, meaning] for name, _, default, meaning in config.describe(entry.config)]
    if settings:
        parts.append("## Settings\n\n" + _table(["name", "default", "meaning"], settings))
    if cells:
        parts.append("## Recipes\n\n" + ", ".join(f"`{name}`" for name in cells))
    published = [
        [
            row["dataset"],
            row["ipc"],
            facts.accuracy(row["mean"], row["std"]),
            row["network"],
            row["protocol"],
            row["source"],
        ]
        for row in facts.published(entry.name)
    ]
    published_table = _table(["data", "ipc", "accuracy, %", "network", "judged", "source"], published)
    parts.append(
        "## Published, not measured here\n\n" + (published_table if published else "None that could be verified.")
    )
    measured = [[result["ipc"], facts.measured_line(result)] for result in facts.measured(entry.name)]
    parts.append("## Measured here\n\n" + (_table(["ipc", "accuracy"], measured) if measured else "Nothing yet."))
    return "\n\n".join(parts) + "\n"


def _usage(text: str) -> list[tuple[str, str]]:
    """The parts of a docstring's second paragraph by their titles."""
    pieces = re.split(rf"({'|'.join(PARTS)})s?: ", " ".join(text.split()))
    return [(title, body.strip()[:1].upper() + body.strip()[1:]) for title, body in zip(pieces[1::2], pieces[2::2])]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m condense.benchmarks.method_cards", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the cards to")
    parser.add_argument("--readme", type=Path, help="README whose table of methods is updated")
    parser.add_argument("--families", type=Path, help="folder with a page for each family, whose tables are updated")
    options = parser.parse_args(arguments)
    out, readme = options.out, options.readme
    out.mkdir(parents=True, exist_ok=True)
    for name, text in cards().items():
        (out / name).write_text(text, encoding="utf-8")
    if readme:
        readme.write_text(with_methods_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
    for page in options.families.glob("*.md") if options.families else ():
        page.write_text(with_methods_table(page.read_text(encoding="utf-8"), family_table(page.stem)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    guarded(_main, None)
