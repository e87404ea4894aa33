"""Quantized tensors that are kept: entries that are whole or gone, bounded bytes, and no tensor quantized twice."""

import io
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import dense, imatrix_of, matrices, plan_of  # noqa: F401  # dense is a fixture

from harness.cache_view import cache_text, parse_size
from harness.compose import compose
from harness.errors import EngineError, UserError
from harness.plan import TensorPlan
from harness.prepare import prepare
from harness.quantize import make_variant, tensor_sha256, weights_sha256
from harness.record import Record, read_records
from harness.store import Cache, sha256_file
from harness.sweep import Sweep
from harness.tensor_cache import Hashes, TensorCache, entries, prune
from harness.work import quantizing_s

Cli = Callable[..., tuple[int, str, str]]
DIGEST = 32  # bytes of a sha256, in front of the data


@pytest.fixture
def kept(tmp_path: Path) -> TensorCache:
    """Room for 1,000 bytes."""
    return TensorCache(Cache(tmp_path / "cache"), 1000)


def put(kept: TensorCache, key: str, data: bytes) -> bytes:
    """Keep data in pieces; returns what was handed on."""
    out = io.BytesIO()
    kept.keep(key, len(data), [data[:7], data[7:]], out.write)
    return out.getvalue()


def got(kept: TensorCache, key: str, n_bytes: int) -> bytes | None:
    """The data of an entry, None when it is not whole."""
    out = io.BytesIO()
    return out.getvalue() if kept.read(key, n_bytes, out) else None


def used(kept: TensorCache, *keys: str) -> None:
    """Say when entries were used last: one after the other, long ago."""
    for i, key in enumerate(keys):
        os.utime(kept.path(key), (1000 + i, 1000 + i))


# --- one entry


def test_an_entry_is_the_sha256_of_key_and_data_and_the_data(kept: TensorCache) -> None:
    assert put(kept, "k", b"0123456789") == b"0123456789"
    assert got(kept, "k", 10) == b"0123456789"
    stored = kept.path("k").read_bytes()
    # sha256 of "k0123456789", by sha256sum
    assert stored[:DIGEST].hex() == "233a7b72bc971a61ec577ef3efa5d2932794cd5244f2a5ea9163bbb84aa8859e"
    assert stored[DIGEST:] == b"0123456789"
    assert [path.name for path in kept.path("k").parent.iterdir()] == ["k.bin"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored[:-1],
        lambda stored: stored + b"x",
        lambda stored: stored[:20],
        lambda stored: b"",
        lambda stored: bytes(len(stored)),
        lambda stored: stored[:-1] + bytes([stored[-1] ^ 1]),
        lambda stored: bytes([stored[0] ^ 128]) + stored[1:],
    ],
    ids=["short", "long", "in the sum", "empty", "zeros", "a bit of the data", "a bit of the sum"],
)
def test_damage_is_found_when_an_entry_is_read(kept: TensorCache, damage: Callable[[bytes], bytes]) -> None:
    put(kept, "k", b"0123456789")
    status = kept.path("k").stat()
    kept.path("k").write_bytes(damage(kept.path("k").read_bytes()))
    os.utime(kept.path("k"), ns=(status.st_atime_ns, status.st_mtime_ns))  # times tell nothing
    assert got(kept, "k", 10) is None
    assert not kept.path("k").exists()
    put(kept, "k", b"0123456789")
    assert got(kept, "k", 10) == b"0123456789"


def test_an_entry_of_another_size_than_planned_is_damaged(kept: TensorCache) -> None:
    put(kept, "k", b"0123456789")
    assert got(kept, "k", 9) is None


def test_the_entry_of_another_key_is_damaged(kept: TensorCache) -> None:
    put(kept, "k", b"0123456789")
    kept.path("other").write_bytes(kept.path("k").read_bytes())
    assert got(kept, "other", 10) is None
    assert got(kept, "k", 10) == b"0123456789"


