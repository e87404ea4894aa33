"""Windows at once: how many, in which order they come back, and that no number knows of it."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny_model
from tiny_model import random_text

from harness import measure
from harness.engine import model as engine
from harness.engine.collect import collect_activations
from harness.engine.quantize import quantize
from harness.kld_reference import FORMS
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
            assert engine.contexts_that_fit(model, n_ctx=128, ubatch_tokens=128, flash_attention=True) == expected


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


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 6,000 tokens and its Q4_0: BLAS would multiply its output weights with several threads."""
    folder = tmp_path_factory.mktemp("large")
    known = tiny_model.vocabulary()
    more = [(f"\u2581x{i}", -200.0 - i, gguf.TokenType.NORMAL) for i in range(6000 - len(known))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "vocabulary", lambda: known + more)
        patch.setattr(tiny_model, "N_VOCAB", 6000)
        path = tiny_model.write_tiny_llama(folder / "f16.gguf", n_embd=512, n_heads=8, n_layers=2)
    quantize(path, folder / "q4_0.gguf", "q4_0", overrides={}, imatrix={}, n_threads=2)
    return path, folder / "q4_0.gguf"


def scored(
    files: tuple[Path, Path], windows: np.ndarray, folder: Path, n_threads: int, **options: Any
) -> measure.Scores:
    """The second file against the first."""
    cache = Cache(folder / "cache")
    for path in files:
        scores = measure.score(
            path,
            windows,
            folder / path.stem,
            folder / "probabilities",
            cache,
            is_reference=path is files[0],
            first_scored=windows.shape[1] // 2 + 1,
            flash_attention=True,
            n_threads=n_threads,
            reference_path=files[0],
            **options,
        )
    return scores


@pytest.mark.parametrize("form", FORMS)
def test_scores_do_not_know_how_many_windows_ran_at_once(
    large_vocabulary: tuple[Path, Path], tmp_path: Path, form: str
) -> None:
    windows = np.random.default_rng(3).integers(3, 6000, (5, 256)).astype(np.int32)
    found = []
    for n_threads in (1, 2, 4):
        scores = scored(large_vocabulary, windows, tmp_path / f"{n_threads}", n_threads, ubatch_tokens=64, form=form)
        assert scores.windows_at_once == n_threads and scores.kld is not None
        assert (scores.pass_s >= scores.decode_s).all() and (scores.decode_s > 0).all()
        found.append(scores)
    for other in found[1:]:
        assert (other.nll == found[0].nll).all() and (other.top == found[0].top).all()
        assert (other.kld == found[0].kld).all()
    first = scored(large_vocabulary, windows[:1], tmp_path / "first", 2, ubatch_tokens=64, form=form)
    assert first.windows_at_once == 1 and (first.kld == found[0].kld[:1]).all()


@pytest.mark.parametrize(("ubatch_tokens", "expected"), [(1, 1), (85, 1), (255, 1), (86, 2), (256, 2)])
def test_windows_with_a_micro_batch_of_one_token_run_alone(
    large_vocabulary: tuple[Path, Path], tmp_path: Path, ubatch_tokens: int, expected: int
) -> None:
    """256 = 3 * 85 + 1 = 255 + 1: flash attention of one token is cut by threads."""
    windows = np.random.default_rng(3).integers(3, 6000, (2, 256)).astype(np.int32)
    scores = scored(large_vocabulary, windows, tmp_path, 2, ubatch_tokens=ubatch_tokens)
    assert scores.windows_at_once == expected


def test_fewer_windows_run_at_once_where_llama_cpp_makes_no_further_context(
    tiny_gguf: Path, large_vocabulary: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = llama_cpp.llama_init_from_model, []
    windows = np.random.default_rng(3).integers(3, tiny_model.N_VOCAB, (3, 128)).astype(np.int32)
    whole = collect_activations(tiny_gguf, windows, flash_attention=True, n_threads=2)

    def refuse(model: Any, params: Any) -> Any:
        made.append(None if len(made) % 2 else make(model, params))
        return made[-1]

    monkeypatch.setattr(llama_cpp, "llama_init_from_model", refuse)
    scores = scored(large_vocabulary, windows, tmp_path, 2, ubatch_tokens=64)
    assert scores.windows_at_once == 1 and made[1::2] == [None, None]
    alone = collect_activations(tiny_gguf, windows, flash_attention=True, n_threads=2)
    assert all((alone[name].sums == one.sums).all() for name, one in whole.items())


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
