"""Windows at once: how many, in which order they come back, and that no number knows of it."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_model import N_VOCAB, random_text

from harness import measure
from harness.engine import model as engine
from harness.engine.collect import collect_activations
from harness.store import Cache
from harness.waves import in_waves, threads_of, windows_at_once


@pytest.mark.parametrize(
    ("n_windows", "n_threads", "expected"),
    [
        (0, 2, 1),
        (4, 1, 1),
        (1, 8, 1),
        (4, 2, 2),
        (3, 2, 2),  # two with a thread each, then one with both: 1 + 1/2, as long as one after the other
        (20, 2, 2),
        (4, 4, 4),
        (2, 3, 1),  # two with a thread each leave one idle: 1, and 2/3 one after the other
        (4, 6, 3),  # three with two threads each, then one with all: 1/2 + 1/6; four at once would leave two idle
        (16, 64, 4),
    ],
)
def test_as_many_windows_at_once_as_end_first(n_windows: int, n_threads: int, expected: int) -> None:
    assert windows_at_once(n_windows, n_threads) == expected


def test_no_more_windows_at_once_than_there_is_memory_for(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [windows_at_once(8, 4, most) for most in (1, 2, 3, 9)] == [1, 2, 2, 4]
    with engine.open_model(tiny_gguf) as model:
        for free_bytes, expected in ((0, 1), (390e6, 1), (790e6, 3), (990e6, 4)):  # of 5 MB; 200 MB each and some
            monkeypatch.setattr("psutil.virtual_memory", lambda free=free_bytes: SimpleNamespace(available=int(free)))
            assert engine.contexts_that_fit(model, n_ctx=128, ubatch_tokens=128) == expected


def test_the_first_item_of_a_wave_waits_for_the_others_of_it() -> None:
    """Three items with two threads: two run at the same time (each waits for the other), the third has all threads."""
    together, seen = threading.Barrier(2, timeout=10), []

    def work(slot: int, item: str, at_once: int) -> str:
        if at_once == 2:
            together.wait()
        seen.append((slot, item, at_once, threads_of(2, at_once)))
        return item.upper()

    assert list(in_waves("abc", 2, work)) == ["A", "B", "C"]
    assert sorted(seen[:2]) == [(0, "a", 2, 1), (1, "b", 2, 1)] and seen[2] == (0, "c", 1, 2)


def test_an_error_ends_the_waves_after_what_was_begun() -> None:
    ended = []

    def work(slot: int, item: int, at_once: int) -> None:
        if item == 0:
            raise ValueError("broken")
        ended.append(item)

    with pytest.raises(ValueError, match="broken"):
        list(in_waves(range(6), 2, work))
    assert set(ended) <= {1}


def test_scores_do_not_know_how_many_windows_ran_at_once(tiny_gguf: Path, tmp_path: Path) -> None:
    windows = np.random.default_rng(3).integers(3, N_VOCAB, (5, 128)).astype(np.int32)
    found = []
    for n_threads in (1, 2, 4):
        folder = tmp_path / str(n_threads)
        cache = Cache(folder / "cache")
        for name in ("reference", "variant"):
            scores = measure.score(
                tiny_gguf,
                windows,
                folder / name,
                folder / "probabilities",
                cache,
                is_reference=name == "reference",
                first_scored=65,
                ubatch_tokens=64,
                flash_attention=True,
                n_threads=n_threads,
            )
        assert scores.windows_at_once == n_threads and scores.kld is not None
        assert (scores.pass_s >= scores.decode_s).all() and (scores.decode_s > 0).all()
        found.append(scores)
    for other in found[1:]:
        assert (other.nll == found[0].nll).all() and (other.top == found[0].top).all()
        assert (other.kld == found[0].kld).all()


def test_activations_are_those_of_whole_windows_added_in_order(tiny_gguf: Path) -> None:
    """From a context's second window on llama.cpp stops after the last product that is wanted: nothing is missing."""
    windows = engine.tokenize(tiny_gguf, random_text(800, seed=5))[0][:320].reshape(5, 64)
    together = collect_activations(tiny_gguf, windows, flash_attention=True, n_threads=2)
    each = [collect_activations(tiny_gguf, windows[i : i + 1], flash_attention=True, n_threads=2) for i in range(5)]
    assert all(set(one) == set(together) for one in each)
    for name, activations in together.items():
        sums, counts = each[0][name].sums.copy(), each[0][name].counts.copy()
        for one in each[1:]:
            sums += one[name].sums
            counts += one[name].counts
        assert (activations.sums == sums).all() and (activations.counts == counts).all()