def test_what_failed_halfway_leaves_nothing(kept: TensorCache) -> None:
    def blocks() -> Any:
        yield b"half"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept.keep("k", 10, blocks(), lambda block: None)
    assert list(kept.path("k").parent.iterdir()) == []


# --- room


def test_the_least_recently_used_go_first(kept: TensorCache) -> None:
    for key in "abc":
        put(kept, key, bytes(300))
    used(kept, "b", "c", "a")
    assert kept.claim({"new": 300}) == (set(), {"new"})
    assert {entry.key for entry in entries(kept.cache)} == {"a", "c"}


def test_what_is_claimed_is_used_now_and_does_not_go(kept: TensorCache) -> None:
    for key in "abc":
        put(kept, key, bytes(300))
    used(kept, "a", "b", "c")
    assert kept.claim({"a": 300, "new": 300}) == ({"a"}, {"new"})
    assert [entry.key for entry in entries(kept.cache)] == ["c", "a"]


def test_of_more_than_fits_as_much_is_kept_as_fits(kept: TensorCache) -> None:
    put(kept, "a", bytes(300))
    used(kept, "a")
    # 1,000 bytes take "a" of 332, one of 432, and one of 132; not the second of 432
    assert kept.claim({"a": 300, "b": 400, "c": 400, "d": 100}) == ({"a"}, {"b", "d"})
    assert kept.claim({"e": 5000}) == (set(), set())


def test_a_lower_limit_is_kept_too(kept: TensorCache) -> None:
    for key in "abc":
        put(kept, key, bytes(300))
    used(kept, "a", "b", "c")
    lower = replace(kept, limit_bytes=400)
    held, fitting = lower.claim({"a": 300, "b": 300, "c": 300})
    assert held == {"c"} and not fitting
    assert [entry.key for entry in entries(kept.cache)] == ["c"]


def test_the_files_of_a_writer_that_died_go(kept: TensorCache) -> None:
    put(kept, "a", bytes(10))
    stale = kept.path("a").with_name(".b.bin.host-1-x.tmp")
    stale.write_bytes(bytes(500))
    kept.claim({})
    assert stale.exists(), "somebody may be writing it"
    os.utime(stale, (1000, 1000))
    kept.claim({})
    assert not stale.exists()


def test_room_that_another_has_taken_is_not_taken_twice(kept: TensorCache) -> None:
    """Both were told that their entries fit, and make them at the same time."""
    other = TensorCache(kept.cache, kept.limit_bytes)
    assert kept.claim({"a": 600}) == (set(), {"a"}) and other.claim({"b": 600}) == (set(), {"b"})

    def blocks() -> Iterator[bytes]:
        assert put(other, "b", bytes(600)) == bytes(600), "handed on all the same"
        yield bytes(600)

    kept.keep("a", 600, blocks(), lambda block: None)
    assert [entry.key for entry in entries(kept.cache)] == ["a"]


def test_an_entry_is_locked_by_itself(kept: TensorCache) -> None:
    script = (
        "import sys; from pathlib import Path; from harness.store import Cache; from harness.tensor_cache import *\n"
        "kept = TensorCache(Cache(Path(sys.argv[1])), 1000)\n"
        "for key in ('a', 'b'):\n"
        "    with kept.lock(key, wait=False) as free: print(key, free)\n"
    )
    with kept.lock("a", wait=True) as mine:
        said = subprocess.run(
            [sys.executable, "-c", script, kept.cache.folder], capture_output=True, text=True, check=True
        ).stdout
    assert mine and said.split() == ["a", "False", "b", "True"]


def test_growth_is_what_fits_at_most(kept: TensorCache) -> None:
    assert kept.growth_bytes([100, 200]) == 100 + 200 + 2 * DIGEST
    put(kept, "a", bytes(300))
    assert kept.growth_bytes([100, 200]) == 364
    assert kept.growth_bytes([700]) == 1000 - 332
    assert replace(kept, limit_bytes=0).growth_bytes([700]) == 0


@settings(max_examples=60)
@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 400), max_size=5), max_size=6))
def test_never_more_bytes_than_the_limit(tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, int]]) -> None:
    kept = TensorCache(Cache(tmp_path_factory.mktemp("c")), 1000)
    for wanted in steps:
        sized = {f"{key}{n}": n for key, n in wanted.items()}
        before = {entry.key for entry in entries(kept.cache)}
        growth = kept.growth_bytes(n for key, n in sized.items() if key not in before)
        bytes_before = sum(entry.n_bytes for entry in entries(kept.cache))
        held, fitting = kept.claim(sized)
        assert held <= before & set(sized) and not fitting & before
        for key in fitting:
            put(kept, key, bytes(sized[key]))
        total = sum(entry.n_bytes for entry in entries(kept.cache))
        assert total <= 1000 and total <= bytes_before + growth


def test_prune_leaves_the_most_recently_used(kept: TensorCache) -> None:
    for key in "abc":
        put(kept, key, bytes(300))
    used(kept, "b", "c", "a")
    assert prune(kept.cache, 700) == (1, 332)
    assert [entry.key for entry in entries(kept.cache)] == ["c", "a"]
    assert prune(kept.cache, 700) == (0, 0)
    assert prune(kept.cache, 0) == (2, 664)
    assert entries(kept.cache) == []


