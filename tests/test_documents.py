"""The documents: links and anchors lead somewhere, code runs as it stands, notebooks are executed, the site builds."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

import condense
from condense import cli
from condense.benchmarks.method_cards import family_table, with_methods_table
from condense.cli.request import parse_request
from condense.data import ZCA
from condense.registry import METHODS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"])
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s\"[^\"]*\")?\)")


def without_code(text):
    """Markdown without blocks and spans of code, which hold no links."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))


def anchors(path):
    """The anchors of a page's headings, as GitHub and the site make them: lower case, hyphens for spaces."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    found, counts = set(), {}
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        number = counts[slug] = counts.get(slug, -1) + 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken_links(path, text):
    """Relative links of a page that lead nowhere."""
    broken = []
    for link in LINK.findall(text):
        if re.match(r"(https?|mailto|data):", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        is_there = target.exists() and target.resolve().is_relative_to(ROOT)
        if not is_there or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path):
    assert broken_links(path, without_code(path.read_text(encoding="utf-8"))) == []


def test_a_broken_link_is_found():
    page = DOCS / "index.md"
    text = "[a](concepts.md#which-method) [b](concepts.md#nothing) [c](none.md) ![d](../../x.png) [e](https://a.b)"
    assert broken_links(page, text) == ["concepts.md#nothing", "none.md", "../../x.png"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_executed_and_link_to_pages(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert path.stat().st_size < 500_000
    for cell in code:
        ast.parse("".join(cell["source"]))
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    assert broken_links(path, without_code(text)) == []
    assert not re.search(r"/(root|home|tmp|work)/", json.dumps(outputs))


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["continual-learning", "distil-your-folder", "use-a-set"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    for name in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place)
    client.execute()  # an error in a cell is raised here
    assert sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])) >= 2


def commands():
    """Those of all pages but that of results: lines of code blocks, and code within the text."""
    pages = [page for page in DOCS.rglob("*.md") if page.name != "results.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    lines = re.findall(r"^(condense [a-z]+ .*?)(?:  +#.*)?$", text, re.M)
    return sorted({*lines, *re.findall(r"`(condense [a-z]+ [^`]+)`", text)})


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_parse(command):
    """Options by the command line, settings and names of `distill` and `plan` by the checks before any work."""
    verb, *words = shlex.split(re.sub(r"--plugin \S+", "", command))[1:]
    given = typer.main.get_command(cli.app).commands[verb].make_context(verb, words).params
    if verb in ("distill", "plan") and given.get("classes") is None and not re.search("METHOD|pixel-means", command):
        names = ("method", "settings", "data", "ipc", "network", "recipe", "images")
        request = parse_request(**{name: given[name] for name in names})
        assert request[0].method in METHODS


# -- the file format --------------------------------------------------------------------------------------------------


def reader():
    """The code of the page that reads a set without this package."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "file-format.md").read_text(encoding="utf-8"), re.S)
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert "condense" not in code and len(lines) <= 15
    return code


@pytest.mark.parametrize("name", ["digits/dm-ipc10", "cifar10-jpeg/cvdd-ipc1", "digits/dm-ipc10, whitened"])
def test_the_page_of_the_format_reads_real_sets(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = condense.load(name.partition(",")[0])
    if "whitened" in name:
        matrix = torch.eye(64) * 3 + 0.1
        transform = ZCA(known.stored.float().mean(0).flatten(), matrix, torch.linalg.inv(matrix), known.shape)
        known = condense.DistilledSet(known.stored, known.labels, transform, known.manifest)
    known.save("set.h5")
    space = {}
    exec(reader(), space)
    images, _ = known.training_images()
    np.testing.assert_allclose(space["x"], images.numpy(), rtol=0, atol=2e-5)
    assert space["manifest"]["classes"] == list(known.classes)
    assert set(space["labels"]) == set(known.labels.arrays())
    if known.labels.is_hard:
        assert torch.equal(torch.from_numpy(space["labels"]["hard"]), known.hard_labels())


def test_the_page_of_the_format_names_what_is_in_files(tmp_path):
    import hashlib

    import h5py

    from condense.labels import LABEL_KINDS
    from condense.sets.schema import SET_SCHEMA

    text = (DOCS / "file-format.md").read_text(encoding="utf-8")
    for key in SET_SCHEMA["required"]:
        assert f"`{key}`" in text, key
    kinds = set(LABEL_KINDS.names())
    assert {"hard", "soft", "per-view", "teacher"} < kinds
    for kind in kinds:
        assert f"`{kind}`" in text, kind
    path = condense.load("digits/dm-ipc10").save(tmp_path / "set.h5")
    data = path.read_bytes()
    head = data[:512].decode("ascii")
    assert head.startswith(f"condense.distilled file, HDF5 from byte 512\nbytes {len(data)}\n")
    assert f"sha256 {hashlib.sha256(data[512:]).hexdigest()}\n" in head
    with h5py.File(path) as file:
        assert set(file.attrs) == {"format", "version", "manifest", "manifest_sha256"}
        assert hashlib.sha256(file.attrs["manifest"]).hexdigest() == file.attrs["manifest_sha256"].decode()
        stated = json.loads(file.attrs["manifest"])["checksums"]
        for name, digest in stated.items():
            array = file[name][()]
            described = f"{array.dtype.str}{array.shape}".encode()  # the rule that the page states
            assert hashlib.sha256(described + array.tobytes()).hexdigest() == digest


# -- pages of families and the site -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(DOCS.glob("families/*.md")), ids=lambda path: path.stem)
def test_the_table_of_a_family_is_current(path):
    """Fix with: python -m condense.benchmarks.method_cards --out docs/methods --families docs/families"""
    text = path.read_text(encoding="utf-8")
    assert with_methods_table(text, family_table(path.stem)) == text


def test_every_family_and_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    for path in [*DOCS.glob("*.md"), *DOCS.glob("families/*.md"), *NOTEBOOKS]:
        assert f"- {path.relative_to(DOCS).with_suffix('.md')}\n" in navigation
    from condense.benchmarks.charts import SHAPES
    from condense.benchmarks.method_cards import page_name

    assert {page_name(family) for family in SHAPES} == {path.stem for path in DOCS.glob("families/*.md")}


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"?https?://[^>]*", text) == []
    assert (tmp_path / "site" / "notebooks" / "use-a-set.html").exists()
