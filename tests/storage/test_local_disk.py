from __future__ import annotations

import os
import sys
from pathlib import Path

import mounts
import pytest

from pia_batch.errors import StorageError
from pia_batch.storage.local_disk import WITHOUT_LINKS, find_obstacle, write_file
from pia_batch.storage.object_store import Store

ROOT = ("/", "ext4")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file/page.html", "File exists; a file, or a link to nothing, has the name of the folder"),
        ("folder", "Is a directory; a folder has the name of a file there"),
        ("n" * 300, "File name too long; choose a shorter path"),
        ("loop/page.html", "File exists; a file, or a link to nothing, has the name of the folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_named_with_its_option_and_a_remedy(
    tmp_path: Path, name: str, problem: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    with pytest.raises(StorageError) as refused:
        write_file(tmp_path / name, b"page", "--out")

    assert str(refused.value).startswith(f"--out: cannot write {tmp_path / name}: {problem}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "loop"]


def test_a_page_replaces_the_one_before_only_when_it_is_whole(tmp_path: Path) -> None:
    page, link = tmp_path / "a" / "page.html", tmp_path / "link.html"
    write_file(page, b"first", "--out")
    link.symlink_to(page)
    if not mounts.are_possible():
        pytest.skip("nothing may be mounted here")
    program = (
        "import sys, pathlib; from pia_batch.storage.local_disk import write_file\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "write_file(path, b'first', '--out')\n"
        "try: write_file(path, bytes(200_000), '--out')\n"
        "except Exception as err: print(err)\n"
        "print(sorted(each.name for each in path.parent.iterdir()), path.read_bytes())\n"
    )

    write_file(link, b"second", "--out")
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-c", program, str(tmp_path / "disk" / "page.html")]
    done = mounts.run_on(tmp_path / "disk", "size=64k", command, os.environ)

    assert (page.read_bytes(), link.is_symlink()) == (b"second", True)
    assert f"--out: cannot write {tmp_path / 'disk' / 'page.html'}: No space left on device; free some" in done.stdout
    assert "['page.html'] b'first'" in done.stdout, done.stderr


def test_a_page_may_go_to_a_device() -> None:
    write_file(Path(os.devnull), b"page", "--out")

    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("kind", sorted(WITHOUT_LINKS))
def test_a_file_system_without_hard_links_is_known_by_its_type_without_writing(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "usb" / "out"

    found = find_obstacle(folder, [ROOT, (str(tmp_path), kind)])

    assert found is not None
    assert found.startswith(f"output: the file system of {folder.as_uri()} has no hard links")
    assert f"({kind}); choose a folder on a file system with hard links, such as ext4" in found
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_mount_decides_and_the_later_one_of_two_at_one_place(tmp_path: Path) -> None:
    usb, inner = (str(tmp_path), "vfat"), (str(tmp_path / "inner"), "xfs")
    (tmp_path / "inner").mkdir()

    assert find_obstacle(tmp_path / "inner" / "out", [ROOT, usb, inner]) is None
    assert find_obstacle(tmp_path / "inner" / "out", [inner, usb]) is None
    assert find_obstacle(tmp_path / "inners", [ROOT, usb, inner]) is not None
    assert find_obstacle(tmp_path / "out", [usb, (str(tmp_path), "ext4")]) is None
    assert find_obstacle(tmp_path / "out") is None


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/out", "Not a directory; a file has the name of a folder there"),
        ("file", "Not a directory; a file has the name of a folder there"),
        (f"{'x' * 300}/out", "File name too long; choose a shorter path"),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line_with_a_remedy(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").write_text("no folder")

    found = Store(str(tmp_path / place)).find_obstacle()

    assert found is not None
    assert reason in found
    assert "\n" not in found


def test_object_storage_is_not_asked() -> None:
    assert Store("s3://bucket/out").find_obstacle() is None


PROGRAM = (
    "import sys; from pia_batch.storage.object_store import Store; from pia_batch.errors import PiaBatchError\n"
    "store = Store(sys.argv[1])\n"
    "print(store.find_obstacle())\n"
    "try: store.check('_journal/probe')\n"
    "except PiaBatchError as err: print(err)\n"
)


@pytest.mark.skipif(not mounts.are_possible(), reason="needs the right to mount")
@pytest.mark.parametrize(
    ("options", "before", "reason"),
    [
        ("size=1m", "mount -o remount,ro .", "Read-only file system; "),
        ("size=64k", "head -c 64K /dev/zero > full", "No space left on device; free some space there, or choose"),
    ],
)
def test_a_real_disk_that_cannot_be_written_is_seen_before_and_while_it_is_written(
    tmp_path: Path, options: str, before: str, reason: str
) -> None:
    done = mounts.run_on(tmp_path, options, [sys.executable, "-c", PROGRAM, f"{tmp_path}/out"], os.environ, before)

    seen, refused = done.stdout.splitlines()
    assert reason in seen
    assert reason in refused
