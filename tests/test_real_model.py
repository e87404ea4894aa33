"""SmolLM2-135M, the default prompts: the figures that llama-perplexity prints for the same windows and files."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

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
