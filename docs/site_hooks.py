"""Hooks of mkdocs (mkdocs.yml): notebooks become pages with their outputs, and pictures of records are found."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

OUTSIDE = re.compile(r"\]\(\.\./(benchmarks/results/[^)\s]+\.png)\)")
"""Links of pages at the top of docs/ to pictures that lie beside it."""


def on_config(config: MkDocsConfig) -> None:
    """Lists the method cards, which are made by a program, in the navigation."""
    cards = sorted(path.name for path in Path(config.docs_dir, "methods").glob("*.md"))
    cards.sort(key=lambda name: name != "README.md")
    config.nav = [
        {"Methods": [f"methods/{name}" for name in cards]} if entry == {"Methods": "methods/"} else entry
        for entry in config.nav or []
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    docs = Path(config.docs_dir)
    for path in sorted(docs.glob("notebooks/*.ipynb")):
        text, pictures = notebook_page(nbformat.read(path, as_version=4), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    for page in docs.glob("*.md"):
        for name in set(OUTSIDE.findall(page.read_text(encoding="utf-8"))):
            files.append(File.generated(config, name, abs_src_path=str(docs.parent / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"](\1)", re.sub(r"(\]\([\w./-]+)\.ipynb([)#])", r"\1.md\2", markdown))


def notebook_page(notebook: Any, stem: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of an executed notebook, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{data.get('text/plain', 'Figure')}]({name})")
            elif output.output_type == "stream" or "text/plain" in data:
                parts.append(f"```text\n{(output.get('text') or data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures
