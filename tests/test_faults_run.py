"""The fault table of what happens in mid-run: what was measured stays, and the rerun does the rest and no more.

Every sweep here wants q4_0 beside what is finished, and there the trouble begins; LATE wants q4_1 too, and the same
command measures q4_0 before the trouble begins with q4_1.
"""

import errno
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from faults import Fault, World, can_mount, contents, mounted, require_said, require_table, table
from test_faults_gguf import rewritten

import harness.artefacts
import harness.run
import harness.store
from harness.measure import score
from harness.quantize import make_variant
from harness.record import read_records

LATE = "quant=q8_0,q4_0,q4_1"
Trouble = Callable[[], object]


@pytest.fixture(autouse=True)
def fewer_children() -> Iterator[None]:
    """Jobs that no row is about run in this process: it saves a second a row."""

    def here(work: Callable[..., Any], *args: Any, log_path: Path) -> Any:
        return work(*args)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("cpu", "imatrix"):
            patch.setattr(f"harness.{module}.run_in_child", here)
        yield


# -- what goes wrong inside a child; all of it must be picklable


def die(how: signal.Signals) -> None:
    os.kill(os.getpid(), how)


def abort() -> None:
    """As ggml does where an assertion fails."""
    import ctypes

    from harness.engine.native import ggml

    ggml.ggml_abort.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p]
    ggml.ggml_abort(b"ops.cpp", 1, b"deliberate abort")


def no_numbers() -> None:
    """Every logit is NaN from now on."""
    from harness.engine import model

    decode = model.decode_window

    def decode_window(*args: Any) -> Iterator[tuple[int, np.ndarray, float]]:
        for first, logits, seconds in decode(*args):
            yield first, np.full_like(logits, np.nan), seconds

    model.decode_window = decode_window


def no_room(*_: object) -> None:
    """As every write on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk() -> None:
    """Nothing can be written any more."""
    os.fsync = no_room


def first(work: Callable[..., Any], trouble: Trouble, after: Path | None, *args: Any, **kwargs: Any) -> Any:
    """What a child does in place of `work`: there is trouble before, at once or when q4_0 is recorded below `after`."""
    if after is None or list(after.glob("records/q4_0*.json")):
        trouble()
    return work(*args, **kwargs)


def in_child(
    name: str, work: Callable[..., Any], trouble: Trouble, *, late: bool = False
) -> Callable[[World], Sequence[str]]:
    """The trouble begins in the child that scores (or quantizes) the next case."""

    def make(world: World) -> Sequence[str]:
        world.monkeypatch.setattr(name, partial(first, work, trouble, world.results if late else None))
        return [LATE] if late else []

    return make


scoring = partial(in_child, "harness.artefacts.score", score)
quantizing = partial(in_child, "harness.artefacts.make_variant", make_variant)


def require_kept(fault: Fault, world: World) -> None:
    """The line of the row; no finished record lost a byte; the same command then measures what is missing, no more."""
    settings = fault.make(world)
    before = contents(world.results / "records")
    result = world.sweep(*settings)
    for filler in world.folder.glob("*/filler"):
        filler.unlink()
    require_said(fault, world, result)
    measured = {record.path.stem for record in read_records(world.results) if record.ok}
    after = contents(world.results / "records")
    kept = {name: content for name, content in after.items() if Path(name).stem in measured}
    assert {name: kept[name] for name in before} == before
    finished_before = LATE in settings or "table" in fault.id
    assert len(kept) == len(before) + 2 * finished_before, "a record and its values: q4_0's"
    require_the_rest(world, kept, settings)


def require_the_rest(world: World, kept: dict[str, bytes], settings: Sequence[str]) -> None:
    """After mending, the same command measures what is missing and touches nothing else."""
    world.monkeypatch.undo()
    code, _, err = world.sweep(*settings)
    assert (code, err) == (0, "")
    after = contents(world.results / "records")
    assert {name: after[name] for name in kept} == kept
    require_table(world, "reference", "q8_0", "q4_0", *(["q4_1"] if LATE in settings else []))
    assert not list(world.folder.rglob("*.tmp"))


CASE_FAULTS = [
    Fault(
        "llama.cpp-aborts",
        scoring(abort, late=True),
        says=(
            "q4_1 standard failed: the engine's process died of SIGABRT; see "
            "{folder}/results/tiny/records/q4_1-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
    Fault(
        "killed-for-memory",
        scoring(partial(die, signal.SIGKILL)),
        says=(
            "q4_0 standard failed: the engine's process died of SIGKILL (the system may have run out of memory); "
            "see {folder}/results/tiny/records/q4_0-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
    Fault(
        "segmentation-fault",
        quantizing(partial(die, signal.SIGSEGV)),
        says=(
            "q4_0 standard failed: the engine's process died of SIGSEGV; see "
            "{folder}/results/tiny/records/q4_0-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
    Fault(
        "nan-logits",
        scoring(no_numbers),
        says=(
            "q4_0 standard failed: 63 of 63 tokens got a probability that is not finite: the model is broken; see"
            " {folder}/results/tiny/records/q4_0-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
    Fault(
        "exception-in-the-child",
        scoring(partial(int, "no number")),
        says=(
            "q4_0 standard failed: ValueError: invalid literal for int() with base 10: 'no number'; see "
            "{folder}/results/tiny/records/q4_0-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
]


@table(CASE_FAULTS)
def test_a_case_that_fails_is_recorded_and_the_others_stay(fault: Fault, world: World) -> None:
    require_kept(fault, world)


def test_a_failed_case_is_recorded_with_its_reason(world: World) -> None:
    """And the sweep goes on with the next one."""
    scoring(abort)(world)
    code, out, _ = world.sweep("quant=q8_0,q4_0,f16")
    records = {record.data["quant"]: record.data for record in read_records(world.results)}
    assert code == 1 and "FAILED: q4_0 standard" in out
    assert {quant: one["status"] for quant, one in records.items()} == {
        **{"reference": "ok", "q8_0": "ok"},
        **{"q4_0": "failed", "f16": "failed"},
    }
    assert records["q4_0"]["error"] == "the engine's process died of SIGABRT"
    assert any("deliberate abort" in line for line in records["q4_0"]["log_tail"])


# -- disks that fill up


def full_disk_at_the_record(world: World) -> Sequence[str]:
    """The file of q4_1's values finds no room; the parent writes it."""
    real = os.fsync

    def fsync(number: int) -> None:
        if Path(f"/proc/self/fd/{number}").resolve().name.startswith(".q4_1"):  # not of q4_0, which comes first
            no_room()
        real(number)

    world.monkeypatch.setattr(harness.store.os, "fsync", fsync)
    return [LATE]


