"""The traps of mapping `methods/` and `benchmarks/` below the one import name."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")
MAPPED = {
    "condense": "condense",
    "methods": "condense.methods",
    "benchmarks": "condense.benchmarks",
    "distilled_sets": "condense.distilled_sets",
}


def listed_packages():
    return set(CONFIG["options"]["packages"].split())


def test_every_package_folder_is_listed():
    found = set()
    for folder, name in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            relative = init.parent.relative_to(ROOT / folder)
            found.add(".".join([name, *relative.parts]))
    assert found == listed_packages()


def test_importing_the_folder_by_its_own_name_is_refused():
    result = subprocess.run([sys.executable, "-c", "import methods"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "condense.methods" in result.stderr


def test_a_users_own_methods_folder_does_not_shadow_ours(tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "__init__.py").write_text("mine = 1\n")
    code = "import methods, condense.methods.selection as s; print(methods.mine, s.random.__name__)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["1", "random"], result.stderr


def test_importing_condense_is_light():
    code = (
        "import sys, condense; heavy = {'torch', 'torchvision', 'kornia', 'h5py', 'sklearn'} & set(sys.modules);"
        "print(sorted(heavy), [m for m in sys.modules if m.startswith('condense.methods')])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] []"


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom condense.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "distill" in result.stdout
    assert result.stderr.strip() == "False"


def test_the_public_names_resolve():
    import condense

    for name in condense.__all__:
        assert getattr(condense, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = condense.nonsense


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy without the network (the build backend is in the environment)."""
    import shutil

    copy = tmp_path_factory.mktemp("source") / "copy"
    ignore = shutil.ignore_patterns(".venv", ".git", "runs", "demo", "*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def test_the_wheel_has_code_and_data_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "condense/methods/recipes/dm.yaml" in names
    assert "condense/benchmarks/protocols/dc-v1.yaml" in names
    assert "condense/benchmarks/suites/small.yaml" in names
    assert "condense/judge/record.schema.json" in names
    assert "condense/benchmarks/page/index.html" in names
    assert "condense/py.typed" in names
    top = {name.split("/")[0] for name in names}
    assert all(entry == "condense" or entry.endswith(".dist-info") for entry in top)
    assert not any("tests" in name for name in names)


def test_the_wheel_works_elsewhere_and_inside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import condense.methods.selection, condense.benchmarks, condense.config as c; print(len(c.recipe_names()) > 5)"
    )
    for folder in (tmp_path, ROOT):
        environment = {**os.environ, "PYTHONPATH": str(target)}
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment, check=True
        )
        assert result.stdout.strip() == "True"


def test_ready_made_sets_come_with_the_wheel(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    sets = {str(path.relative_to(ROOT / "distilled_sets")) for path in (ROOT / "distilled_sets").glob("*/*.h5")}
    assert "digits/dm-ipc10.h5" in sets
    for name in sets:
        for suffix in (".h5", ".md", ".png"):
            assert f"condense/distilled_sets/{name.removesuffix('.h5')}{suffix}" in names
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import condense; made = condense.load('digits/dm-ipc10'); print(made.name, len(made));"
        "from condense.cli import main; main(['ls', 'sets'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    first, *listed = result.stdout.splitlines()
    assert first == "digits/dm-ipc10 100", result.stderr
    assert {line.split()[0] for line in listed} == {name.removesuffix(".h5") for name in sets}
    tracks = {line.rpartition(" under ")[2] for line in listed}
    assert tracks == {"quick-v1", "quick-soft-v1"}


def test_the_core_never_imports_a_method():
    import ast

    for path in (ROOT / "condense").rglob("*.py"):
        if path.name == "cli.py":  # the one room that may name anything
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not name.startswith("condense.benchmarks"), f"{path}: {name}"
                assert not name.startswith("condense.methods"), f"{path}: {name}"
    for path in (ROOT / "methods").rglob("*.py"):
        assert "condense.benchmarks" not in path.read_text(), path
        assert "condense.cli" not in path.read_text(), path
