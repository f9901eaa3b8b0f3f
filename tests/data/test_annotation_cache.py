"""Annotations that are kept: as if they had been read anew, or read anew."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flat_sets import everything, never_flattened, plain
from hypothesis import given
from mistakes import HEIGHT, WIDTH, mistakes, quiet, valid, write

from fastmrcnn.config.file import load_config
from fastmrcnn.data import annotation_cache, flat_file
from fastmrcnn.data.annotation_cache import AnnotationCache, ContentOptions, name_of, remove_oldest
from fastmrcnn.data.build import annotation_cache as configured
from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.flat import ArraysInMemory
from fastmrcnn.data.flat_file import DamagedError, MappedArrays, open_arrays
from fastmrcnn.data.keypoints import KeypointOptions
from fastmrcnn.data.loader import TrainLoader
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.errors import UserError

OPTIONS: list[dict[str, Any]] = [
    {},
    {"boxes": "masks", "require_masks": False, "min_box_side": 9.0},
    {"require_masks": False, "keypoints": KeypointOptions(least=2), "keep_group_classes": True},
]


def keeping(folder: Path) -> AnnotationCache:
    return AnnotationCache(folder / "kept", least_bytes=0)


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "kept").glob("*.annotations"))


def read(file: Path, cache: AnnotationCache | None, **options: Any) -> CocoDataset:
    return read_coco(file.parent / "images", file, cache=cache, **options)


def outcome(file: Path, cache: AnnotationCache | None, **options: Any) -> Any:
    """All of the set, or why it was refused."""
    try:
        return everything(read(file, cache, **options))
    except UserError as error:
        return str(error)


def is_mapped(dataset: CocoDataset) -> bool:
    return isinstance(dataset.records.arrays, MappedArrays)  # type: ignore[attr-defined]


def check(folder: Path, tree: Any) -> None:
    """Read without keeping, for the first time, and from what was kept: the same."""
    file, cache = write(folder, tree), keeping(folder)
    for options in OPTIONS:
        with never_flattened(folder / "images", file) as before:
            found = outcome(file, None, **options)
        known = {path.name for path in kept(folder)}
        assert outcome(file, cache, **options) == found
        new = [path for path in kept(folder) if path.name not in known]
        assert outcome(file, cache, **options) == found
        if isinstance(found, str):
            continue  # what is refused may have been read without a mistake, such as one of an image
        assert is_mapped(read(file, cache, **options))
        ids = {record.image_id for record in read(file, None, **options).records}
        assert found[0] == [plain(record) for record in before if record.image_id in ids]
        for path in new:
            path.unlink()


def test_a_second_start_is_like_the_first(tmp_path: Path) -> None:
    check(tmp_path, valid())


def shared(factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a test."""
    folder = factory.getbasetemp() / "kept_mistakes"
    folder.mkdir(exist_ok=True)
    return folder


