"""Image folders: finds the files of each class and lists the train and the test split."""

from __future__ import annotations

import math
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from condense.data.decoding import (
    FULL_RANGE,
    decode_images,
    image_formats,
    image_to_array,
    is_grey,
    largest_value,
    range_note,
    read_image,
    uses_16_bits,
    white_of,
)
from condense.data.loaded import (
    CLASS_WORD,
    DataOptions,
    PartFolder,
    Split,
    check_resize,
    format_some,
    parse_split,
    stratified_rows,
)
from condense.device import check_host_memory
from condense.errors import CondenseError, did_you_mean
from condense.formatting import by

MODE_SAMPLE = 1000
"""Maximum number of train files that decide between grey and RGB and give the range of 16-bit images, evenly spaced."""

ROLES: dict[str, Sequence[str]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "val": ("val", "valid", "validation", "dev"),
}
"""Words in the names of folders that say which part of the data they hold; of two test folders the first is taken."""

ANNOTATIONS_LIMIT = 64 * 2**20
"""Maximum size of Tiny ImageNet's file of validation labels in bytes."""

UNLABELLED = "image"
"""The class of all images of a folder that is read without classes."""

MAX_PIXELS = 2**24
"""Maximum number of pixels of an image that is used in its own size."""

IGNORED = ("thumbs.db", "desktop.ini")
"""Files that file managers leave behind."""


class ImageFile(NamedTuple):
    """An image file with its label, and what identifies its content."""

    path: str
    label: int
    size: int
    changed: tuple[int, int]
    """Times of modification and of the last status change, in ns. Some archives set the first to a constant."""


@dataclass(frozen=True)
class FolderListing:
    """Classes and files of an image folder."""

    root: Path
    classes: tuple[str, ...]
    train: list[ImageFile]
    test: list[ImageFile]
    unused: str = ""
    """What of the folder is not used, as text: files by their suffix, and folders."""


class Unused:
    """Counts what a listing leaves out."""

    def __init__(self) -> None:
        self.suffixes: Counter[str] = Counter()
        self.outside = 0
        """Images beside the class folders."""
        self.folders: list[str] = []

    def __str__(self) -> str:
        counts = [f"{count} {suffix or 'without a suffix'}" for suffix, count in self.suffixes.most_common()]
        parts = [f"files that are no images ({format_some(counts)})"] if counts else []
        parts += [f"{self.outside} images outside the class folders"] if self.outside else []
        parts += [f"the folders {format_some([f'{name}/' for name in self.folders])}"] if self.folders else []
        return ", ".join(parts)


def _folders(folder: Path) -> list[str]:
    """Names of the visible folders inside, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")))


def _files(folder: str, label: int, unused: Unused) -> list[ImageFile]:
    """Image files at any depth below ``folder``, sorted by path.

    Raises:
        CondenseError: a file with the name of an image is a pipe, socket or device, or links lead to one folder twice.
    """
    suffixes = image_formats()
    files = []
    pending, visited = [folder], set()
    while pending:
        current = pending.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in visited:  # links could otherwise make endless or exponential trees
            raise CondenseError(f"'{current}' is a folder that was already listed under another name; remove the link")
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                if entry.is_dir():
                    pending.append(entry.path)
                elif suffix in suffixes:
                    status = entry.stat()
                    if not stat.S_ISREG(status.st_mode):  # reading it could wait for ever
                        raise CondenseError(f"'{entry.path}' is a pipe, socket or device, not an image; remove it")
                    files.append(ImageFile(entry.path, label, status.st_size, (status.st_mtime_ns, status.st_ctime_ns)))
                elif entry.name.lower() not in IGNORED:
                    unused.suffixes[suffix] += 1
    files.sort()
    return files


def _images_in(folder: Path) -> int:
    """Number of files with the name of an image directly in a folder."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    return sum(os.path.splitext(name)[1].lower() in image_formats() for name in names)


SUFFIXES = ("", "set", "data", "dataset", "images", "imgs", "split")
"""Words that may follow a word of ``ROLES`` without a separator, as in traindata."""


