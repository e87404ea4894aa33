"""The three forms in which a reference is kept: against each other, float64 and bounds derived beside the tests."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import World
from rich.console import Console

from harness import kld_reference, measure, metrics
from harness.compose import compose
from harness.engine.quantize import quantize
from harness.errors import EngineError, UserError
from harness.kld_reference import (
    FORMS,
    HIDDEN,
    LOG_PROBS_16,
    PROBABILITIES,
    OutputWeights,
    choose_form,
    kept_form,
    open_rows,
    probability_path,
    reference_bytes,
)
from harness.plan_view import sweep_summary
from harness.prepare import prepare
from harness.progress import ProgressDisplay
from harness.record import read_records
from harness.run import run
from harness.store import Cache, key_of
from harness.sweep import Sweep
from tests.tiny_architectures import Family, gemma2, gpt2, llama, mamba, write_family
from tests.tiny_model import N_VOCAB

Cli = Callable[..., tuple[int, str, str]]
WINDOWS = np.random.default_rng(1).integers(3, N_VOCAB, (2, 128)).astype(np.int32)
FIRST_SCORED = 65
N_SCORED = WINDOWS.shape[1] - FIRST_SCORED


def rows_of(logits: np.ndarray) -> metrics.ReferenceRows:
    """What 16 bits leave of logits."""
    file = io.BytesIO()
    kld_reference.write_log_probs_16(file, logits)
    assert file.tell() == reference_bytes(*logits.shape, 0)[LOG_PROBS_16]
    file.seek(0)
    return open_rows(file, LOG_PROBS_16, logits.shape[1], None)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(float) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 30.0])
def test_16_bits_move_the_kld_by_less_than_their_bound(scale: float) -> None:
    """ln p moves by at most h, half a step of 1/65535 of the row's range (of 40 nats at most; what lies below is
    raised to e^-40, which is nothing). So KL(p || p') and KL(p' || p) are at most (2h)^2 / 8 (Hoeffding's lemma), p'/p
    lies within e^(+-2h) as both sum up to 1, and the KLD from q moves by
    |KL(p' || p) + sum (p' - p) ln(p/q)| <= h^2 / 2 + (e^2h - 1) sum p |ln(p/q)|. Float32 adds some 3e-6."""
    rng = np.random.default_rng(0)
    real = rng.normal(0, scale, (40, 3000)).astype(np.float32) - 200
    other = (real + rng.normal(0, 0.3 * min(scale, 3), real.shape)).astype(np.float32)
    log_p, log_q = log_softmax(real), log_softmax(other)
    p = np.exp(log_p)
    h = np.minimum(np.ptp(real, axis=1), 40) / 65535 / 2 + 1e-5  # 1e-5: float32 of ln p, which is up to 40
    values = metrics.token_values(other, np.zeros(40, int), rows_of(real))
    assert values.kld is not None
    error = np.abs(values.kld - (p * (log_p - log_q)).sum(1))
    bound = h**2 / 2 + np.expm1(2 * h) * (p * np.abs(log_p - log_q)).sum(1)
    assert (error <= bound + 3e-6).all()
    for row, kept, half in zip(real, rows_of(real)(40)[0], h, strict=True):
        assert kld_reference.divergence(row, np.log(kept.astype(float))) <= half**2 / 2 + 1e-12


def test_16_bits_sum_up_to_one_and_agree_with_their_entropy() -> None:
    logits = np.random.default_rng(2).normal(0, 5, (20, 50_000)).astype(np.float32)
    p, p_log_p = rows_of(logits)(20)
    assert np.abs(p.sum(1, dtype=float) - 1).max() < 1e-6
    np.testing.assert_allclose(p_log_p, (p.astype(float) * np.log(p.astype(float))).sum(1), atol=1e-5)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([7.0, 7.0, 7.0, 7.0], [0.25] * 4),
        ([0.0, -1e30, -1e30, -1e30], [1, 0, 0, 0]),
        ([0.0, 0.0, -np.inf, -np.inf], [0.5, 0.5, 0, 0]),
        ([math.log(8), math.log(4), math.log(2), math.log(2)], [0.5, 0.25, 0.125, 0.125]),
    ],
)
def test_16_bits_of_rows_by_hand(row: list[float], expected: list[float]) -> None:
    p, p_log_p = rows_of(np.array([row], np.float32))(1)
    np.testing.assert_allclose(p[0], expected, atol=2e-5)  # a step of ln 4 / 65535 is 2e-5
    assert p_log_p[0] == pytest.approx(sum(x * math.log(x) for x in expected if x), abs=1e-4)


def test_divergence_by_hand_and_near_zero() -> None:
    # 1/2, 1/4, 1/4 against 1/4, 1/2, 1/4: 1/2 ln 2 - 1/4 ln 2
    a, b = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    assert kld_reference.divergence(a + 3, b - 5) == pytest.approx(math.log(2) / 4, rel=1e-12)
    assert kld_reference.divergence(a, a + 100) == pytest.approx(0, abs=1e-25)
    # p = 1/2, 1/2 and logits +-x apart: ln cosh x, which is x^2 / 2 for small x
    assert kld_reference.divergence(np.zeros(2), np.array([1e-5, -1e-5])) == pytest.approx(5e-11, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (1.00390625, 0x3F80),  # half way to the next, 1.0078125: to the even one
        (1.01171875, 0x3F82),  # half way between 0x3F81 and 0x3F82
        (1.00390637, 0x3F81),  # beyond half way
        (-2.5, 0xC020),
    ],
)
def test_bf16_is_rounded_to_the_nearest_and_to_even(value: float, bits: int) -> None:
    rounded = kld_reference._round(np.array([value], np.float32), "bf16")
    assert rounded.tolist() == [bits]
    assert kld_reference._as_float32(rounded, "bf16")[0] == pytest.approx(value, rel=2**-8)


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16"])
def test_hidden_states_give_the_logits_of_a_plain_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_name: str
) -> None:
    monkeypatch.setattr(kld_reference, "_SLICE_BYTES", 4 * 24 * 10)  # ten tokens of the vocabulary at a time
    monkeypatch.setattr(kld_reference, "_PRODUCT_ROWS", 17)
    rng = np.random.default_rng(3)
    states, weights = rng.normal(0, 1, (60, 24)).astype(np.float32), rng.normal(0, 1, (103, 24)).astype(np.float32)
    words = kld_reference._round(weights, type_name)
    path = tmp_path / "weights"
    path.write_bytes(b"12345678" + words.tobytes())
    truth = kld_reference._as_float32(kld_reference._round(states, type_name), type_name).astype(float)
    truth = truth @ kld_reference._as_float32(words, type_name).astype(float).T
    rows = open_rows(io.BytesIO(states.tobytes()), HIDDEN, 103, OutputWeights(path, 8, type_name, 103, 24))
    p = np.concatenate([rows(n)[0].copy() for n in (1, 16, 16, 3, 16, 8)])
    np.testing.assert_allclose(p, np.exp(log_softmax(truth)), rtol=1e-4, atol=1e-9)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match="output weights end too early"):
        OutputWeights(path, 8, type_name, 103, 24).logits(states, np.empty((60, 103), np.float32))


@pytest.mark.parametrize("form", FORMS)
def test_files_that_end_too_early_are_an_error(tmp_path: Path, form: str) -> None:
    (tmp_path / "weights").write_bytes(bytes(4 * 10 * 6))
    whole = bytes(reference_bytes(4, 10, 6)[form])
    rows = open_rows(io.BytesIO(whole[:-1]), form, 10, OutputWeights(tmp_path / "weights", 0, "f32", 10, 6))
    rows(2)
    with pytest.raises(EngineError, match="end too early: delete the cache's folder `probabilities`"):
        rows(2)


def test_auto_takes_the_fastest_that_fits() -> None:
    n_bytes = reference_bytes(4092, 49152, 576)
    assert n_bytes == {PROBABILITIES: 804_552_672, LOG_PROBS_16: 402_292_704, HIDDEN: 9_427_968}
    gib = 1 << 30
    for budget, form in ((804_552_672, PROBABILITIES), (804_552_671, LOG_PROBS_16), (402_292_703, HIDDEN), (0, HIDDEN)):
        assert choose_form("auto", budget / gib, n_bytes) == form
    assert choose_form("auto", 0, reference_bytes(1, 100, 300)) == LOG_PROBS_16, "the smallest, 208 bytes of 1200"
    assert choose_form(PROBABILITIES, 0, n_bytes) == PROBABILITIES, "what is asked for has no budget"


@dataclass(frozen=True)
class Scored:
    """A model and a variant of it, scored with one form."""

    reference: measure.Scores
    variant: measure.Scores
    kept: str
    n_bytes: int
    facts: Any


def score(folder: Path, path: Path, *, is_reference: bool, form: str, **more: Any) -> measure.Scores:
    return measure.score(
        path,
        WINDOWS,
        folder / path.stem,
        folder / "probabilities",
        Cache(folder),
        is_reference=is_reference,
        first_scored=FIRST_SCORED,
        ubatch_tokens=64,
        flash_attention=True,
        n_threads=1,
        form=form,
        reference_path=folder.parent / "reference.gguf",
        **more,
    )


def scored(folder: Path, form: str) -> Scored:
    here = folder / form
    reference = score(here, folder / "reference.gguf", is_reference=True, form=form)
    variant = score(here, folder / "variant.gguf", is_reference=False, form=form)
    paths = [probability_path(here / "probabilities", i) for i in range(len(WINDOWS))]
    cache, n_bytes = Cache(here), sum(path.stat().st_size for path in paths)
    kept = {kept_form(cache, path, form) for path in paths}
    assert len(kept) == 1
    return Scored(reference, variant, kept.pop(), n_bytes, cache.facts(paths[0]))


def granite() -> Family:
    """Logits are divided by a scale behind the output projection."""
    base = llama("granite", tied=True)
    scales = {"logit_scale": 8.0, "embedding_scale": 4.0, "residual_scale": 0.5, "attention.scale": 0.125}
    return replace(base, architecture="granite", keys=base.keys | scales)


UNTIED = llama("llama-untied", width=288, inner=416, tied=False)


@pytest.mark.parametrize(
    ("family", "file_type", "kept"),
    [
        *((UNTIED, file_type, HIDDEN) for file_type in ("f16", "bf16", "f32")),
        (gpt2(), "f16", HIDDEN),
        (mamba(), "f16", HIDDEN),
        (gemma2(), "f16", LOG_PROBS_16),
        (granite(), "f16", LOG_PROBS_16),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_all_forms_give_the_same_kld(tmp_path: Path, family: Family, file_type: str, kept: str) -> None:
    source = write_family(family, tmp_path / "source.gguf")
    quantize(source, tmp_path / "reference.gguf", file_type, overrides={}, imatrix={}, n_threads=1)
    quantize(source, tmp_path / "variant.gguf", "q4_0", overrides={}, imatrix={}, n_threads=1)
    forms = {form: scored(tmp_path, form) for form in FORMS}
    direct = forms[PROBABILITIES]
    assert direct.variant.kld is not None and direct.variant.kld.mean() > 5e-4
    n_rows, width = WINDOWS.shape[0] * N_SCORED, family.shapes["token_embd.weight"][1]
    for form, found in forms.items():
        assert found.variant.kld is not None
        assert found.variant.kld.mean() == pytest.approx(direct.variant.kld.mean(), rel=1e-3)
        np.testing.assert_array_equal(found.reference.nll, direct.reference.nll, "looking moves no number")
        np.testing.assert_array_equal(found.variant.nll, direct.variant.nll)
        assert found.kept == (kept if form == HIDDEN else form)
        assert found.n_bytes == reference_bytes(n_rows, N_VOCAB, width)[found.kept]
    measured = forms[HIDDEN].facts["hidden_kld"]
    assert measured < kld_reference.MAX_HIDDEN_KLD / 100 if kept == HIDDEN else measured > 1e-3


@pytest.mark.parametrize("family", [llama("llama-tied", tied=True), gemma2()], ids=lambda family: family.name)
def test_a_killed_reference_goes_on_window_by_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    reference = write_family(family, tmp_path / "reference.gguf")
    truth = score(tmp_path / "whole", reference, is_reference=True, form=HIDDEN)

    def killed(_share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "half", reference, is_reference=True, form=HIDDEN, on_progress=killed)
    first, second = (probability_path(tmp_path / "half" / "probabilities", i) for i in range(2))
    assert first.is_file() and not second.exists()
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(measure, "mean_divergence", None)  # the first window was checked, what was found is kept
    again = score(tmp_path / "half", reference, is_reference=True, form=HIDDEN)
    assert first.stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.nll, truth.nll)
    for i, path in enumerate((first, second)):
        assert path.read_bytes() == probability_path(tmp_path / "whole" / "probabilities", i).read_bytes()


def test_no_room_for_what_replaces_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = write_family(gemma2(), tmp_path / "reference.gguf")
    needed = N_SCORED * (8 + 2 * N_VOCAB)  # of the second window; the first is there
    monkeypatch.setattr("harness.reference.free_bytes", lambda _folder: needed - 1)
    with pytest.raises(UserError, match="are needed for the reference's log-probabilities in 16 bits: make room"):
        score(tmp_path / "small", reference, is_reference=True, form=HIDDEN)
    assert not Cache(tmp_path / "small").holds(probability_path(tmp_path / "small" / "probabilities", 0))
    monkeypatch.setattr("harness.reference.free_bytes", lambda _folder: needed)
    score(tmp_path / "small", reference, is_reference=True, form=HIDDEN)


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_file_is_not_read(tmp_path: Path, form: str) -> None:
    reference = write_family(llama("llama-tied", tied=True), tmp_path / "reference.gguf")
    score(tmp_path / form, reference, is_reference=True, form=form)
    path = probability_path(tmp_path / form / "probabilities", 1)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    (tmp_path / "variant.gguf").write_bytes(reference.read_bytes())
    with pytest.raises(EngineError, match=r"window_00001\.p is gone or was changed"):
        score(tmp_path / form, tmp_path / "variant.gguf", is_reference=False, form=form)


def prepared(overrides: list[str], *more: str) -> Sweep:
    return prepare(compose([*overrides, *more]), lambda _line: None)


def measured(sweep: Sweep) -> tuple[str, list[dict[str, Any]]]:
    """What running it says, and the records."""
    said = io.StringIO()
    with ProgressDisplay(Console(file=said, width=1000), 1.0) as display:
        assert run(sweep, display) == []
    return said.getvalue(), [record.data for record in read_records(sweep.folder)]


def test_keys_of_probabilities_are_the_older_ones(world: World) -> None:
    overrides = ["quant=q8_0", "mode=standard", *world.settings]
    sweep = prepared(overrides)
    assert sweep.kld_reference == PROBABILITIES and sweep.finished
    assert all("kld_reference" not in record.data["settings"] for record in read_records(sweep.folder))
    # as the release before this option made them
    scoring = (sweep.first_scored, sweep.config.measure.ubatch_tokens, True)
    case, prompts, versions = sweep.reference_case, sweep.prompts.key, (metrics.VERSION, sweep.engine_version)
    assert case.key == key_of(sweep.reference.id, prompts, None, case.plan.id, *scoring, sweep.n_threads, *versions)
    folder = key_of(sweep.reference.id, prompts, *scoring, *versions)
    assert sweep.probability_folder.name == folder
    with pytest.raises(UserError, match=r"another settings.kld_reference \(probabilities, now hidden\)") as refused:
        prepared(overrides, "measure.kld_reference=hidden")
    (hint,) = re.findall(r"measure\.kld_reference=\w+", str(refused.value))
    assert prepared(overrides, hint).finished and "results.name=NAME" in str(refused.value)
    with pytest.raises(UserError, match=r"another settings\.ubatch_tokens") as refused:
        prepared(overrides, "measure.ubatch_tokens=64")
    assert "kld_reference" not in str(refused.value)
    names = {form: (f"measure.kld_reference={form}", f"results.name={form}") for form in FORMS}
    others = {form: prepared(overrides, *more) for form, more in names.items()}
    assert others[PROBABILITIES].reference_case.key == case.key
    assert len({sweep.reference_case.key for sweep in others.values()}) == 3
    assert len({sweep.probability_folder for sweep in others.values()}) == 3
    small = ("measure.kld_reference_gib=0.0001", "results.name=small")  # 107,374 bytes
    assert prepared(overrides, *small).kld_reference == LOG_PROBS_16


def test_a_sweep_says_and_records_its_form(world: World) -> None:
    more = ("measure.kld_reference=hidden", "results.name=hidden")
    overrides = ["quant=q8_0", "mode=standard", *world.settings, *more]
    sweep = prepared(overrides)
    n_bytes = 2 * 63 * 4 * 256  # windows, tokens, a float32 for each of 256 numbers
    assert sweep.missing_probability_bytes == n_bytes
    summary = sweep_summary(sweep)
    assert "the reference's hidden states 0.1 MB" in summary
    assert "the reference is kept as hidden (probabilities 0.2 MB, log_probs_16 0.1 MB, hidden 0.1 MB; " in summary
    said, records = measured(sweep)
    assert "warning" not in said
    assert sum(path.stat().st_size for path in sweep.probability_folder.glob("*.p")) == n_bytes
    assert [record["settings"].get("kld_reference") for record in records] == [HIDDEN] * 2
    assert all("kld_reference_kept" not in record["settings"] and "flaw" not in record for record in records)
    truth = {record.name: record.per_token() for record in read_records(world.results)}
    for record in read_records(sweep.folder):
        found = record.per_token()
        np.testing.assert_array_equal(found["nll"], truth[record.name]["nll"])
        assert record.flaw is None
        if "kld" in found:
            assert found["kld"].mean() == pytest.approx(truth[record.name]["kld"].mean(), rel=1e-3)
    assert prepared(overrides).finished


def test_a_sweep_whose_hidden_states_will_not_do(tiny_overrides: list[str], tmp_path: Path) -> None:
    model = write_family(gemma2(), tmp_path / "gemma2.gguf")
    more = (f"model.path={model}", "measure.kld_reference=hidden", "calibration=none")
    overrides = ["quant=reference", *(one for one in tiny_overrides if "calibration." not in one), *more]
    said, (record,) = measured(prepared(overrides))
    assert "warning: the reference's logits cannot be recomputed from its hidden states, it is kept as" in said
    assert record["settings"]["kld_reference"] == HIDDEN
    assert record["settings"]["kld_reference_kept"] == LOG_PROBS_16
    assert "kld_reference" in [finding["kind"] for finding in record["findings"]]
    again = prepared(overrides)
    assert again.finished, "what was chosen is in the key, not what came of it"
    assert again.kept_form == LOG_PROBS_16


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("measure.kld_reference=hiden", "measure.kld_reference=hiden is no way to keep the reference. Did you mean"),
        ("measure.kld_reference_gib=-1", "measure.kld_reference_gib=-1.0: give GiB of disk from 0 on"),
    ],
)
def test_a_bad_value_is_one_line(cli: Cli, tiny_overrides: list[str], override: str, words: str) -> None:
    code, out, err = cli("sweep", "quant=q8_0", *tiny_overrides, override)
    assert code == 2 and not out
    assert words in err and len(err.strip().splitlines()) == 1
