"""Files that are whole or absent, things made once, checksums."""

import hashlib
import json
import math
import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import store
from harness.errors import UserError
from harness.store import Cache, free_bytes, key_of, sha256_file, write_atomic, write_json, write_npz, write_text


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """An empty cache."""
    return Cache(tmp_path / "cache")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Another umask for the block."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def files_below(folder: Path) -> set[str]:
    """Names of all files, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def append(path: Path, word: str) -> None:
    """One line in a file that several processes write to."""
    with path.open("a") as file:
        file.write(f"{word}\n")


# --- atomic writes


def test_write_atomic_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c.txt"
    write_atomic(target, lambda temporary: temporary.write_text("whole"))
    assert target.read_text() == "whole"
    assert files_below(tmp_path) == {"a/b/c.txt"}


@pytest.mark.parametrize("durable", [True, False])
def test_only_durable_files_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_atomic(tmp_path / "c.txt", lambda temporary: temporary.write_text("whole"), durable=durable)
    assert (tmp_path / "c.txt").read_text() == "whole"
    assert len(synced) == durable


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_write_atomic_leaves_nothing_when_it_fails(tmp_path: Path, failure: BaseException) -> None:
    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        write_atomic(tmp_path / "c.txt", half)
    assert files_below(tmp_path) == set()


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "c.txt"
    target.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_atomic(target, half)
    assert target.read_text() == "old"
    assert files_below(tmp_path) == {"c.txt"}


def test_nothing_is_seen_at_the_target_before_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "c.txt"
    seen = []

    def slowly(temporary: Path) -> None:
        temporary.write_text("half")
        seen.append((target.exists(), temporary.parent == target.parent, temporary.name.startswith(".")))
        temporary.write_text("whole")

    write_atomic(target, slowly)
    assert seen == [(False, True, True)]
    assert target.read_text() == "whole"


def test_write_atomic_flushes_to_disk_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, existed = tmp_path / "c.txt", []
    real = os.fsync
    monkeypatch.setattr(store.os, "fsync", lambda number: (existed.append(target.exists()), real(number)))
    write_text(target, "x")
    assert existed == [False]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_text(tmp_path / "c.txt", "x")
        assert os.umask(mask) == mask, "the umask itself is left as it was"
    assert stat.S_IMODE((tmp_path / "c.txt").stat().st_mode) == mode


def test_text_is_utf8_with_unix_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "c.txt", "Δ PPL ±\n")
    assert (tmp_path / "c.txt").read_bytes() == b"\xce\x94 PPL \xc2\xb1\n"


def test_json_round_trip(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None, True], "é": {"b": "c"}}
    write_json(tmp_path / "c.json", data)
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == data


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_no_number(tmp_path: Path, number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "c.json", {"a": number})
    assert files_below(tmp_path) == set()


def test_npz_round_trip_without_pickle(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 5))
    write_npz(tmp_path / "a.npz", nll=values, seconds=1.5)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["nll"], values)
        assert float(arrays["seconds"]) == 1.5
    assert files_below(tmp_path) == {"a.npz"}


# --- keys and checksums


def test_keys_tell_apart_what_differs_and_nothing_else() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    keys = [
        key_of(*parts) for parts in [(), (None,), ("a", "b"), ("ab",), (["a", "b"],), (1,), ("1",), (1.5,), (True,)]
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_a_key_is_the_same_in_every_process_and_release() -> None:
    # The cache and the records of earlier runs are found by it.
    assert key_of("a", 1, None, {"x": [1.5]}) == hashlib.sha256(b'["a",1,null,{"x":[1.5]}]').hexdigest()


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_sha256_of_small_files(content: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        assert sha256_file(Path(file.name)) == hashlib.sha256(content).hexdigest()


def test_sha256_of_a_file_of_several_blocks(tmp_path: Path) -> None:
    content = os.urandom((1 << 22) + 12345)
    (tmp_path / "big").write_bytes(content)
    assert sha256_file(tmp_path / "big") == hashlib.sha256(content).hexdigest()


def test_the_remembered_checksum_is_not_computed_twice(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "model.gguf", []
    path.write_bytes(b"first")
    real = store.sha256_file
    monkeypatch.setattr(store, "sha256_file", lambda one: (calls.append(one), real(one))[1])
    expected = hashlib.sha256(b"first").hexdigest()
    assert [cache.sha256(path), cache.sha256(path), Cache(cache.folder).sha256(path)] == [expected] * 3
    assert len(calls) == 1


def test_the_remembered_checksum_notices_a_changed_file(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def put(content: bytes, when_ns: int) -> str:
        path.write_bytes(content)
        os.utime(path, ns=(when_ns, when_ns))
        return cache.sha256(path)

    day = 1_700_000_000_000_000_000
    contents = [(b"first", day), (b"other", day + 1), (b"longer one", day + 1)]
    assert [put(content, when) for content, when in contents] == [
        hashlib.sha256(content).hexdigest() for content, _ in contents
    ]


def test_the_remembered_checksum_notices_a_replaced_file_of_the_same_size_and_time(
    cache: Cache, tmp_path: Path
) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    path.write_bytes(b"first")
    other.write_bytes(b"other")
    for one in (path, other):
        os.utime(one, ns=(10**18, 10**18))
    assert cache.sha256(path) == hashlib.sha256(b"first").hexdigest()
    other.replace(path)
    assert cache.sha256(path) == hashlib.sha256(b"other").hexdigest()


def test_two_files_of_one_name_are_told_apart(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("model.gguf").write_text(name)
        os.utime("model.gguf", ns=(10**18, 10**18))
        sums.append(cache.sha256(Path("model.gguf")))
    assert sums == [hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b")]


# --- things made once


def test_make_once_and_keep_the_facts(cache: Cache) -> None:
    calls = []

    def make(target: Path) -> dict[str, Any]:
        calls.append(target)
        target.write_text("made")
        return {"seconds": 1.5}

    path = cache.make("variants", "k", ".gguf", make)
    assert path == cache.path("variants", "k", ".gguf") == cache.folder / "variants" / "k.gguf"
    assert path.read_text() == "made"
    assert cache.make("variants", "k", ".gguf", make) == path
    assert len(calls) == 1
    assert cache.facts(path) == {"seconds": 1.5}
    assert cache.make("variants", "other", ".gguf", make).read_text() == "made"
    assert len(calls) == 2


def test_a_maker_that_fails_leaves_nothing_and_may_try_again(cache: Cache) -> None:
    def fail(target: Path) -> None:
        target.write_text("half")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cache.make("variants", "k", ".gguf", fail)
    assert not cache.path("variants", "k", ".gguf").exists()
    assert not list(cache.folder.rglob("*.tmp"))
    assert cache.make("variants", "k", ".gguf", lambda target: None).exists()


def test_the_seal_comes_last(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed in between makes both again: a file without its seal is not believed."""

    def killed(self: Path, target: Path) -> Path:
        if target.name.endswith(".seal.json"):
            raise KeyboardInterrupt
        return real(self, target)

    real = Path.replace
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.make("variants", "k", ".gguf", lambda target: {"seconds": 1})
    path = cache.path("variants", "k", ".gguf")
    assert path.exists() and not cache.holds(path)
    monkeypatch.undo()
    cache.make("variants", "k", ".gguf", lambda target: {"seconds": 2})
    assert cache.holds(path) and cache.facts(path) == {"seconds": 2}


