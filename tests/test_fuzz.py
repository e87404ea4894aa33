"""Whatever a stranger's file may hold: a result or one line, nothing written elsewhere, no hang, no memory blown up.

The targets are those of benchmarks/fuzz.py, which looks further; what it found is kept here. Inputs are damaged valid
files and random bytes, the same in every run.
"""

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz_targets import TARGETS, Target, run

MOST_CPU_S = 5.0
MOST_BYTES = 64 << 20  # tables of a card and the rows of plots; no input here is larger than a hundredth of that
FEW = {"records": 10, "speed": 10, "model_card": 20, "prompts": 40, "rules": 60, "card": 60, "csv": 60}  # the slow ones
UNTRACED = ("records", "speed")  # whole reports: tracing memory makes pandas five times as slow

# Inputs that once broke a promise, beside those that have tests of their own (records, archives, GGUF headers).
FOUND = [
    ("prompts", b"null"),  # pyarrow ended the process
    ("prompts", b'null[{"text": null}u'),
    ("rules", b"_\xcdN\xd2=}\n\x1d\xf0B\x13\xb6';\x04;Q\xde,\xdb\x1bW^\xff\xf88Dxz2\xd0"),  # min_gqa of 400 digits
    ("recipe", b"blk\\.(0|1\x06\\.=q4_k\n"),  # a control character in the reason
]


@contextmanager
def bounded(*, memory: bool) -> Iterator[None]:
    """AssertionError when the block takes too much CPU time or memory."""
    begin_s = time.process_time()
    if memory:
        tracemalloc.start()
    try:
        yield
        assert time.process_time() - begin_s < MOST_CPU_S
        assert not memory or tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def survives(name: str, data: bytes) -> None:
    with TemporaryDirectory() as folder, bounded(memory=name not in UNTRACED):
        run(TARGETS[name], data, Path(folder))


@st.composite
def damaged(draw: st.DrawFn, target: Target) -> bytes:
    """A valid input with some places changed."""
    data = draw(st.sampled_from(list(target.seeds())))
    words = st.sampled_from(target.words) if target.words else st.nothing()
    new = st.one_of(
        st.binary(max_size=12), words, st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x7f", b"\n", b"-1", b"9" * 30])
    )
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.sampled_from([start, start + 1, start + 4, start + 8, len(data)]))
        data = data[:start] + draw(new) + data[end:]
    return data[: target.max_bytes]


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_and_random_bytes(name: str) -> None:
    target = TARGETS[name]
    for seed in list(target.seeds())[: FEW.get(name)]:
        survives(name, seed)

    @settings(
        max_examples=FEW.get(name, 150),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(damaged(target), st.binary(max_size=300)))
    def check(data: bytes) -> None:
        survives(name, data)

    check()


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found(name: str, data: bytes) -> None:
    survives(name, data)