@quiet(max_examples=60)
@given(mistakes())
def test_so_it_is_with_mistakes(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    check(shared(tmp_path_factory), tree)


@pytest.mark.slow
@quiet(max_examples=1000)
@given(mistakes())
def test_so_it_is_with_many_mistakes(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    check(shared(tmp_path_factory), tree)


def test_findings_come_back_word_for_word(tmp_path: Path) -> None:
    tree = valid()
    first, second, third, fourth, _ = tree["annotations"]
    first["id"], second["id"], third["id"], fourth["id"] = "einß", 2.5, 10**20, None
    fourth["bbox"] = [0, 0, 1000, 1000]
    file = write(tmp_path, tree)
    direct = read(file, None)
    assert len(direct.findings) == 4
    one, two = (read(file, keeping(tmp_path)) for _ in range(2))
    assert direct.summary() == one.summary() == two.summary()
    assert [f.ids for f in direct.findings] == [f.ids for f in two.findings]
    assert is_mapped(two)


def test_errors_are_not_kept(tmp_path: Path) -> None:
    tree = valid()
    tree["annotations"][0]["bbox"] = [1, 2, 3]
    file = write(tmp_path, tree)
    for _ in range(2):
        with pytest.raises(UserError, match="annotation 1: bbox"):
            read(file, keeping(tmp_path))
    assert not kept(tmp_path)


def test_what_the_images_say_is_looked_at_each_time(tmp_path: Path) -> None:
    file = write(tmp_path, valid())
    read(file, keeping(tmp_path))
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(UserError, match="1 of 2 images not found"):
        read(file, keeping(tmp_path))
    with pytest.raises(UserError, match=r"2 objects, more than data\.max_objects = 1"):
        read(file, keeping(tmp_path), max_objects=1)
    assert len(kept(tmp_path)) == 1


def test_a_changed_file_is_never_taken_for_the_old_one(tmp_path: Path) -> None:
    """Also where its size and time are what they were."""
    tree = valid()
    file = write(tmp_path, tree)
    read(file, keeping(tmp_path))
    before = file.stat()
    tree["annotations"][0]["category_id"] = 1
    write(tmp_path, tree)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert read(file, keeping(tmp_path)).records[0].objects[0].class_index == 0
    other = file.with_name("other.json")
    file.rename(other)
    assert "other.json: 2 images" in read(other, keeping(tmp_path)).summary()[0]  # and the same content is
    assert len(kept(tmp_path)) == 2


def test_each_option_and_program_has_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, valid())
    ways = [
        ContentOptions(),
        ContentOptions(boxes="masks"),
        ContentOptions(min_box_side=1.0),
        ContentOptions(require_masks=True),
        ContentOptions(keep_group_classes=True),
        ContentOptions(keypoints=KeypointOptions()),
        ContentOptions(keypoints=KeypointOptions(flip_pairs=[])),
        ContentOptions(keypoints=KeypointOptions(flip_pairs=[("a", "b")])),
        ContentOptions(keypoints=KeypointOptions(offset=0.0)),
    ]
    names = {name_of(file, way) for way in ways}
    assert len(names) == len(ways)
    assert name_of(file, ContentOptions(keypoints=KeypointOptions(least=4))) in names  # of images, later
    fields = {*ContentOptions._fields, *KeypointOptions._fields} - {"keep_tree", "least", "keypoints"}
    assert fields == {
        "boxes", "min_box_side", "require_masks", "keep_group_classes", "flip_pairs", "offset",
    }, "an option that is not in the name gives what was read without it"  # fmt: skip
    monkeypatch.setattr(annotation_cache, "_program", lambda: "another")
    assert name_of(file, ContentOptions()) not in names


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """What comes out is right or an error, wherever the bit is."""
    file, cache = write(tmp_path, valid()), keeping(tmp_path)
    options: dict[str, Any] = {"require_masks": False, "keypoints": KeypointOptions()}
    right = outcome(file, None, **options)
    read(file, cache, **options)
    [path] = kept(tmp_path)
    whole = path.read_bytes()
    refused = anew = harmless = 0
    for place in range(0, len(whole), 5):
        broken = bytearray(whole)
        broken[place] ^= 1 << place // 5 % 8
        path.write_bytes(broken)
        found = outcome(file, cache, **options)
        if isinstance(found, str):
            assert "kept annotations are damaged" in found
            assert str(path) in found
            assert "start again" in found
            assert not path.exists()
            refused += 1
        else:
            assert found == right
            assert path.read_bytes() in (whole, bytes(broken))
            anew += path.read_bytes() == whole
            harmless += path.read_bytes() == bytes(broken)  # between the arrays
    assert min(refused, anew) > 20
    assert harmless < len(whole) / 5 / 4
    assert outcome(file, cache, **options) == right


@pytest.mark.parametrize("size", [0, 10, 31, 100, -1, -300, 1])
def test_a_file_that_is_not_whole_is_written_anew(tmp_path: Path, size: int) -> None:
    file, cache = write(tmp_path, valid()), keeping(tmp_path)
    right = everything(read(file, cache))
    [path] = kept(tmp_path)
    whole = path.read_bytes()
    broken = whole + b"\0" if size == 1 else whole[:size]
    path.write_bytes(broken)
    with pytest.raises(DamagedError):
        open_arrays(path)
    assert everything(read(file, cache)) == right
    assert path.read_bytes() == whole


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    file, cache = write(tmp_path, valid()), keeping(tmp_path)
    dataset = read(file, cache)
    [path] = kept(tmp_path)
    places = dataset.records.arrays._places  # type: ignore[attr-defined]
    os.truncate(path, places["words"][0])
    with pytest.raises(UserError, match=r"it has become shorter\); it has been removed"):
        list(dataset.records[0].objects)


def test_training_leaves_out_what_a_flipped_bit_concerns(tmp_path: Path) -> None:
    """All else is still what was written, and the next start writes the file anew."""
    paths = write_shapes(tmp_path, seed=3, train=6, val=1, size=48)
    given, cache = (paths["train_images"], paths["train_annotations"]), keeping(tmp_path)
    dataset = read_coco(*given, cache=cache)
    [path] = kept(tmp_path)
    places = dataset.records.arrays._places  # type: ignore[attr-defined]
    with path.open("r+b") as stream:
        stream.seek(places["words"][0])
        byte = stream.read(1)[0]
        stream.seek(places["words"][0])
        stream.write(bytes([byte ^ 4]))
    options: dict[str, Any] = {"batch": 2, "short_sides": [48], "long_side_max": 48, "steps": 6}
    left_out: dict[int, str] = {}
    for loaded in TrainLoader(dataset, max_broken=0.5, **options):
        left_out |= loaded.left_out
    first = next(record.image_id for record in dataset.records if record.objects)
    assert list(left_out) == [first]
    assert (
        f"{path}: kept annotations are damaged (its checksum of image {first} is another)" in left_out[first]
    )
    with pytest.raises(UserError, match="kept annotations are damaged"):
        list(TrainLoader(dataset, **options))
    assert everything(read_coco(*given, cache=cache)) == everything(read_coco(*given))
    assert kept(tmp_path) == [path]


def test_pickled_it_is_a_path(tmp_path: Path) -> None:
    """What a loader process is sent where it is not a copy of its parent."""
    file, cache = write(tmp_path, valid()), keeping(tmp_path)
    dataset = read(file, cache)
    sent = pickle.dumps(dataset.records.arrays)  # type: ignore[attr-defined]
    assert len(sent) < 1000
    assert b"words" not in sent
    assert everything(pickle.loads(pickle.dumps(dataset))) == everything(dataset)
    [path] = kept(tmp_path)
    path.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"cannot be opened .* while they are in use; start again"):
        pickle.loads(sent)
    assert len(list(dataset.records[0].objects)) == 2  # where it is open, it stays
    tree = valid()
    tree["categories"][0]["name"] = "sphere"
    read(write(tmp_path, tree), cache)
    [other] = kept(tmp_path)
    other.rename(path)
    with pytest.raises(UserError, match="is another while they are in use"):
        pickle.loads(sent)


