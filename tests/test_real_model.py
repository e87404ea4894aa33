"""SmolLM2-135M, the default inputs, once: the figure that llama-perplexity prints for the same windows."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

# llama-perplexity -m F16.gguf -f wiki.txt -c 2048 -b 2048 --chunks 4, built from the same llama.cpp:
# "Final estimate: PPL = 12.5674 +/- 0.58006"
LLAMA_PERPLEXITY, LLAMA_PERPLEXITY_SE = 12.5674, 0.58006


@pytest.mark.real_model
def test_reference_perplexity_is_llama_perplexitys(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = cli("sweep", "quant=q8_0", "mode=standard", f"results.dir={tmp_path}")
    assert code == 0, err
    (folder,) = tmp_path.iterdir()
    runs = pd.read_csv(folder / "runs.csv").set_index("quant")
    assert runs.ppl["reference"] == pytest.approx(LLAMA_PERPLEXITY, abs=2e-4)
    assert runs.ppl_se["reference"] == pytest.approx(LLAMA_PERPLEXITY_SE, abs=2e-4)
    assert runs.n_scored["reference"] == 4 * 1023
    # Q8_0 loses almost nothing: within half a per cent, measured on the same tokens.
    assert abs(runs.ln_ppl_ratio_vs_reference["q8_0"]) < 0.005
    assert "dequantized from Q4_1" in out