@contextmanager
def no_large_files() -> Iterator[None]:
    """A file may grow to 1,000 bytes, as on a disk that is nearly full. Not a fixture: it would hold for pytest's own
    output too, which may go to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_room_for_an_entry_the_data_are_handed_on(kept: TensorCache) -> None:
    data = bytes(range(250)) * 20
    with no_large_files():
        assert put(kept, "large", data) == data and entries(kept.cache) == []
        assert put(kept, "small", data[:900]) == data[:900] and got(kept, "small", 900) == data[:900]

    def refuse(block: bytes) -> None:
        raise OSError("of the file beside the entry")

    with pytest.raises(OSError, match="beside the entry"):
        kept.keep("other", 10, [data[:10]], refuse)
    assert not list(kept.cache.folder.rglob("*.tmp"))


# --- keys


def tensor(name: str, type_name: str, shape: tuple[int, ...] = (256, 512)) -> TensorPlan:
    return TensorPlan(name, name, 0, shape, True, type_name, type_name, type_name, "standard")


def test_a_key_is_of_everything_that_moves_a_byte() -> None:
    base = Hashes({"w": "f16", "v": "f16"}, {"w": "1" * 64, "v": "1" * 64}, {"w": "2" * 64, "v": "2" * 64}, "4" * 64)
    of = base.keys([tensor("w", "q4_k")])["w"]
    assert base.keys([tensor("v", "q4_k")])["v"] == of, "not of the name"
    others = [
        base.keys([tensor("w", "q5_k")])["w"],
        base.keys([tensor("w", "q4_k", (512, 256))])["w"],  # the same bytes in longer rows
        replace(base, source_types={"w": "bf16"}).keys([tensor("w", "q4_k")])["w"],
        replace(base, source_sha256={"w": "3" * 64}).keys([tensor("w", "q4_k")])["w"],
        replace(base, weights_sha256={"w": "3" * 64}).keys([tensor("w", "q4_k")])["w"],
        replace(base, weights_sha256={}).keys([tensor("w", "q4_k")])["w"],
        replace(base, quantizer_sha256="5" * 64).keys([tensor("w", "q4_k")])["w"],
    ]
    assert len({of, *others}) == 8


def test_types_that_are_made_as_fast_as_they_are_read_are_not_kept() -> None:
    hashes = Hashes({"w": "f16"}, {"w": "1" * 64}, {}, "4" * 64)
    for type_name in ("f16", "f32", "bf16", "q8_0"):
        assert hashes.keys([tensor("w", type_name)]) == {}
    assert hashes.keys([replace(tensor("w", "q4_k"), quantizable=False)]) == {}


def test_hashes_are_those_of_the_data_in_the_file(dense: Path, tmp_path: Path) -> None:  # noqa: F811
    import hashlib

    import gguf

    expected = {t.name: hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(dense).tensors}
    assert tensor_sha256(dense, n_threads=2) == expected
    first, other = (imatrix_of(dense, tmp_path / f"{i}.gguf") for i in range(2))
    assert weights_sha256(first) == weights_sha256(other)
    assert len(set(weights_sha256(first).values())) == 7
    data = (tmp_path / "0.gguf").read_bytes()
    assert sha256_file(first, 10, 20) == hashlib.sha256(data[10:30]).hexdigest()


# --- files made of entries


def hashes_of(model: Path) -> Hashes:
    from harness.engine.gguf_file import read_header

    types = {t.name: t.type for t in read_header(model).tensors}
    return Hashes(types, tensor_sha256(model, n_threads=1), {}, "4" * 64)


def test_a_file_of_entries_is_the_same_file(dense: Path, tmp_path: Path) -> None:  # noqa: F811
    kept = TensorCache(Cache(tmp_path / "cache"), 10**9)
    names = matrices(dense)
    plan = plan_of(dense, {**dict.fromkeys(names, "q4_k"), "output.weight": "q8_0"})
    hashes = hashes_of(dense)
    make_variant(dense, tmp_path / "plain.gguf", plan, None, n_threads=1)
    truth = (tmp_path / "plain.gguf").read_bytes()

    def counts(given: TensorCache | None = kept) -> tuple[int, ...]:
        made = make_variant(dense, tmp_path / "out.gguf", plan, None, n_threads=2, kept=given, hashes=hashes)
        assert (tmp_path / "out.gguf").read_bytes() == truth
        return tuple(made[f"n_tensors_{what}"] for what in ("quantized", "reused", "damaged"))

    n = len(names)
    assert counts() == (n, 0, 0)
    assert counts() == (1, n - 1, 0), "q8_0 is made as fast as it is read"
    paths = sorted(entry.path for entry in entries(kept.cache))
    data = bytearray(paths[0].read_bytes())
    data[-1] ^= 1
    paths[0].write_bytes(data)
    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    assert counts() == (3, n - 3, 2), "two were damaged, and made again"
    assert counts() == (1, n - 1, 0)
    small = replace(kept, limit_bytes=paths[0].stat().st_size)
    assert counts(small)[0] >= n - 1
    assert sum(entry.n_bytes for entry in entries(kept.cache)) <= small.limit_bytes
    assert not list(tmp_path.rglob("*.tmp"))


def test_nothing_is_kept_of_data_that_the_key_does_not_tell(dense: Path, tmp_path: Path) -> None:  # noqa: F811
    kept = TensorCache(Cache(tmp_path / "cache"), 10**9)
    plan, told = plan_of(dense, dict.fromkeys(matrices(dense), "q4_k")), hashes_of(dense)
    first = next(t.name for t in plan.tensors if t.name in told.keys(plan.tensors))
    last = [name for name in sorted(told.keys(plan.tensors)) if name != first][-1]
    others = (
        replace(told, source_sha256={**told.source_sha256, last: "1" * 64}),
        replace(told, weights_sha256={last: "1" * 64}),  # but the file is made without an imatrix
    )
    for other in others:
        with pytest.raises(EngineError, match=f"{last}: the model or its imatrix was changed"):
            make_variant(dense, tmp_path / "out.gguf", plan, None, n_threads=2, kept=kept, hashes=other)
        assert other.keys(plan.tensors)[last] not in {entry.key for entry in entries(kept.cache)}
    assert not list(tmp_path.rglob("*.tmp"))


# --- the order of work


def test_the_cheapest_file_comes_first_then_those_that_share_its_tensors() -> None:
    """Seconds by hand, with 2 threads: a q4_k tensor of 23 million weights takes 1 s, one of iq4_xs 23/11 s."""
    shape = (23_000, 1000)

    def plan(*tensors: tuple[str, str]) -> Any:
        return replace(plan_of_nothing(), tensors=tuple(tensor(name, type_name, shape) for name, type_name in tensors))

    plans = {
        "dear": plan(("a", "iq4_xs"), ("b", "iq4_xs")),
        "cheap": plan(("a", "q4_k"), ("b", "q4_k")),
        "half dear": plan(("a", "iq4_xs"), ("b", "q4_k")),
        "there": None,
    }
    types = {"a": "f16", "b": "f16"}
    order = quantizing_s(plans, types, set(), 2, keeps_tensors=True)
    child, slow = 0.5, 23 / 11
    assert list(order) == ["there", "cheap", "half dear", "dear"]
    assert list(order.values()) == pytest.approx([0, child + 2, child + slow, child + slow])
    order = quantizing_s(plans, types, {("a", "iq4_xs"), ("b", "iq4_xs")}, 2, keeps_tensors=True)
    assert list(order) == ["there", "dear", "half dear", "cheap"]
    assert list(order.values()) == pytest.approx([0, child, child + 1, child + 1])
    order = quantizing_s(plans, types, set(), 2, keeps_tensors=False)
    assert list(order.values()) == pytest.approx([0, child + 2, child + slow + 1, child + 2 * slow])


def test_the_tables_of_a_type_cost_a_file_as_long_as_it_makes_one_of_its_tensors() -> None:
    """By hand, with 2 threads: the tables of iq1_m take 7 s, a tensor of 17 million weights 1 s."""
    shape, types = (17_000, 1000), dict.fromkeys("abc", "f16")
    one, two, none = (
        replace(plan_of_nothing(), tensors=tuple(tensor(name, "iq1_m", shape) for name in names))
        for names in ("a", "abc", "bc")
    )
    plans = {"one": one, "two": two, "none": none}
    order = quantizing_s(plans, types, {("c", "iq1_m")}, 2, keeps_tensors=True)
    assert list(order.items()) == [("one", 8.5), ("two", 8.5), ("none", 0.5)]
    assert sum(quantizing_s(plans, types, set(), 4, keeps_tensors=False).values()) == pytest.approx(1.5 + 10.5 + 3)
    assert list(quantizing_s(plans, types, {(name, "iq1_m") for name in "abc"}, 2, keeps_tensors=True).values()) == [
        *(0.5, 0.5, 0.5)
    ]


def plan_of_nothing() -> Any:
    from harness.plan import Plan

    return Plan("q4_k_m", "standard", None, "q4_k_m", 0, ())


# --- whole sweeps


def pieces_of(record: Record) -> set[tuple[str, str]]:
    """Name and type of the tensors of a file that are kept."""
    return {(n, t["type"]) for n, t in record.data["variant"]["tensors"].items() if t["type"] not in ("f32", "q8_0")}


def test_placebo_and_attribution_quantize_next_to_nothing(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    """Each tensor and type once, whatever the number of files; the others are put together."""
    assert cli("sweep", "quant=iq2_s", "mode=standard,dynamicgate,placebo", *tiny_overrides)[0] == 0
    folder = tmp_path / "results" / "tiny"
    first = {r.data["mode"]: r for r in read_records(folder) if r.data["mode"] != "reference"}
    pieces = {mode: pieces_of(record) for mode, record in first.items()}
    made = {mode: record.data["quantizing"] for mode, record in first.items()}
    unique = set.union(*pieces.values())
    assert sum(one["n_tensors_quantized"] for one in made.values()) == len(unique)
    assert sum(one["n_tensors_reused"] for one in made.values()) == sum(map(len, pieces.values())) - len(unique)
    of_placebo = pieces["placebo"] - pieces["standard"] - pieces["dynamicgate"]
    assert len(of_placebo) <= 4, "only ffn_down, of four layers, has a type that it had in no other file"
    code, _, err = cli("sweep", "+experiment=attribution", "quant=iq2_s", *tiny_overrides)
    assert code == 0, err
    main = {record.path for record in first.values()}
    parts = [r for r in read_records(folder) if r.path not in main and r.data["quantizing"]]
    alone = [r.data["quantizing"] for r in parts if not r.data.get("same_as")]
    assert alone and all(one["n_tensors_quantized"] == 0 and one["n_tensors_reused"] == 30 for one in alone)


def test_damaged_tensors_are_told_and_made_again(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    sweep = ["sweep", "quant=q4_k_m", "mode=standard", *tiny_overrides, "calibration.enabled=false"]

    def measured(name: str, *more: str) -> tuple[str, Any, Any]:
        code, out, err = cli(*sweep, f"results.name={name}", *more)
        assert code == 0, err
        (record,) = (r for r in read_records(tmp_path / "results" / name) if r.data["quant"] == "q4_k_m")
        return out, record.data["quantizing"], record.per_token()["nll"]

    _, _, truth = measured("first")
    found = sorted((tmp_path / "cache" / "tensors").iterdir())
    for path in found[:3]:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    out, made, nll = measured("again")
    assert "warning: 3 tensors" in out and "were damaged" in out
    assert made == {"n_tensors_quantized": 3, "n_tensors_reused": len(found) - 3, "n_tensors_damaged": 3}
    assert (nll == truth).all()
    out, made, nll = measured("without", "runtime.tensor_cache_gb=0")
    assert made == {"n_tensors_quantized": len(found), "n_tensors_reused": 0, "n_tensors_damaged": 0}
    assert "warning: " not in out and (nll == truth).all()


def prepared(*overrides: str) -> Sweep:
    return prepare(compose(overrides), print, with_reference=False)


def test_twins_take_no_disk_and_hide_none(tiny_overrides: list[str]) -> None:
    """The policy has no rule for q4_0: both modes are one file, which needs its disk."""
    both, one = (
        prepared("quant=q4_0", f"mode={mode}", *tiny_overrides) for mode in ("standard,dynamicgate", "standard")
    )
    assert len(both.cases) == 2 and [case.plan.mode for case in both.to_quantize] == ["standard"]
    assert both.file_bytes_at_once == one.file_bytes_at_once > 0


def test_a_disk_with_room_for_the_files_alone_keeps_no_tensors(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = ["quant=q4_k_s,q4_k_m", "mode=standard", *tiny_overrides, "calibration.enabled=false"]
    monkeypatch.setattr("harness.sweep.free_bytes", lambda folder: 10**12)
    monkeypatch.setattr("harness.sweep.disk_bytes", lambda folder: 2 * 10**12)
    sweep = prepared(*cases)
    assert sweep.tensor_cache.limit_bytes == 20e9
    planned = [t for case in sweep.cases for t in case.plan.quantizable]
    once = {(t.name, t.type): t.n_bytes + DIGEST for t in planned}
    assert len(once) < len(planned) and sweep.new_tensor_bytes == sum(once.values())
    files = max(case.plan.file_bytes for case in sweep.cases)
    assert sweep.file_bytes_at_once == files
    for spare, kept_bytes in ((-50_001, 0), (0, 0), (5000, 5000), (10**12, sum(once.values()))):
        free = files + sweep.missing_probability_bytes + 50_000 + spare
        monkeypatch.setattr("harness.sweep.free_bytes", lambda folder, free=free: free)
        monkeypatch.setattr("harness.sweep.disk_bytes", lambda folder: 1_000_000)  # a twentieth stays free
        assert prepared(*cases).new_tensor_bytes == kept_bytes


def test_the_plan_says_the_most_disk(cli: Cli, tiny_overrides: list[str]) -> None:
    more = ["calibration.enabled=false", "measure.speed=true", "runtime.tensor_cache_gb=0.001"]
    code, out, err = cli("plan", "quant=q4_0,q4_k_s", "mode=standard", *tiny_overrides, *more)
    assert code == 0, err
    (line,) = (one for one in out.splitlines() if one.startswith("disk: "))
    sizes = [float(word) for word in line.replace("(", " ").split() if re.fullmatch(r"[\d.]+", word)]
    mib = [float(text.split(" MiB")[0].split("(")[1]) for text in out.splitlines() if "file: " in text]
    assert len(mib) == 2
    # both files stay for the timing; 2 windows of 63 rows of 310 float32; and all that may be kept
    parts = [sum(mib) * (1 << 20) / 1e6, 2 * 63 * 310 * 4 / 1e6, 1.0]
    assert sizes == pytest.approx([sum(parts), *parts], abs=0.11)


# --- the verb


def test_cache_shows_and_prunes(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    where = f"runtime.cache_dir={tmp_path / 'cache'}"
    code, out, _ = cli("cache", where)
    assert code == 0 and "0.0 MB in 0 files" in out
    more = ["calibration.enabled=false", "runtime.tensor_cache_gb=0.0005"]
    code, out, err = cli("sweep", "quant=q4_k_m,q4_0", "mode=standard", *tiny_overrides, *more)
    assert code == 0, err
    assert "tensors for later use 0.5 MB" in " ".join(out.split())
    kept = entries(Cache(tmp_path / "cache"))
    assert 300_000 < sum(one.n_bytes for one in kept) <= 500_000
    code, out, _ = cli("cache", where)
    assert code == 0
    (line,) = (one.split() for one in out.splitlines() if one.startswith("  tensors"))
    assert line[:2] == ["tensors", str(len(kept))]
    assert kept[0].path.name in out and "probabilities" in out and "locks" not in out
    half = sum(one.n_bytes for one in kept) // 2
    code, out, _ = cli("cache", f"prune={half}", where)
    assert code == 0 and "removed" in out
    left = entries(Cache(tmp_path / "cache"))
    assert 0 < sum(one.n_bytes for one in left) <= half and left == kept[-len(left) :]
    assert cli("cache", "prune=all", where)[0] == 0
    assert entries(Cache(tmp_path / "cache")) == []
    assert "least recently" not in cache_text(Cache(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        *(("5GB", 5_000_000_000), ("5GiB", 5_368_709_120), ("5 gib", 5_368_709_120), ("1.5MiB", 1_572_864)),
        *(("2KiB", 2048), ("300 MB", 300_000_000), ("1TiB", 1_099_511_627_776), ("7", 7), ("0", 0), ("all", 0)),
    ],
)
def test_sizes_are_decimal_or_binary(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["5Gi", "5iB", "GiB", "5GiBB", "5PiB", "-5GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="5GiB"):
        parse_size(text)


@pytest.mark.parametrize("arguments", [["--prune"], ["prune="], ["prune=x"], ["prune=-1"], ["size=5"], ["prune=1e9"]])
def test_odd_arguments_of_cache_are_one_line(cli: Cli, tmp_path: Path, arguments: list[str]) -> None:
    code, _, err = cli("cache", *arguments, f"runtime.cache_dir={tmp_path}")
    assert code == 2 and len(err.splitlines()) == 1 and "prune" in err


def test_sizes() -> None:
    sizes = {"5GB": 5e9, "300 mb": 3e8, "0": 0, "1.5kB": 1500, "all": 0, "12": 12, "2TB": 2e12}
    assert {text: parse_size(text) for text in sizes} == sizes
    with pytest.raises(UserError, match="5GB"):
        parse_size("9" * 400)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e7"])
def test_a_limit_that_is_no_size_is_refused(cli: Cli, tiny_overrides: list[str], tmp_path: Path, value: str) -> None:
    code, _, err = cli("sweep", "quant=q8_0", *tiny_overrides, f"runtime.tensor_cache_gb={value}")
    assert code == 2 and "runtime.tensor_cache_gb" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "results").exists()