def test_small_files_and_those_to_judge_by_are_not_kept(tmp_path: Path) -> None:
    file = write(tmp_path, valid())
    size = file.stat().st_size
    read(file, AnnotationCache(tmp_path / "kept", least_bytes=size + 1))
    dataset = read(file, keeping(tmp_path), keep_tree=True)
    assert dataset.tree is not None
    assert isinstance(dataset.records.arrays, ArraysInMemory)  # type: ignore[attr-defined]
    assert not (tmp_path / "kept").exists()
    read(file, AnnotationCache(tmp_path / "kept", least_bytes=size))
    assert len(kept(tmp_path)) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    file = write(tmp_path, valid())
    (tmp_path / "kept").write_text("a file")
    dataset = read(file, keeping(tmp_path))
    assert everything(dataset)[0] == everything(read(file, None))[0]
    line = dataset.summary()[-1]
    assert line.startswith(f"set.json: cannot be kept for the next start in {tmp_path / 'kept'} (")
    assert line.endswith("; data.cache=FOLDER names another place, and data.cache=off does without")
    assert sum("cannot be kept" in one for one in dataset.summary()) == 1


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(stream: Any, *_: Any) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    file = write(tmp_path, valid())
    monkeypatch.setattr(annotation_cache, "write_arrays", full)
    dataset = read(file, keeping(tmp_path))
    assert "(No space left on device)" in dataset.summary()[-1]
    assert everything(dataset)[0] == everything(read(file, None))[0]
    assert not list((tmp_path / "kept").iterdir())


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, valid())
    original = annotation_cache.read_contents

    def slow(*given: Any, **options: Any) -> Any:
        found = original(*given, **options)
        file.write_text(file.read_text() + " ")
        return found

    monkeypatch.setattr(annotation_cache, "read_contents", slow)
    assert len(read(file, keeping(tmp_path)).records) == 2
    assert not kept(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes that begin at once are forked")
def test_many_processes_at_once(tmp_path: Path) -> None:
    file, cache = write(tmp_path, valid()), keeping(tmp_path)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.SimpleQueue()

    def start() -> None:
        barrier.wait()
        results.put(outcome(file, cache))

    processes = [context.Process(target=start) for _ in range(6)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert found == [outcome(file, None)] * 6
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [kept(tmp_path)[0].name]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    for age, name in enumerate("abcd"):
        path = folder / f"{name}.annotations"
        path.write_bytes(bytes(1000))
        os.utime(path, (time.time() - 100 * age,) * 2)
    for name, age in ((".x.tmp", 25 * 3600), (".y.tmp", 60), ("unknown", 0)):
        (folder / name).write_bytes(bytes(5000))
        os.utime(folder / name, (time.time() - age,) * 2)
    remove_oldest(AnnotationCache(folder, most_bytes=2500), folder / "d.annotations")
    left = sorted(path.name for path in folder.iterdir())
    assert left == [".y.tmp", "a.annotations", "d.annotations", "unknown"]
    remove_oldest(AnnotationCache(folder, most_bytes=0), folder / "d.annotations")
    assert (folder / "d.annotations").exists()
    assert not (folder / "a.annotations").exists()


def test_a_file_that_is_used_stays(tmp_path: Path) -> None:
    file = write(tmp_path, valid())
    read(file, keeping(tmp_path))
    [path] = kept(tmp_path)
    os.utime(path, (1000, 1000))
    read(file, keeping(tmp_path))
    assert path.stat().st_mtime > 1e9


def test_names_from_addresses_are_those_of_the_folder(tmp_path: Path) -> None:
    """Of .../train2017/1.png the folder decides whether the name has its folder's."""
    tree = valid()
    for image in tree["images"]:
        image["coco_url"] = f"http://images/train2017/{image.pop('file_name')}"
    file = write(tmp_path, tree)
    cache = keeping(tmp_path)
    flat = everything(read(file, cache))
    assert everything(read(file, cache)) == flat
    assert flat[0][0][2] == "1.png"
    nested = tmp_path / "images" / "train2017"
    nested.mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "images" / name).rename(nested / name)
    found = read(file, cache)
    assert [record.file_name for record in found.records] == ["train2017/1.png", "train2017/2.png"]
    assert everything(found) == everything(read(file, None)) == everything(read(file, cache))
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "images").rename(elsewhere)
    again = read_coco(elsewhere, file, cache=cache)
    assert again.records[0].path == elsewhere / "train2017" / "1.png"


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(*settings: str) -> AnnotationCache | None:
        return configured(load_config(overrides=list(settings)))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert place() == AnnotationCache(tmp_path / "fastmrcnn" / "annotations")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert place() == AnnotationCache(tmp_path / "home" / ".cache" / "fastmrcnn" / "annotations")
    assert place("data.cache=off") is None
    assert place(f"data.cache={tmp_path / 'mine'}") == AnnotationCache(tmp_path / "mine")
    assert place("data.cache=~/mine") == AnnotationCache(tmp_path / "home" / "mine")


def large(folder: Path, annotations: int) -> Path:
    """Two images with many objects of ragged polygons and runs."""
    tree, draw = valid(), random.Random(1)
    tree["annotations"] = [
        {
            "id": number,
            "image_id": 1 + number % 2,
            "category_id": 1 + number % 2,
            "bbox": [0, 0, WIDTH, HEIGHT],
            "area": 1000.5,
            "iscrowd": 0,
            "segmentation": [
                [0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT, *(draw.randrange(40) for _ in range(40))]
            ],
        }
        for number in range(1, annotations + 1)
    ]
    return write(folder, json.loads(json.dumps(tree)))


def test_a_second_start_takes_a_fraction(tmp_path: Path) -> None:
    file, cache = large(tmp_path, 8000), keeping(tmp_path)
    seconds = []
    for _ in range(2):
        started = time.process_time()
        dataset = read(file, cache, max_objects=8000)
        seconds.append(time.process_time() - started)
    assert is_mapped(dataset)
    assert seconds[1] < seconds[0] / 3  # of a set of many small images less, since they are looked at again
    assert flat_file.VERSION == 1