def limited_file_size(world: World) -> Sequence[str]:
    """Nothing above 1 MB can be written, as with a quota; the quantized file is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = harness.artefacts.ensure_variant

    def ensure_variant(sweep: Any, case: Any, display: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # for the child
        try:
            return real(sweep, case, display)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    world.monkeypatch.setattr(harness.run, "ensure_variant", ensure_variant)
    return []


def fill(folder: Path, leave: int) -> None:
    """Write until only so many bytes are free."""
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - leave)


def full_results(world: World) -> Sequence[str]:
    """The results are on a disk of their own that fills up, with room for a record's text only."""
    shutil.move(world.folder / "results", world.folder / "moved")
    disk = mounted(world, "results", "size=4m")
    shutil.copytree(world.folder / "moved", disk, dirs_exist_ok=True)
    return scoring(partial(fill, disk, 4096))(world)


def full_cache(world: World) -> Sequence[str]:
    """The cache is on a disk of its own that fills up while the file is written, or a tensor of it kept."""
    shutil.move(world.cache, world.folder / "moved")
    disk = mounted(world, "cache", "size=20m")
    shutil.copytree(world.folder / "moved", disk, dirs_exist_ok=True)
    return quantizing(partial(fill, disk, 400_000))(world)


def full_disk_at_the_table(world: World) -> Sequence[str]:
    real = harness.store.write_atomic

    def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
        if path.name == "table.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, write)

    world.monkeypatch.setattr(harness.store, "write_atomic", write_atomic)
    return []


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
DISK_FAULTS = [
    Fault(
        "disk-full-at-a-record",
        full_disk_at_the_record,
        says=(
            "{folder}/results/tiny/records/q4_1-standard-{hex}.npz: No space left on device; make room, then give"
            " the same command again: what was measured is kept"
        ),
        code=1,
        marks=[linux],
    ),
    Fault(
        "disk-full-in-a-child",
        scoring(full_disk),
        says=(
            "{folder}/cache/scores/{hex}/window_00000.npz: No space left on device; make room, then give the same"
            " command again: what was measured is kept"
        ),
        code=1,
    ),
    Fault(
        "disk-full-at-the-table",
        full_disk_at_the_table,
        says=(
            "{folder}/results/tiny/table.csv: No space left on device; make room, then give the same command "
            "again: what was measured is kept"
        ),
        code=1,
    ),
    Fault(
        "file-size-limit",
        limited_file_size,
        says=(
            "{folder}/cache/variants/{hex}.gguf: File too large; make room, then give the same command again: "
            "what was measured is kept"
        ),
        code=1,
        marks=[linux],
    ),
    Fault(
        "results-disk-fills-up",
        full_results,
        says=(
            "{folder}/results/tiny/records/q4_0-standard-{hex}.json: No space left on device; make room, "
            "then give the same command again: what was measured is kept"
        ),
        code=1,
        marks=[can_mount],
    ),
    Fault(
        "cache-disk-fills-up",
        full_cache,
        says=(
            "{folder}/cache/{words}: No space left on device; make room, then give the same command "
            "again: what was measured is kept"
        ),
        code=1,
        marks=[can_mount],
    ),
]


