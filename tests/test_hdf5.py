"""condense.hdf5: the digest of a file, files of earlier versions, manifests, and files that are more than their own
bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re

import h5py
import numpy as np
import pytest

from condense import hdf5
from condense.benchmarks import damage
from condense.errors import CondenseError
from condense.hdf5 import OBJECT_LIMIT, check_self_contained
from condense.sets import DistilledSet

FORMAT = hdf5.Format(
    "condense.example",
    1,
    {
        "type": "object",
        "required": ["name", "count"],
        "properties": {
            "name": hdf5.NAME_SCHEMA,
            "count": {"type": "integer"},
            "rate": {"type": ["number", "null"]},
            "classes": hdf5.CLASSES_SCHEMA,
        },
    },
    maker="condense example",
)

MANIFEST = {"name": "a", "count": 3}


def example(path, manifest=MANIFEST, form=FORMAT, size=1000):
    """Writes a file with one array."""
    with hdf5.create_hdf5(path, form) as file:
        hdf5.write_manifest(file, form, manifest)
        file["group/values"] = np.arange(size)
    return path


def read(path, form=FORMAT, **options):
    with hdf5.open_hdf5(path, form, **options) as (file, manifest):
        return manifest, file["group/values"][()]


def refusal(path, form=FORMAT):
    with pytest.raises(CondenseError) as fault:
        read(path, form)
    assert str(fault.value).startswith(f"{path}: ") and "\n" not in str(fault.value)
    return str(fault.value)


def test_a_file_begins_with_its_size_and_the_digest_of_everything_else(tmp_path):
    content = example(tmp_path / "a.h5").read_bytes()
    text, rest = content[:512].decode(), content[512:]
    assert text.isascii() and text.endswith("\n") and rest.startswith(b"\x89HDF")
    lines = text.rstrip().split("\n")
    assert lines[:2] == ["condense.example file, HDF5 from byte 512", f"bytes {len(content)}"]
    assert lines[2:] == [f"sha256 {hashlib.sha256(rest).hexdigest()}"]
    manifest, values = read(tmp_path / "a.h5")
    assert manifest == MANIFEST and np.array_equal(values, np.arange(1000))
    assert hdf5.read_format(tmp_path / "a.h5") == "condense.example"


def test_every_flipped_bit_of_the_user_block_and_of_some_other_bytes_is_refused(tmp_path):
    path = example(tmp_path / "a.h5")
    content = path.read_bytes()
    for position in [*range(512), *range(512, len(content), 97)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        refusal(path)


@pytest.mark.parametrize("change", ["shorter", "longer", "within the user block", "empty", "other"])
def test_files_of_another_size_or_format_are_refused(tmp_path, change):
    path = example(tmp_path / "a.h5")
    content = path.read_bytes()
    changed = {"shorter": content[:-1], "longer": content + b"x", "within the user block": content[:100], "empty": b""}
    path.write_bytes(changed.get(change, content))
    if change == "other":
        assert "another format (condense.example)" in refusal(path, dataclasses.replace(FORMAT, name="condense.other"))
    else:
        assert ("not an HDF5 file" if change == "empty" else "truncated or damaged") in refusal(path)


def test_one_array_with_checksums_of_its_own_can_be_left_out_of_the_digest(tmp_path):
    form = dataclasses.replace(FORMAT, separate="group/values")
    path = example(tmp_path / "a.h5", form=form)
    content = path.read_bytes()
    start, end = map(int, re.search(b"not in the sha256: (\\d+)-(\\d+)", content[:512]).groups())
    assert end - start == 8000 and np.array_equal(np.frombuffer(content[start:end], np.int64), np.arange(1000))
    for position, is_covered in ((start, False), (end - 1, False), (start - 1, True), (512, True)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        if is_covered:
            refusal(path, form)
        else:
            read(path, form)
    # A digest that leaves out anything else is refused.
    block = hdf5.UserBlock(form.name, len(content), (start - 1, end))
    path.write_bytes(content)
    digest = block.sha256(path)
    path.write_bytes(block.text(digest) + content[512:])
    assert "leaves out other bytes" in refusal(path, form)


# -- files of earlier versions ----------------------------------------------------------------------------------------


def earlier(path, **attributes):
    """A file without a user block, with attributes of variable length."""
    text = json.dumps(MANIFEST)
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.attrs["format"], file.attrs["version"] = "condense.example", 1
        file.attrs["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        file.attrs["manifest"] = np.bytes_(text)
        file["group/values"] = np.arange(10)
        for name, value in attributes.items():
            file.attrs[name] = value
    return path


def test_a_file_of_an_earlier_version_opens(tmp_path):
    path = earlier(tmp_path / "a.h5")
    manifest, values = read(path)
    assert manifest == MANIFEST and np.array_equal(values, np.arange(10))
    assert hdf5.read_format(path) == "condense.example"


def test_a_file_of_an_earlier_version_on_which_the_library_loops_is_refused(tmp_path):
    path = earlier(tmp_path / "a.h5")
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")  # texts of variable length: the library follows the sizes in it
    content[heap + 16 : heap + 528] = bytes(512)
    path.write_bytes(content)
    assert "the HDF5 library cannot parse it" in refusal(path)
    with pytest.raises(CondenseError, match="the HDF5 library cannot parse it"):
        hdf5.read_format(path)


def test_attributes_are_checked_before_they_are_read(tmp_path):
    path = example(tmp_path / "a.h5")
    for name, value, expected in (
        ("format", "condense.example", "'format' has no fixed length"),
        ("format", np.bytes_("x" * 2000), "'format' is larger than 1024 bytes"),
        ("version", np.arange(3), "'version' is neither a text nor a number"),
        ("version", 1.5, "'version' is neither a text nor a number"),
        ("manifest", np.arange(3), "'manifest' is neither a text nor a number"),
        ("manifest_sha256", 3, "the manifest is damaged"),
    ):
        with h5py.File(path, "r+") as file:
            before = file.attrs[name]
            file.attrs[name] = value
        hdf5.write_user_block(path, FORMAT)
        assert expected in refusal(path)
        with h5py.File(path, "r+") as file:
            file.attrs[name] = before


# -- manifests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ('{"name": "a"}', "no proper 'count'"),
        ("[1]", "no proper '' ([1] is not of type 'object')"),
        ('{"name": 3, "count": 3}', "'name' (3 is not of type 'string')"),
        ('{"name": "a\\u001b[2J", "count": 3}', "'name'"),
        ('{"name": "\\ud800", "count": 3}', "'name'"),
        ('{"name": "a", "count": true}', "'count' (True is not of type 'integer')"),
        ('{"name": "a", "count": 123456789012345678901234567890}', "'count'"),
        ('{"name": "a", "count": 3, "rate": NaN}', "'rate'"),
        ('{"name": "a", "count": 3, "rate": 1e999}', "'rate'"),
        ('{"name": "a", "count": 3, "rate": "fast"}', "'rate'"),
        ('{"name": "a", "count": 3, "classes": ["a", "a"]}', "'classes'"),
        ('{"name": "a", "count": 3, "classes": ["a", ""]}', "'classes.1'"),
        ('{"name": "a", "count": 3, "classes": []}', "'classes'"),
        ('{"name": "a", "count": ' + "9" * 5000 + "}", "truncated or damaged"),
        ("[" * 100000, "truncated or damaged"),
        ('{"name": "a", "count"', "truncated or damaged"),
    ],
)
def test_manifests_that_do_not_fit_the_schema_are_refused(tmp_path, change, expected):
    path = example(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["manifest"] = np.bytes_(change)
        file.attrs["manifest_sha256"] = np.bytes_(hashlib.sha256(change.encode()).hexdigest())
    hdf5.write_user_block(path, FORMAT)
    line = refusal(path)
    assert expected in line and line.isprintable() and len(line) < 400


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path):
    with contextlib.suppress(OSError), pytest.raises(CondenseError, match="cannot be stored without a proper 'count'"):
        example(tmp_path / "a.h5", {"name": "a", "count": "three"})


def test_entries_that_no_command_reads_are_free(tmp_path):
    manifest = {**MANIFEST, "note": [float("inf"), "\ud800", 10**30]}
    assert read(example(tmp_path / "a.h5", manifest))[0] == manifest


# -- files that are more than their own bytes -------------------------------------------------------------------------


def external_storage(file):
    file.create_dataset("images", (10,), "u1", external=[("/etc/hostname", 0, 10)])


def external_link(file):
    file["group/images"] = h5py.ExternalLink("other.h5", "/secret")


def soft_link(file):
    file["real"] = np.zeros(3)
    file["images"] = h5py.SoftLink("/real")


def dangling_link(file):
    file["deep/group/images"] = h5py.SoftLink("/nothing")


def virtual(file):
    layout = h5py.VirtualLayout((10,), "u1")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (10,))
    file.create_virtual_dataset("group/images", layout)


def references(file):
    file.create_dataset("images", (2,), h5py.ref_dtype)


def references_in_a_compound(file):
    file.create_dataset("images", (2,), np.dtype([("count", "i4"), ("region", h5py.regionref_dtype)]))


def references_of_variable_length(file):
    file.create_dataset("images", (2,), h5py.vlen_dtype(h5py.ref_dtype))


@pytest.mark.parametrize("layout", [None, ("v110", "v110")])
@pytest.mark.parametrize(
    "fault",
    [
        external_storage,
        external_link,
        soft_link,
        dangling_link,
        virtual,
        references,
        references_in_a_compound,
        references_of_variable_length,
    ],
)
def test_files_that_are_not_self_contained_are_refused(tmp_path, fault, layout):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver=layout) as file:
        file["labels"] = np.arange(10)
        fault(file)
    with h5py.File(path) as file, pytest.raises(CondenseError) as error:
        check_self_contained(path, file)
    assert "x.h5" in str(error.value) and "images'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layout", [None, ("v110", "v110")])
def test_plain_files_of_any_depth_pass_and_cycles_end(tmp_path, layout):
    with h5py.File(tmp_path / "x.h5", "w", libver=layout) as file:
        file["images"] = np.zeros((3, 2))
        file["compressed"] = file.create_dataset("chunked", (100,), "f4", chunks=(10,), compression="gzip")
        file["texts"] = np.array(["a", "b"], dtype=object)
        file["type"], file["empty"] = np.dtype("f4"), h5py.Empty("f4")
        file["group/root"] = file["/"]
        group = file
        for _ in range(1200):
            group = group.create_group("g")
        check_self_contained(tmp_path / "x.h5", file)
        group["end"] = h5py.ExternalLink("other.h5", "/secret")
        with pytest.raises(CondenseError, match="end' is a soft or external link"):
            check_self_contained(tmp_path / "x.h5", file)


def test_number_of_objects_is_bounded(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w", libver=("v110", "v110")) as file:
        file["a"] = 0
        for index in range(OBJECT_LIMIT):
            file.id.links.create_hard(b"%d" % index, file.id, b"a")
        with pytest.raises(CondenseError, match=f"more than {OBJECT_LIMIT} objects"):
            check_self_contained(tmp_path / "x.h5", file)


@pytest.mark.parametrize("kind", ["soft", "teacher", "per-view"])
def test_a_set_with_the_other_byte_order_is_the_same_set(tmp_path, kind, monkeypatch):
    path = damage.make_set(tmp_path, kind)
    made = DistilledSet.load(path)
    swapped = {n: a.astype(a.dtype.newbyteorder()) if a.ndim else a for n, a in made.arrays().items()}
    monkeypatch.setattr(made, "arrays", lambda: swapped)
    other = DistilledSet.load(made.save(tmp_path / "other.h5"))
    assert other.sha256() == DistilledSet.load(path).sha256()
    assert all(array.dtype.isnative for array in other.arrays().values())