DAMAGE = {
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "gone": lambda path: path.unlink(),
    "no seal": lambda path: path.with_name(f"{path.name}.seal.json").unlink(),
    "half a seal": lambda path: path.with_name(f"{path.name}.seal.json").write_text('{"sha256": "'),
    "an empty seal": lambda path: path.with_name(f"{path.name}.seal.json").write_text("{}"),
    "a seal of something else": lambda path: path.with_name(f"{path.name}.seal.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_again(cache: Cache, damage: Callable[[Path], object]) -> None:
    def make(target: Path) -> dict[str, int]:
        target.write_bytes(b"content")
        return {"seconds": 3}

    path = cache.make("variants", "k", ".gguf", make)
    assert cache.holds(path)
    damage(path)
    assert not cache.holds(path)
    assert cache.make("variants", "k", ".gguf", make) == path
    assert path.read_bytes() == b"content" and cache.holds(path) and cache.facts(path) == {"seconds": 3}


def test_a_removed_file_leaves_no_seal(cache: Cache) -> None:
    path = cache.make("variants", "k", ".gguf", lambda target: None)
    cache.remove(path)
    assert not [p for p in path.parent.iterdir() if not p.name.endswith(".lock")]
    cache.remove(path)


def test_leftovers_of_dead_writers_are_removed_and_those_of_the_living_stay(tmp_path: Path) -> None:
    names = []

    def keep_name(temporary: Path) -> None:
        names.append(temporary.name)

    write_atomic(tmp_path / "deep" / "x-1.json", keep_name)
    (own,) = names
    dead = own.replace(f"-{os.getpid()}-", "-999999999-")
    elsewhere = dead.replace(f".{store._machine()}-", ".elsewhere-")
    others = [own, elsewhere, "mine.tmp", ".x.tmp"]
    for name in (dead, *others):
        (tmp_path / "deep" / name).write_text("half")
    store.remove_leftovers(tmp_path)
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"x-1.json", *others}


def test_a_holder_of_a_lock_may_enter_again(cache: Cache) -> None:
    path = cache.path("variants", "k", ".gguf")
    with cache.lock(path):
        assert cache.make("variants", "k", ".gguf", lambda target: None) == path


def _hold(cache: Cache, path: Path, held: Any) -> None:
    with cache.lock(path):
        held.set()
        time.sleep(600)


def test_the_lock_of_a_process_that_died_is_taken_over(cache: Cache) -> None:
    path, spawn = cache.path("variants", "k", ".gguf"), multiprocessing.get_context("spawn")
    held = spawn.Event()
    owner = spawn.Process(target=_hold, args=(cache, path, held))
    owner.start()
    assert held.wait(60)
    owner.kill()
    owner.join()
    begin = time.monotonic()
    with cache.lock(path):
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize("key", ["../x", "a/b", "a\\b"])
def test_a_key_names_no_folder(cache: Cache, key: str) -> None:
    with pytest.raises(ValueError, match="folder"):
        cache.path("sources", key, ".gguf")


def test_stale_files_of_a_killed_maker_are_removed(cache: Cache) -> None:
    folder = cache.folder / "variants"
    folder.mkdir()
    mine, facts, others = folder / ".k.gguf.x1.tmp", folder / ".k.gguf.facts.json.x2.tmp", folder / ".k2.gguf.x3.tmp"
    for path in (mine, facts, others):
        path.write_text("half")
    present = []
    cache.make("variants", "k", ".gguf", lambda target: present.append(mine.exists() or facts.exists()))
    assert present == [False], "before the work, so that the disk has room"
    assert not mine.exists()
    assert not facts.exists()
    assert others.exists(), "that may be somebody else's work in progress"


def test_one_maker_under_two_threads(cache: Cache) -> None:
    calls: list[int] = []
    ready = threading.Barrier(2)
    results: list[str] = []

    def make(target: Path) -> None:
        calls.append(1)
        time.sleep(0.2)
        target.write_text("made")

    def work() -> None:
        ready.wait()
        results.append(cache.make("variants", "k", ".gguf", make).read_text())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results == ["made", "made"]
    assert len(calls) == 1


def make_in_process(folder: Path, log: Path, start: Any) -> None:
    """Runs in a child: waits for the other one, then makes the same thing."""

    def make(target: Path) -> dict[str, int]:
        append(log, "called")
        time.sleep(0.3)
        target.write_text("made")
        return {"pid": os.getpid()}

    start.wait(30)
    cache = Cache(folder)
    path = cache.make("variants", "k", ".gguf", make)
    append(log, f"got {path.read_text()} {cache.facts(path)['pid']}")


def test_one_maker_under_two_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(2)
    children = [spawn.Process(target=make_in_process, args=(tmp_path / "cache", log, start)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    lines = log.read_text().splitlines()
    assert lines.count("called") == 1
    got = [line for line in lines if line.startswith("got made")]
    assert len(got) == 2
    assert len(set(got)) == 1


def make_and_die(folder: Path) -> None:
    """Runs in a child: dies in the middle of its work, as a killed sweep does."""

    def make(target: Path) -> None:
        target.write_text("half")
        os._exit(9)

    Cache(folder).make("variants", "k", ".gguf", make)


def test_a_maker_that_was_killed_holds_up_nobody(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=make_and_die, args=(tmp_path / "cache",))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    cache = Cache(tmp_path / "cache")
    assert list(cache.folder.rglob("*.tmp")), "the child left its half-written file"
    assert cache.make("variants", "k", ".gguf", lambda target: target.write_text("made") and None).read_text() == "made"
    assert not list(cache.folder.rglob("*.tmp"))


# --- cached JSON


def test_json_is_made_once(cache: Cache) -> None:
    calls = []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {"x": [1, None, "é"]}

    assert [cache.json("headers", "k", make) for _ in range(3)] == [{"x": [1, None, "é"]}] * 3
    assert len(calls) == 1
    assert cache.json("headers", "other", lambda: None) is None


@pytest.mark.parametrize("damage", [b"", b'{"x": ', b"\xff\xfe", b"{}{}", b"{}", b'{"id": "x", "value": {"x": 9}}'])
def test_damaged_json_is_made_again(cache: Cache, damage: bytes) -> None:
    assert cache.json("headers", "k", lambda: {"x": 1}) == {"x": 1}
    cache.path("headers", "k", ".json").write_bytes(damage)
    assert cache.json("headers", "k", lambda: {"x": 2}) == {"x": 2}
    assert cache.json("headers", "k", lambda: {"x": 3}) == {"x": 2}


def test_json_that_is_known_is_told_without_making_it(cache: Cache) -> None:
    assert cache.known_json("headers", "k") is None
    cache.json("headers", "k", lambda: [1])
    assert cache.known_json("headers", "k") == [1]
    cache.path("headers", "k", ".json").write_bytes(b"{")
    assert cache.known_json("headers", "k") is None


def test_json_whose_maker_fails_is_not_kept(cache: Cache) -> None:
    def fail() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cache.json("headers", "k", fail)
    assert cache.json("headers", "k", lambda: 5) == 5


# --- the folder


@pytest.mark.parametrize("below", ["sub", "sub/sub"])
def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("no folder")
    folder = tmp_path / "file" / below
    with pytest.raises(UserError) as caught:
        Cache(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert "runtime.cache_dir" in message
    assert str(folder) in message
    assert "None" not in message


def test_a_file_in_place_of_the_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"runtime\.cache_dir"):
        Cache(tmp_path / "file")


def test_a_new_cache_leaves_no_file(tmp_path: Path) -> None:
    assert Cache(tmp_path / "a" / "b").files() == {}
    assert files_below(tmp_path) == set()


def test_sizes_count_things_and_no_locks(cache: Cache) -> None:
    cache.make("variants", "k", ".gguf", lambda target: target.write_bytes(b"x" * 100) and None)
    cache.make("variants", "l", ".gguf", lambda target: target.write_bytes(b"x" * 50) and None)
    (cache.folder / "scores" / "deep").mkdir(parents=True)
    (cache.folder / "scores" / "deep" / "w.npz").write_bytes(b"12345")
    (cache.folder / "locks").mkdir(exist_ok=True)
    (cache.folder / "locks" / "l.lock").touch()
    files = cache.files()
    assert "locks" not in files
    sizes = {kind: (len(found), sum(size for _, size, _ in found)) for kind, found in files.items()}
    assert sizes["scores"] == (1, 5)
    assert sizes["variants"][0] == 4, "the files and their seals"
    assert 150 < sizes["variants"][1] < 1000


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0
    monkeypatch.chdir(tmp_path)
    assert free_bytes(Path("a/b")) > 0


def test_what_has_no_end_is_no_json(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match="no file"):
            store.read_json(tmp_path / f"{name}.json")
