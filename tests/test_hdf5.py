"""condense.hdf5: files that are more than their own bytes are refused before anything in them is read."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from condense.errors import CondenseError
from condense.hdf5 import OBJECT_LIMIT, check_self_contained


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
