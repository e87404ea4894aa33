"""SmolLM2-135M, the default prompts: the figures that llama-perplexity prints for the same windows and files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.compose import compose
from harness.engine.collect import Activations
from harness.engine.quantize import quantize
from harness.imatrix import read_imatrix, write_imatrix
from harness.prepare import prepare
from harness.quantize import make_variant

# llama-perplexity -c 2048 -b 2048 --chunks 4, built from the same llama.cpp; the files quantized without imatrix. The
# divergences are from --kl-divergence, whose reference is rounded to 16 bits, so they agree within the printed error.
REFERENCE_PPL, REFERENCE_SE = 12.5674, 0.58006
PRINTED = {  # PPL, mean KLD, its error, same top in per cent
    "q8_0": (12.6214, 0.003600, 0.000099, 96.628),
    "q4_k_m": (13.2975, 0.052677, 0.001608, 89.247),
    "q4_0": (15.4987, 0.274607, 0.005452, 73.534),
}


@pytest.mark.real_model
def test_figures_are_llama_perplexitys(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    quants = ",".join(PRINTED)
    plain = ["quant.pure=false", "mode=standard", "calibration=none"]  # q4_0 would be the pure preset
    code, out, err = cli("sweep", f"quant={quants}", *plain, f"results.dir={tmp_path}")
    assert code == 0, err
    assert "dequantized from Q4_1" in out
    (folder,) = tmp_path.iterdir()
    runs = pd.read_csv(folder / "runs.csv").set_index("quant")
    assert runs.ppl["reference"] == pytest.approx(REFERENCE_PPL, abs=2e-4)
    assert runs.ppl_se["reference"] == pytest.approx(REFERENCE_SE, abs=2e-4)
    assert runs.n_scored["reference"] == 4 * 1023
    for quant, (ppl, kld, kld_se, same_top) in PRINTED.items():
        assert runs.ppl[quant] == pytest.approx(ppl, rel=2e-3), quant
        assert runs.kld_mean[quant] == pytest.approx(kld, abs=kld_se), quant
        assert runs.kld_se[quant] == pytest.approx(kld_se, rel=0.1), quant
        assert 100 * runs.same_top[quant] == pytest.approx(same_top, abs=0.5), quant


@pytest.mark.real_model
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "q3_k_m", "iq1_m"])
def test_files_are_llama_cpps(tmp_path: Path, quant: str) -> None:
    """Byte for byte what llama_model_quantize makes, with random importances: no text has to run for that."""
    overrides = [f"quant={quant}", "mode=standard", "calibration=none"]
    if quant == "iq1_m":
        reference = prepare(compose(["quant=reference"]), print, with_reference=False).reference
        rng, imatrix = np.random.default_rng(0), tmp_path / "imatrix.gguf"
        wide = [t for t in reference.info.tensors if t.name.startswith("blk.") and len(t.shape) > 1]
        seen = {t.name: Activations(rng.gamma(1.0, 1.0, (1, t.shape[0])), np.ones(1)) for t in wide}
        write_imatrix(imatrix, seen, dataset="random", n_windows=1, window_tokens=16)
        overrides[2:] = [f"calibration.imatrix={imatrix}"]
    sweep = prepare(compose(overrides), print, with_reference=False)
    (plan,) = (case.plan for case in sweep.cases)
    path, weights = sweep.imatrix_path, {}
    if path:
        weights = read_imatrix(path).weights
    metadata = {key: value or len(weights) for key, value in plan.metadata}
    make_variant(sweep.reference.path, tmp_path / "ours.gguf", plan, path, n_threads=2)
    assert plan.file_type
    truth = tmp_path / "truth.gguf"
    quantize(
        sweep.reference.path,
        truth,
        plan.file_type,
        overrides=plan.overrides,
        imatrix=weights,
        metadata=metadata,
        n_threads=2,
    )
    assert (tmp_path / "ours.gguf").read_bytes() == truth.read_bytes()