@table(DISK_FAULTS)
def test_a_full_disk_stops_the_sweep_in_one_line(fault: Fault, world: World) -> None:
    require_kept(fault, world)


# -- somebody deletes, the clock goes wrong


def delete(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def deleted(what: Callable[[World], Path]) -> Callable[[World], Sequence[str]]:
    """Deleted before q4_0 is quantized."""
    return lambda world: quantizing(partial(delete, what(world)))(world)


LOST_FAULTS = [
    Fault(
        "cache-deleted",
        deleted(lambda world: world.cache),
        says=(
            "q4_0 standard failed: the imatrix {folder}/cache/imatrix/{hex}.gguf is gone or was changed; see "
            "{folder}/results/tiny/records/q4_0-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
    Fault(
        "imatrix-deleted",
        deleted(lambda world: world.cache / "imatrix"),
        says=(
            "q4_0 standard failed: the imatrix {folder}/cache/imatrix/{hex}.gguf is gone or was changed; see "
            "{folder}/results/tiny/records/q4_0-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
    Fault(
        "probabilities-deleted",
        deleted(lambda world: world.cache / "probabilities"),
        says=(
            "q4_0 standard failed: {folder}/cache/probabilities/{hex}/window_00000.p is gone or was changed; see "
            "{folder}/results/tiny/records/q4_0-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
    Fault(
        "variant-deleted",
        lambda world: scoring(partial(delete, world.cache / "variants"))(world),
        says=(
            "q4_0 standard failed: llama.cpp cannot load {folder}/cache/variants/{hex}.gguf (llama_model_load: "
            "error loading model: llama_model_loader: failed to load model from "
            "{folder}/cache/variants/{hex}.gguf); see "
            "{folder}/results/tiny/records/q4_0-standard-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
]


@table(LOST_FAULTS)
def test_what_somebody_deletes_is_made_again(fault: Fault, world: World) -> None:
    require_kept(fault, world)


RESULTS_DELETED = Fault(
    "results-deleted",
    deleted(lambda world: world.results),
    says=(
        "somebody deleted records from {folder}/results/tiny (reference, q8_0 standard): the same command "
        "measures them again"
    ),
    code=1,
)


@table([RESULTS_DELETED])
def test_deleted_results_are_told_and_measured_again(fault: Fault, world: World) -> None:
    settings = fault.make(world)
    require_said(fault, world, world.sweep(*settings))
    require_table(world, "q4_0")
    require_the_rest(world, contents(world.results / "records"), settings)


# -- a reference that cannot be scored, which only scoring tells


def overflowing(world: World) -> Sequence[str]:
    """Finite weights whose logits are not."""
    huge = np.full(256, 3e38, np.float32)
    return ["results.name=other", *rewritten(tensors={"output_norm.weight": huge})(world)]


def aborting(world: World) -> Sequence[str]:
    """Llama.cpp loads this header, and aborts as soon as it computes."""
    return ["results.name=other", *rewritten(attention__layer_norm_rms_epsilon=-1.0)(world)]


REFERENCE_FAULTS = [
    Fault(
        "reference-gives-nan-logits",
        overflowing,
        says=(
            "reference failed: 63 of 63 tokens got a probability that is not finite: the model is broken; see "
            "{folder}/results/other/records/reference-reference-{hex}.json, the same command tries again"
        ),
        code=1,
    ),
    Fault(
        "header-that-aborts-the-first-run",
        aborting,
        says=(
            "no imatrix can be made, see {folder}/cache/logs/imatrix.log: the engine's process died of SIGABRT "
            "({words} GGML_ASSERT(eps >= 0.0f) failed)"
        ),
        code=1,
    ),
]


@table(REFERENCE_FAULTS)
def test_a_reference_of_no_use_stops_the_sweep(fault: Fault, world: World) -> None:
    before = contents(world.results)
    require_said(fault, world, world.sweep(*fault.make(world)))
    assert contents(world.results) == before
    assert not list((world.cache / "variants").glob("*.gguf")), "nothing was quantized for it"


# -- the timing pass


def killed(*_: object, **__: object) -> None:
    die(signal.SIGKILL)


def killed_while_timing(world: World) -> Sequence[str]:
    world.monkeypatch.setattr("harness.speed.time_models", killed)
    return []


TIMING_FAULTS = [
    Fault(
        "killed-while-timing",
        killed_while_timing,
        says=(
            "the timing pass failed: the engine's process died of SIGKILL (the system may have run out of memory); "
            "the same command tries again"
        ),
        code=1,
    )
]


@table(TIMING_FAULTS)
def test_a_timing_pass_that_fails_costs_no_case(fault: Fault, world: World) -> None:
    fault.make(world)
    speed = ["measure.speed=true", "measure.generate_tokens=2"]
    require_said(fault, world, world.sweep(*speed))
    require_table(world, "reference", "q8_0", "q4_0")
    kept = contents(world.results / "records")
    world.monkeypatch.undo()
    code, out, err = world.sweep(*speed)
    assert (code, err) == (0, "")
    assert contents(world.results / "records") == kept and "scoring" not in out
    assert len(list((world.results / "speed").iterdir())) == 1


# -- what the harness mends by itself


def cut_in_half(pattern: str) -> Callable[[World], Sequence[str]]:
    """A file of the world is cut off in the middle."""

    def make(world: World) -> Sequence[str]:
        (path, *_) = world.folder.glob(pattern)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return []

    return make


def clock_goes_back(world: World) -> Sequence[str]:
    """Every look at the clock shows an earlier year, all before the finished records."""
    years = iter(range(1999, 1970, -1))
    world.monkeypatch.setattr(harness.run, "utc_now", lambda: f"{next(years)}-01-01T00:00:00.000000+00:00")
    return []


def in_memory(world: World) -> Sequence[str]:
    """The results move to another file system than the cache."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    world.stack.callback(shutil.rmtree, folder)
    shutil.copytree(world.folder / "results", folder, dirs_exist_ok=True)
    shutil.rmtree(world.folder / "results")
    (world.folder / "results").symlink_to(folder)
    return []


MENDED_FAULTS = [
    Fault("half-a-record", cut_in_half("results/tiny/records/q8_0*.json"), code=0),
    Fault("half-the-values", cut_in_half("results/tiny/records/q8_0*.npz"), code=0),
    Fault("clock-goes-back", clock_goes_back, code=0),
    Fault("other-file-system", in_memory, code=0, marks=[linux]),
]


@table(MENDED_FAULTS)
def test_what_the_harness_mends_by_itself(fault: Fault, world: World) -> None:
    whole = contents(world.results / "records")
    fault.make(world)
    require_said(fault, world, world.sweep())
    require_table(world, "reference", "q8_0", "q4_0")
    after = contents(world.results / "records")
    again = "q8_0" if fault.id in ("half-a-record", "half-the-values") else "nothing"
    assert {name for name in whole if after[name] != whole[name]} <= {name for name in whole if name.startswith(again)}
    values = [name for name in whole if name.endswith(".npz")]
    for name in values:
        with np.load(io.BytesIO(whole[name])) as one, np.load(io.BytesIO(after[name])) as other:
            assert (one["nll"] == other["nll"]).all(), "measured again: the same values"


FAULTS = [
    *(*CASE_FAULTS, *DISK_FAULTS, *LOST_FAULTS, RESULTS_DELETED),
    *(*REFERENCE_FAULTS, *TIMING_FAULTS, *MENDED_FAULTS),
]


def scaled_down(model: Path) -> None:
    """Another model of the same size and header: one matrix of it is zero."""
    tensor = next(one for one in gguf.GGUFReader(model).tensors if one.name == "blk.0.ffn_down.weight")
    with model.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(bytes(tensor.n_bytes))


@pytest.mark.parametrize("how", [quantizing, scoring], ids=["quantizing", "scoring"])
def test_a_model_replaced_in_mid_run_is_told_and_poisons_nothing(how: Any, world: World) -> None:
    truth = world.sweep("results.name=truth", f"runtime.cache_dir={world.folder / 'other'}")
    assert truth[0] == 0, truth[2]
    whole = world.model.read_bytes()
    how(partial(scaled_down, world.model))(world)
    code, _, err = world.sweep()
    assert code == 1 and "was changed while the sweep ran" in err and err.count("\n") == 1
    world.monkeypatch.undo()
    world.model.write_bytes(whole)
    assert world.sweep()[0] == 0
    records = [
        {record.name: record for record in read_records(world.folder / "results" / name)} for name in ("tiny", "truth")
    ]
    for name, record in records[1].items():
        assert np.array_equal(records[0][name].per_token()["nll"], record.per_token()["nll"])
        if (mine := records[0][name].data["quantizing"]) and name == "q4_0-standard":
            assert mine["n_tensors_damaged"] == 0