def split_role(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The part of the data that a folder's name states, and its other words; ``seg_Train`` is ("train", ("seg",)).

    None if the name has none of the words in ``ROLES``, or several.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", name)]
    roles = [
        (role, word)
        for word in words
        for role, known in ROLES.items()
        if any(word == start + end for start in known for end in SUFFIXES)
    ]
    if len(roles) != 1:
        return None
    return roles[0][0], tuple(word for word in words if word != roles[0][1])


def _find_parts(root: Path, unused: Unused) -> list[PartFolder]:
    """The train part of an image folder, and the test part if it has one, by the names of its folders.

    Raises:
        CondenseError: the names do not decide; the message names the readings and the option that does.
    """
    what = f"data folder '{root}'"
    folders = _folders(root)
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in folders:
        role = split_role(name)
        if role is not None:
            groups.setdefault(role[1], {}).setdefault(role[0], []).append(name)
    plain = groups.pop((), {})
    pairs = [group for group in groups.values() if "train" in group and len(group) > 1]
    if plain and "train" not in plain and not pairs:
        name = sorted(plain.items())[0][1][0]
        others = [other for other in folders if other != name]
        train = next((other for other in others if (role := split_role(other)) and role[0] == "train"), "TRAIN")
        raise CondenseError(
            f"{what}: has {name}/ but no train/; split={train},{name} names the folders of the parts, split=CLASS "
            "makes every folder a class"
        )
    if "train" not in plain and len(pairs) > 1:
        names = [name for group in pairs for name in group["train"]]
        raise CondenseError(f"{what}: has {' and '.join(names)}; split=TRAIN,TEST names the folders to use")
    if "train" not in plain and not pairs:
        for group in groups.values():
            for name in group.get("train", []):
                if len(_folders(root / name)) > 1:
                    raise CondenseError(
                        f"{what}: {name}/ may hold the class folders of the train images, or be a class itself; give "
                        f"split={name},TEST with the folder of the test images, split={name} or split=CLASS"
                    )
        return [PartFolder(())]
    group = plain if "train" in plain else pairs[0]
    classes = {name for train in group["train"] for name in _folders(root / train)}
    tests = group.get("test", []), group.get("val", [])
    labelled = [[name for name in names if classes & set(_folders(root / name))] for names in tests]
    test_names = labelled[0] or labelled[1] or tests[0] or tests[1]
    for names in (group["train"], test_names):
        if len(names) > 1:
            raise CondenseError(f"{what}: has {' and '.join(names)}; split=TRAIN,TEST names the folders to use")
    chosen = [*group["train"], *test_names]
    unused.folders += [name for name in folders if name not in chosen]
    similar = [name for name in unused.folders if classes & set(_folders(root / name))]
    if similar and not test_names:
        raise CondenseError(
            f"{what}: {similar[0]}/ has the class folders of {chosen[0]}/; give split={chosen[0]},{similar[0]} if it "
            f"holds the test images, or split={chosen[0]} to leave it out"
        )
    return [PartFolder(_without_wrapper(root, name)) for name in chosen]


def _without_wrapper(root: Path, name: str) -> tuple[str, ...]:
    """A part's folder below ``root``, or the only folder inside it if that names the same part (train/train/)."""
    names: tuple[str, ...] = (name,)
    while True:
        inner = _folders(root.joinpath(*names))
        role = split_role(inner[0]) if len(inner) == 1 else None
        if role is None or role != split_role(name) or not _folders(root.joinpath(*names, inner[0])):
            return names
        names = (*names, inner[0])


def _class_names(root: Path, part: PartFolder) -> tuple[str, ...]:
    """Names of the class folders of a part, sorted.

    Raises:
        CondenseError: the folder does not exist, or has none.
    """
    folder = root.joinpath(*part.head)
    if not folder.is_dir():
        near = did_you_mean(part.head[-1], _folders(folder.parent) if folder.parent.is_dir() else [])
        raise CondenseError(f"data folder '{folder}': no such folder{near}")
    classes = tuple(_folders(folder))
    if not classes:
        with os.scandir(folder) as entries:
            state = "is empty" if next(entries, None) is None else "holds no class folders"
        raise CondenseError(
            f"data folder '{folder}' {state}; expected train/<class>/* and test/<class>/*, or <class>/*; "
            "split=TRAIN,TEST names other folders, split=CLASS makes every folder a class"
        )
    return classes


def _class_files(
    root: Path, part: PartFolder, classes: Sequence[str], unused: Unused, allow_empty: bool = False
) -> list[ImageFile]:
    """Image files of the classes of a part, by class and then by path.

    Raises:
        CondenseError: a class has none, unless ``allow_empty``.
    """
    files = []
    folder = root.joinpath(*part.head)
    unused.outside += _images_in(folder)
    for label, name in enumerate(classes):
        place = folder.joinpath(name, *part.tail)
        of_class = _files(str(place), label, unused) if place.is_dir() else []
        if not of_class and not allow_empty:
            inside = f" in {'/'.join(part.tail)}/" if part.tail else ""
            raise CondenseError(
                f"data folder '{folder}': class '{name}' has no images{inside} (of a type that Pillow reads); "
                "drop_empty=true leaves such classes out"
            )
        files += of_class
    return files


def _check_subfolders(root: Path, parts: Sequence[PartFolder], classes: Sequence[str], train: list[ImageFile]) -> None:
    """Checks that the classes do not consist of equal sub-folders, such as images/ and masks/, or train/ and test/.

    Raises:
        CondenseError: they do; the message names the readings and the option that decides.
    """
    folder = root.joinpath(*parts[0].head)
    owners: dict[str, set[int]] = {}
    names_of: dict[int, set[str]] = {}
    for directory, label in {(os.path.dirname(file.path), file.label) for file in train}:
        names = os.path.relpath(directory, folder / classes[label]).lower().split(os.sep)
        owners.setdefault("/".join(names), set()).add(label)
        if len(names) > 1:  # "*" keeps dog/husky/images apart from dog/images
            owners.setdefault(f"*/{names[-1]}", set()).add(label)
        names_of.setdefault(label, set()).add(names[0])
    shared = sorted(name for name, labels in owners.items() if len(labels) > 1)
    groups = [name for name in shared if not name.startswith("*/")], [name for name in shared if name.startswith("*/")]
    roles = [{role[0] for role in map(split_role, names) if role is not None} for names in names_of.values()]
    has_parts = any("train" in found and len(found) > 1 for found in roles)  # train/ and test/ in a class
    if not has_parts and max(map(len, groups)) < 2:
        return
    prefixes = ["/".join([*part.head, CLASS_WORD]) for part in parts]
    readings = [f"split={','.join(prefixes)} takes all images below each as one class"]
    if has_parts:
        inside = sorted({name for found in names_of.values() for name in found if split_role(name)})
        by_role = {role[0]: name for name in inside if (role := split_role(name)) is not None}
        train_name, test_name = by_role["train"], by_role.get("test") or by_role["val"]
        readings.append(
            f"split={prefixes[0]}/{train_name},{prefixes[0]}/{test_name} takes these as train and test images"
        )
    else:
        inside = [name for name in max(groups, key=len) if name != "."]
        if not inside[0].startswith("*/"):
            only = ",".join(f"{prefix}/{inside[0]}" for prefix in prefixes)
            readings.append(f"split={only} takes only {inside[0]}/ of each")
    if len(parts) == 1 and len(classes) == 2 and not parts[0].head and not has_parts:
        ordered = sorted(classes, key=lambda name: not name.lower().startswith("tr"))
        readings.append(f"split={','.join(ordered)} takes them as train and test images, the sub-folders as classes")
    facts = f"the folders {format_some(classes, 3)} have equal sub-folders ({format_some(inside, 3)})"
    raise CondenseError(f"data folder '{folder}': {facts}; {'; '.join(readings)}")


def list_folder(root: Path, options: DataOptions | None = None) -> FolderListing:
    """Lists an image folder: ``train/<class>/*`` and ``test/<class>/*``, or ``<class>/*``.

    The parts may have other usual names (see ``ROLES``) in any case, with equal other words (``seg_train``,
    ``seg_test``). Without a test folder, or with class folders directly in ``root``, every class is split. Classes are
    numbered in sorted order. Tiny ImageNet's layout, whose validation labels are in a text file, is supported too.

    Args:
        root: the folder.
        options: ``split`` and ``drop_empty``.

    Raises:
        CondenseError: no class folders, only one, an empty one, different classes in train and test, or a layout that
            can be read in several ways.
    """
    options = options or DataOptions()
    what, unused = f"data folder '{root}'", Unused()
    if options.unlabelled:
        return _list_unlabelled(root, unused)
    parts = parse_split(options.split) if options.split else _find_parts(root, unused)
    train_part, train_name = parts[0], "/".join(parts[0].head)
    classes = _class_names(root, train_part)
    if len(classes) == 1:
        raise CondenseError(
            f"data folder '{root.joinpath(*train_part.head)}': only one class, '{classes[0]}'; give at least two, or "
            "the folder that holds them"
        )
    unused.outside += _images_in(root) if train_part.head else 0
    train = _class_files(root, train_part, classes, unused, options.drop_empty)
    if not options.split:
        _check_subfolders(root, parts, classes, train)
    annotations = root / "val" / "val_annotations.txt"
    test_part = parts[1] if len(parts) > 1 else None
    test: list[ImageFile] = []
    if annotations.is_file() and not options.split:
        test, unused.folders = _annotated(root / "val", classes, unused), []
    elif test_part is not None:
        test_name, test_classes = "/".join(test_part.head), _class_names(root, test_part)
        if set(test_classes) != set(classes) and not options.drop_empty:
            only_train, only_test = sorted(set(classes) - set(test_classes)), sorted(set(test_classes) - set(classes))
            differences = [
                f"{where}/ alone has {format_some(names)}"
                for where, names in ((train_name, only_train), (test_name, only_test))
                if names
            ]
            raise CondenseError(
                f"{what}: {train_name}/ and {test_name}/ differ in their classes: {'; '.join(differences)}; "
                f"split={train_name} uses {train_name}/ alone, drop_empty=true the classes of {train_name}/"
            )
        test = _class_files(root, test_part, classes, unused, options.drop_empty)
        unused.folders += [f"{test_name}/{name}" for name in test_classes if name not in classes]
    if options.drop_empty:
        classes, train, test = _drop_empty(classes, train, test, what, unused)
    if test_part is None and not test:
        rows = stratified_rows(np.array([file.label for file in train]), classes, what, "data")
        train, test = ([train[row] for row in part] for part in rows)
        return FolderListing(root, classes, train, test, str(unused))
    if not test:
        raise CondenseError(f"{what}: no test images of the classes of {train_name}/; split={train_name} splits these")
    return FolderListing(root, classes, train, test, str(unused))


def _list_unlabelled(root: Path, unused: Unused) -> FolderListing:
    """All images below a folder as one class."""
    if not root.is_dir():
        raise CondenseError(f"data folder '{root}': no such folder")
    files, classes = _files(str(root), 0, unused), (UNLABELLED,)
    if len(files) < 2:
        raise CondenseError(f"data folder '{root}': {len(files)} images below it; give at least two")
    rows = stratified_rows(np.zeros(len(files), dtype=np.int64), classes, f"data folder '{root}'", "data")
    train, test = ([files[row] for row in part] for part in rows)
    return FolderListing(root, classes, train, test, str(unused))


def _drop_empty(
    classes: tuple[str, ...], train: list[ImageFile], test: list[ImageFile], what: str, unused: Unused
) -> tuple[tuple[str, ...], list[ImageFile], list[ImageFile]]:
    """The classes that have train images, with the files of both parts."""
    kept = sorted({file.label for file in train})
    if len(kept) < 2:
        raise CondenseError(f"{what}: {len(kept)} of its classes have train images; give at least two")
    unused.folders += [name for label, name in enumerate(classes) if label not in kept]
    numbers = {label: number for number, label in enumerate(kept)}
    train, test = (
        [file._replace(label=numbers[file.label]) for file in files if file.label in numbers] for files in (train, test)
    )
    return tuple(classes[label] for label in kept), train, test


def read_images(folder: Path, options: DataOptions) -> tuple[tuple[str, ...], Split]:
    """Reads every image of ``<class>/*`` or ``train/<class>/*`` as one split, uint8.

    This is for distilled sets: classes are not split into train and test, and nothing is cached. The option ``split``
    names another folder than train/ (in any case, or a synonym).

    Returns:
        Names of the class folders, and the split.

    Raises:
        CondenseError: no class folders, equal sub-folders in them, or a file that is not an image or has a different
            size.
    """
    if not folder.is_dir():
        raise CondenseError(f"'{folder}' is no folder; give one with <class>/* or train/<class>/*")
    part = PartFolder(())
    if options.split:
        part = parse_split(options.split)[0]
    else:  # a class may be called train
        trains = [name for name in _folders(folder) if split_role(name) == ("train", ()) and _folders(folder / name)]
        if len(trains) > 1:
            raise CondenseError(f"'{folder}' has {' and '.join(trains)}; split=NAME names the folder to use")
        part = PartFolder(tuple(trains))
        if not trains and not _folders(folder):
            raise CondenseError(f"'{folder}' holds no class folders; expected <class>/* or train/<class>/*")
    classes = _class_names(folder, part)
    files = _class_files(folder, part, classes, Unused())
    if not options.split:
        _check_subfolders(folder, [part], classes, files)
    shape, mode, white, _ = decoded_format(files, options)
    check_host_memory(2 * len(files) * math.prod(shape), f"{len(files)} images of {by(shape)}", "give resize=N")
    chunks = list(decode_images([file.path for file in files], shape, mode, options.resizing("train"), white))
    return classes, Split(np.concatenate(chunks), labels_of(files))


class DecodedFormat(NamedTuple):
    """To what all files of a folder are decoded."""

    shape: tuple[int, ...]
    """(C,H,W)."""
    mode: str
    """``L`` or ``RGB``."""
    white: int
    """Value of 16-bit grey that becomes 255."""
    note: str
    """How 16-bit images that do not use all bits are scaled, unless the user said so."""


def decoded_format(files: Sequence[ImageFile], options: DataOptions) -> DecodedFormat:
    """Format to which all files are decoded: from ``options``, a sample of the files, and the size of the first one.

    Grey is chosen where more than half of the sample (see ``MODE_SAMPLE``) is grey.

    Raises:
        CondenseError: a file cannot be read, the images do not fit in memory, or 16-bit colour would become almost
            black.
    """
    resizing = options.resizing("train")
    if resizing:  # one image, as it is decoded
        what = f"resize={resizing.shorter}: images of {by(resizing)}"
        check_host_memory(32 * resizing.shorter**2, what, "lower it")
    width, height = read_image(files[0].path, lambda image: image.size)
    for part in ("train", "test"):
        check_resize(options.resizing(part), height, width)
    if resizing is None and width * height > MAX_PIXELS:
        raise CondenseError(f"'{files[0].path}' has {width}x{height} pixels; give resize=N to bring all images to NxN")
    sampled = [read_image(file.path, _sample) for file in sampled_files(files)]
    grey = sum(is_grey(mode) for mode, _ in sampled)
    mode = "L" if options.grey or (options.grey is None and 2 * grey > len(sampled)) else "RGB"
    white = 2**options.bits - 1 if options.bits else FULL_RANGE
    if options.bits is None:
        by_kind = [
            [largest for mode, largest in sampled if largest is not None and mode.startswith("I") == is_kept]
            for is_kept in (True, False)
        ]
        white = white_of(max(by_kind[0])) if by_kind[0] else FULL_RANGE
        if by_kind[1] and white_of(max(by_kind[1])) < FULL_RANGE:
            bits = white_of(max(by_kind[1])).bit_length()
            raise CondenseError(
                f"'{files[0].path}' and others are 16-bit colour that uses at most {bits} bits, of which Pillow keeps "
                f"{bits - 8}; save them with 8 bits per channel, or give bits=16 to use them as they are"
            )
    shape = read_image(files[0].path, lambda image: image_to_array(image, mode, resizing, white)).shape
    return DecodedFormat(shape, mode, white, "" if options.bits else range_note(white))


def sampled_files(files: Sequence[ImageFile]) -> list[ImageFile]:
    """The sample of the files that :func:`decoded_format` opens; that of a sample is the sample itself."""
    return [files[row] for row in np.unique(np.linspace(0, len(files) - 1, MODE_SAMPLE).astype(int))]


def _sample(image: Any) -> tuple[str, int | None]:
    """The mode of an image, and its largest value if it has more than 8 bits per channel."""
    return image.mode, largest_value(image) if uses_16_bits(image) else None


def _annotated(folder: Path, classes: Sequence[str], unused: Unused) -> list[ImageFile]:
    """Tiny ImageNet's validation images, by class and then by name."""
    numbers = {name: number for number, name in enumerate(classes)}
    label_of = {}
    annotations = folder / "val_annotations.txt"
    if annotations.stat().st_size > ANNOTATIONS_LIMIT:
        raise CondenseError(f"'{annotations}': larger than {ANNOTATIONS_LIMIT >> 20} MiB")
    for line in annotations.read_text(errors="replace").splitlines():
        name, _, rest = line.partition("\t")
        label = numbers.get(rest.split("\t")[0])
        if label is not None:
            label_of[name] = label
    labelled = [
        file._replace(label=label_of[os.path.basename(file.path)])
        for file in _files(str(folder / "images"), 0, unused)
        if os.path.basename(file.path) in label_of
    ]
    empty = sorted(set(range(len(classes))) - {file.label for file in labelled})
    if empty:
        raise CondenseError(f"data folder '{folder}': class '{classes[empty[0]]}' has no images")
    return sorted(labelled, key=lambda file: (file.label, file.path))


def labels_of(files: Sequence[ImageFile]) -> np.ndarray:
    """Labels of files, int64 (N,)."""
    return np.array([file.label for file in files], np.int64)
