"""`weights.fetching`: the location that a name means, and object storage that is read once per machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hubs import COMMIT, FakeHub
from safetensors.numpy import save

from pia_batch import tiny
from pia_batch.config import ModelConfig
from pia_batch.errors import ConfigError, StorageError
from pia_batch.storage import object_store
from pia_batch.storage.object_store import ObjectInfo, Store
from pia_batch.weights import fetching
from pia_batch.weights.fetching import HubRepository, HuggingFaceHub, LocalFolder, ObjectFolder, locate
from pia_batch.weights.identity import engine_id
from pia_batch.weights.resolve import resolve

FILES = {
    "unet/config.json": b"{}",
    "unet/model.safetensors": save({"a": np.arange(9)}),
    "notes.txt": b"",
    "big.bin": b"!",
}
PATTERNS = ["unet/*.json", "unet/*.safetensors", "*.txt"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("PIA_BATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """What the object store holds, as files on this disk."""
    folder = tmp_path / "origin"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class CountingStore(Store):
    """A store that leaves a line for every object that is downloaded, whichever process does it."""

    def download(self, found: ObjectInfo, path: Path, threads: int = 8) -> None:
        with (Path(self.uri.removeprefix("file://")).parent / "downloads").open("a") as file:
            file.write(f"{found.name}\n")
        super().download(found, path, threads)


def place(folder: Path, kind: type[Store] = CountingStore) -> ObjectFolder:
    return ObjectFolder(kind(folder.as_uri()), "model.base")


def downloads(folder: Path) -> list[str]:
    path = folder.parent / "downloads"
    return sorted(path.read_text().split()) if path.exists() else []


def held(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


WANTED = {name: content for name, content in FILES.items() if name != "big.bin"}


def test_only_what_matches_is_fetched_and_only_once(origin):
    first = place(origin).fetch(PATTERNS)
    second = place(origin).fetch(PATTERNS)

    assert held(first.root) == WANTED
    assert first.root == second.root
    assert first.commit is None
    assert downloads(origin) == sorted(WANTED)


def test_a_star_ends_at_a_slash(origin):
    assert set(held(place(origin).fetch(["*.json", "*.txt"]).root)) == {"notes.txt"}


def test_brackets_and_question_marks_in_a_name_are_themselves(origin, tmp_path):
    name = "style [v2] why?.safetensors"
    (origin / name).write_bytes(FILES["unet/model.safetensors"])
    hub = FakeHub(tmp_path / "hub", loras=origin)
    places = (place(origin), HubRepository("someone/loras", None, hub))

    for each in places:
        for patterns in ([name], [name, "unet/*.json"]):
            assert (each.fetch(patterns).root / name).is_file()


def test_exact_names_need_no_listing_and_may_be_absent(origin):
    class NoListing(Store):
        def list(self, prefix: str) -> list[ObjectInfo]:  # type: ignore[override]
            raise AssertionError(prefix)

    source = place(origin, NoListing).fetch(["unet/model.safetensors", "unet/nowhere.json"])

    assert set(held(source.root)) == {"unet/model.safetensors"}


def test_one_replaced_object_is_fetched_alone_and_the_old_folder_stays(origin):
    old = place(origin).fetch(PATTERNS).root
    (origin / "unet/config.json").write_bytes(b'{"a": 1}')
    new = place(origin).fetch(PATTERNS).root

    assert new != old
    assert held(old) == WANTED
    assert held(new) == WANTED | {"unet/config.json": b'{"a": 1}'}
    assert downloads(origin) == sorted([*WANTED, "unet/config.json"])


def test_an_object_of_equal_size_that_was_replaced_is_noticed_by_its_tag(origin):
    place(origin).fetch(PATTERNS)
    (origin / "unet/config.json").write_bytes(b"[]")

    assert held(place(origin).fetch(PATTERNS).root)["unet/config.json"] == b"[]"


def test_another_choice_from_the_same_place_fetches_what_is_new(origin):
    place(origin).fetch(PATTERNS)
    place(origin).fetch([*PATTERNS, "*.bin"])

    assert downloads(origin) == sorted(FILES)


def test_a_touched_file_is_checked_by_its_content_and_kept(origin):
    root = place(origin).fetch(PATTERNS).root
    os.utime(root / "notes.txt", (1, 1))

    assert place(origin).fetch(PATTERNS).root == root
    assert downloads(origin) == sorted(WANTED)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root: (root / "unet/model.safetensors").write_bytes(b"short"),
        lambda root: (root / "unet/config.json").write_bytes(b"[]"),
        lambda root: (root / "unet/config.json").unlink(),
        lambda root: (root / ".fetched.json").unlink(),
        lambda root: (root / ".fetched.json").write_text("{"),
        lambda root: (root / ".fetched.json").write_text("[]"),
    ],
    ids=["another size", "another content", "a file gone", "no record", "a broken record", "a strange record"],
)
def test_a_damaged_folder_is_fetched_again(spoil: Callable[[Path], None], origin):
    root = place(origin).fetch(PATTERNS).root
    os.utime(root / "unet/config.json", (1, 1))  # whatever happens to it is not hidden by an equal time
    spoil(root)

    again = place(origin).fetch(PATTERNS).root

    assert again == root
    assert held(again) == WANTED
    assert len(downloads(origin)) > len(WANTED)


class FailingStore(CountingStore):
    """A store that breaks off in the middle of the last object."""

    def download(self, found: ObjectInfo, path: Path, threads: int = 8) -> None:
        if found.name.endswith(".safetensors"):
            path.write_bytes(b"half")
            msg = "the store went away"
            raise StorageError(msg)
        super().download(found, path, threads)


def test_a_download_that_broke_off_leaves_nothing_that_looks_whole(origin, cache):
    with pytest.raises(StorageError, match="went away"):
        place(origin, FailingStore).fetch(PATTERNS)

    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert held(place(origin).fetch(PATTERNS).root) == WANTED


@dataclass(frozen=True)
class SlowStore:
    """Makes a place whose downloads take a while, in another process."""

    folder: Path
    seconds: float

    def __call__(self, ready: object) -> None:
        seconds = self.seconds

        class Slow(CountingStore):
            def download(self, found: ObjectInfo, path: Path, threads: int = 8) -> None:
                super().download(found, path, threads)
                time.sleep(seconds)

        ready.wait()  # type: ignore[attr-defined]
        root = place(self.folder, Slow).fetch(PATTERNS).root
        if held(root) != WANTED:
            os._exit(3)


def test_processes_that_start_together_fetch_once(origin):
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2)
    processes = [context.Process(target=SlowStore(origin, 0.1), args=(ready,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    assert downloads(origin) == sorted(WANTED)


def test_a_killed_process_leaves_no_lock_and_no_whole_folder(origin, cache):
    context = multiprocessing.get_context("spawn")
    alone = context.Barrier(1)
    process = context.Process(target=SlowStore(origin, 60.0), args=(alone,))
    process.start()
    while process.is_alive() and not downloads(origin):
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()

    assert held(place(origin).fetch(PATTERNS).root) == WANTED
    (dead,) = cache.glob("*.partial-*")
    os.utime(dead, (1, 1))  # as if it had been dead for long
    (origin / "notes.txt").write_bytes(b"changed")
    place(origin).fetch(PATTERNS)
    assert not dead.exists()


def test_another_machine_that_was_faster_is_believed(origin, cache):
    class Overtaken(CountingStore):
        """While this one downloads, another without a common lock finishes the same folder."""

        def download(self, found: ObjectInfo, path: Path, threads: int = 8) -> None:
            super().download(found, path, threads)
            if self.overtaken_by is not None:
                whole, self.overtaken_by = self.overtaken_by, None
                shutil.copytree(whole, cache / whole.name)

        overtaken_by: Path | None = None

    whole = place(origin).fetch(PATTERNS).root
    shutil.move(whole, whole.parent.parent / whole.name)
    store = Overtaken(origin.as_uri())
    store.overtaken_by = whole.parent.parent / whole.name

    assert held(ObjectFolder(store, "model.base").fetch(PATTERNS).root) == WANTED
    assert not list(cache.glob("*.partial-*"))


def test_a_disk_without_hard_links_fetches_again(origin, monkeypatch):
    place(origin).fetch(PATTERNS)
    (origin / "notes.txt").write_bytes(b"changed")

    def refuse(*paths: Path) -> None:
        raise PermissionError(paths)

    monkeypatch.setattr(Path, "hardlink_to", refuse)

    assert held(place(origin).fetch(PATTERNS).root) == WANTED | {"notes.txt": b"changed"}
    assert downloads(origin) == sorted([*WANTED, *WANTED])


def test_a_cache_that_was_filled_before_may_be_read_only(origin, cache):
    root = place(origin).fetch(PATTERNS).root
    for path in [*cache.rglob("*"), cache]:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    next(cache.glob("*.lock")).unlink()

    try:
        assert place(origin).fetch(PATTERNS).root == root
        assert not list(cache.glob("*.lock"))
    finally:
        for path in [cache, *cache.rglob("*")]:
            path.chmod(stat.S_IRWXU)


def test_a_cache_folder_that_cannot_be_made_is_a_config_error_with_the_remedy(origin, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PIA_BATCH_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(ConfigError, match=r"cannot cache .*set PIA_BATCH_CACHE"):
        place(origin).fetch(PATTERNS)


def test_the_cache_is_in_the_home_folder_unless_it_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PIA_BATCH_CACHE")

    assert fetching.cache_folder() == tmp_path / ".cache/pia_batch/weights"


def test_a_record_tells_where_a_folder_comes_from_and_what_it_holds(origin):
    root = place(origin).fetch(PATTERNS).root

    record = json.loads((root / ".fetched.json").read_text())

    assert record["uri"] == origin.as_uri()
    assert record["files"]["unet/config.json"]["sha256"] == (
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )


def test_a_prefix_with_nothing_that_matches_is_a_config_error_with_its_key(origin):
    with pytest.raises(ConfigError, match=r"model\.base: there are no weights at file://.*origin; no object matches"):
        place(origin).fetch(["vae/*.json"])


# --- downloads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [0, 1, 9, 10, 11, 35])
def test_an_object_is_put_together_from_its_parts(num_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PART_BYTES", 10)
    data = bytes(range(num_bytes))
    store = Store(str(tmp_path / "store"))
    store.create("a/b", data)

    store.download(store.stat("a/b"), tmp_path / "target")

    assert (tmp_path / "target").read_bytes() == data


@pytest.mark.parametrize("replacement", [b"1" * 30, b"0" * 31, b"", None], ids=["same size", "longer", "empty", "gone"])
def test_an_object_that_changes_while_it_is_read_is_never_mixed(replacement, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "PART_BYTES", 10)
    store = Store(str(tmp_path / "store"))
    store.create("a", b"0" * 30)
    found = store.stat("a")
    (tmp_path / "store" / "a").unlink()
    if replacement is not None:
        store.create("a", replacement)

    with pytest.raises(StorageError, match="replaced or removed while it was read; start again"):
        store.download(found, tmp_path / "target")


def test_listing_and_stat_tell_the_same_of_an_object(tmp_path):
    store = Store(str(tmp_path / "store"))
    store.create("a/b", b"123")

    assert list(store.list("a")) == [store.stat("a/b")]
    assert store.stat("a/b").num_bytes == 3
    with pytest.raises(FileNotFoundError):
        store.stat("a/c")
    with pytest.raises(FileNotFoundError):
        Store(str(tmp_path / "nowhere")).stat("a")


# --- what a name means ----------------------------------------------------------------------------------------------


def locate_here(name: str, hub: FakeHub | None = None) -> tuple[object, str | None]:
    return locate(name, "main", "model.base", hub or FakeHub(Path()))


def test_folders_and_files_are_named_by_path_or_uri(origin, monkeypatch):
    file = origin / "unet" / "model.safetensors"
    monkeypatch.chdir(origin.parent)

    assert locate_here(str(origin)) == (LocalFolder(origin, str(origin)), None)
    assert locate_here("origin") == (LocalFolder(Path("origin"), "origin"), None)
    assert locate_here(origin.as_uri()) == (LocalFolder(origin, origin.as_uri()), None)
    assert locate_here(str(file)) == (LocalFolder(file.parent, str(file)), "model.safetensors")
    assert locate_here(file.as_uri()) == (LocalFolder(file.parent, file.as_uri()), "model.safetensors")


def test_a_uri_with_escapes_names_the_file_that_it_means(tmp_path):
    file = tmp_path / "my model #1.safetensors"
    file.write_bytes(b"")

    assert locate_here(file.as_uri())[1] == file.name


def test_repositories_and_their_files_are_named_by_hub_id():
    hub = FakeHub(Path())

    assert locate_here("owner/name", hub) == (HubRepository("owner/name", "main", hub), None)
    assert locate_here("owner/name/a/b.safetensors", hub) == (
        HubRepository("owner/name", "main", hub),
        "a/b.safetensors",
    )


@pytest.mark.parametrize(
    ("uri", "root", "file"),
    [
        ("s3://bucket/models/sd15/", "s3://bucket/models/sd15", None),
        ("s3://bucket", "s3://bucket", None),
        ("s3://bucket/a/b.safetensors", "s3://bucket/a", "b.safetensors"),
        ("s3://bucket/b.safetensors", "s3://bucket", "b.safetensors"),
        ("S3://bucket/a", "S3://bucket/a", None),
        ("gs://bucket/a", "gs://bucket/a", None),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a", None),
    ],
)
def test_prefixes_and_objects_are_named_by_uri(uri, root, file):
    found, name = locate_here(uri)

    assert isinstance(found, ObjectFolder)
    assert (found.store.uri, name) == (root, file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such", "model.base: there is no folder or file /no/such, and it is not a hub id"),
        ("./models/a.safetensors", "there is no folder or file ./models/a.safetensors"),
        ("models/a.safetensors", "there is no folder or file models/a.safetensors"),
        ("file:///no/such", "there is no folder or file file:///no/such"),
        ("https://host/a.safetensors", "weights cannot be read from https://; use a local path, file://, s3://"),
        (
            "https://user:secret@host/a.safetensors?token=secret",
            "https://host/a.safetensors: weights cannot be read from https://",
        ),
        ("s3://bucket/a.ckpt", "s3://bucket/a.ckpt is a pickle"),
        ("owner/name/a.ckpt", "owner/name/a.ckpt is a pickle"),
        ("owner/name/a.gguf", "owner/name/a.gguf is not a .safetensors file"),
        ("s3://key:secret@bucket/a", "was given with credentials"),
    ],
)
def test_a_name_that_means_nothing_is_a_config_error(name, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        locate_here(name)
    assert "secret" not in str(caught.value)


def test_a_local_pickle_is_refused_with_its_key(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")

    with pytest.raises(ConfigError, match=r"model\.base: .*model\.ckpt is a pickle"):
        locate_here(str(tmp_path / "model.ckpt"))


def test_without_a_network_names_come_from_the_hubs_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--loras"
    (repository / "snapshots" / COMMIT / "a").mkdir(parents=True)
    (repository / "snapshots" / COMMIT / "a" / "b.safetensors").write_bytes(b"")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    assert HuggingFaceHub().names("someone/loras", None) == ["a/b.safetensors"]
    with pytest.raises(ConfigError, match=r"cannot get someone/else at v1 from the hub.*Check the id"):
        HuggingFaceHub().names("someone/else", "v1")


# --- a real S3 server -----------------------------------------------------------------------------------------------


def upload(folder: Path, uri: str) -> None:
    store = Store(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            store.create(path.relative_to(folder).as_posix(), path.read_bytes())


@pytest.mark.s3
def test_a_model_on_s3_is_the_model_on_this_disk(s3: str, caplog: pytest.LogCaptureFixture, cache: Path):
    upload(tiny.PATH, f"{s3}/tiny")
    upload(tiny.PATH / "vae", f"{s3}/vae")
    model = ModelConfig(base=f"{s3}/tiny", vae=f"{s3}/vae")
    caplog.set_level("INFO")

    ids = [engine_id(each, resolve(each), "float32") for each in (ModelConfig(), model, model)]

    assert len(set(ids)) == 1
    assert [record.message.split()[0] for record in caplog.records].count("weights_fetched") == 2
    fetched = {path.relative_to(path.parents[1]).as_posix() for path in cache.glob("*/*/*")}
    assert "unet/diffusion_pytorch_model.safetensors" in fetched
    assert not any(name.endswith("README.md") or name.startswith("vae/") for name in fetched)


@pytest.mark.s3
def test_an_object_on_s3_that_is_replaced_is_another_model(s3: str):
    header = save({"x": np.zeros(1)})
    store = Store(s3)
    store.replace("a/lora.safetensors", header)
    found, name = locate_here(f"{s3}/a/lora.safetensors")
    assert isinstance(found, ObjectFolder)
    assert name == "lora.safetensors"
    first = found.fetch([name]).root / name
    store.replace("a/lora.safetensors", save({"x": np.ones(1)}))

    second = found.fetch([name]).root / name

    assert first.read_bytes() == header
    assert second.read_bytes() == save({"x": np.ones(1)})


@pytest.mark.s3
def test_an_object_of_many_parts_arrives_whole_from_s3_and_never_mixed(s3: str, tmp_path: Path):
    data = np.random.default_rng(0).bytes(2 * object_store.PART_BYTES + 12345)
    store = Store(s3)
    store.replace("big", data)
    found = store.stat("big")
    assert list(store.list("")) == [found]

    store.download(found, tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == data

    store.replace("big", data[::-1])
    with pytest.raises(StorageError, match="replaced or removed"):
        store.download(found, tmp_path / "big")


@pytest.mark.s3
@pytest.mark.parametrize("name", ["", "/a.safetensors"])
def test_what_is_not_on_s3_is_a_config_error(s3: str, name: str):
    with pytest.raises(ConfigError, match=r"model\.base: there are no weights at s3://"):
        resolve(ModelConfig(base=f"{s3}/nowhere{name}"))


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_told(s3: str):
    with pytest.raises(StorageError, match="no such bucket"):
        resolve(ModelConfig(base=f"{s3.replace('s3://pia', 's3://other')}/a"))
