"""The traps of mapping `methods/` and `benchmarks/` below the one import name."""

import ast
import configparser
import importlib
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
    code = "import methods, condense.methods.distribution_matching as s; print(methods.mine, s.dm.__name__)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["1", "dm"], result.stderr


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


# -- imports ----------------------------------------------------------------------------------------------------------

FLOORS = (
    ("errors", "formatting", "rng", "version"),
    ("cuda_graphs", "environment", "ranks"),
    ("config", "device", "files", "hdf5", "tracking"),
    ("registry",),
    ("data",),
    ("augment", "networks"),
    ("commands", "labels", "plugins", "selection"),
    ("sets", "training"),
    ("engine",),
    ("pretraining",),
    ("judge",),
    ("exchange", "jobs", "lighten"),
    ("graphs",),
    ("api",),
    ("",),  # the names that `import condense` gives
    ("methods",),
    ("benchmarks",),
    ("cli",),
    ("__main__",),
)
"""Rooms of the package, from the ground up. A room imports from lower floors only."""

FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def module_files():
    """Every module of the package with its file."""
    files = {}
    for folder in ("condense", "methods", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join([MAPPED[folder], *parts])] = path
    return files


FILES = module_files()


def room_of(module):
    """``condense.labels.base`` is in the room labels."""
    return module.partition(".")[2].partition(".")[0]


def imports_of(module):
    """Everything that a module imports of the package, at the top and inside functions: (module, name or "", line)."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            entries = [(alias.name, "", node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            entries = [(node.module, alias.name, node) for alias in node.names]
        else:
            continue
        for source, name, node in entries:
            if source.split(".")[0] == "condense":
                inner = f"{source}.{name}"
                yield (inner, "", node) if inner in FILES else (source, name, node)


def violations(rule):
    """``module imports name`` of every import that ``rule(importer, imported module, name, node)`` forbids."""
    return sorted(
        {
            f"{module} imports {f'{source}.{name}'.rstrip('.')}"
            for module in FILES
            for source, name, node in imports_of(module)
            if rule(module, source, name, node)
        }
    )


def test_every_room_has_a_floor():
    assert {room_of(module) for module in FILES} == set(FLOOR)


def test_rooms_import_from_lower_floors_only():
    """So the core never imports a method, no method a benchmark, and no two rooms import each other."""

    def points_up(module, source, name, node):
        importer, imported = room_of(module), room_of(source)
        return importer != imported and FLOOR[imported] >= FLOOR[importer]

    assert violations(points_up) == []


def test_rooms_import_each_other_through_the_face():
    """``from condense.room import name``, where the room exports the name or it is one of its modules."""

    def bypasses(module, source, name, node):
        if room_of(module) == room_of(source) or not source:
            return False
        parts = source.split(".")
        if not name:  # a module, which must lie directly in its room
            return len(parts) > 3 and FILES[source].name != "__init__.py"
        if len(parts) > 2 and room_of(source) not in ("methods", "benchmarks"):
            return True
        return FILES[source].name == "__init__.py" and name not in exported(source)

    def exported(package):
        return getattr(importlib.import_module(package), "__all__", ())

    assert violations(bypasses) == []


def test_no_private_name_crosses_files():
    def is_private(module, source, name, node):
        return name.startswith("_") and not name.startswith("__")

    assert violations(is_private) == []
    for module, path in FILES.items():
        tree = ast.parse(path.read_text())
        imported = [
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "condense"
            for alias in node.names
            if f"{node.module}.{alias.name}" in FILES
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                assert not node.attr.startswith("_"), f"{module} uses {node.value.id}.{node.attr}"


def test_no_files_import_each_other():
    """Imports inside functions and for type checkers count, so that none hides a cycle."""
    graph = {module: {source for source, _, _ in imports_of(module)} & set(FILES) for module in FILES}
    while graph:
        free = {module for module, sources in graph.items() if not sources & set(graph)}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {module: sources for module, sources in graph.items() if module not in free}


def test_imports_are_at_the_top():
    """Except in the command line, whose help must not import torch, and in the names that `import condense` gives."""

    def is_deferred(module, source, name, node):
        return node.col_offset > 0 and room_of(module) not in ("cli", "")

    assert violations(is_deferred) == []
