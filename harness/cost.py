"""What work will cost, estimated before it is begun: seconds on this machine, from rates measured on two cores.

Measured with llama-cpp-python 0.3.36 on two cores of an AVX-512 server; a rough guide elsewhere. The progress display
corrects itself by what the finished steps really took.
"""

from collections.abc import Iterable

from harness.plan import TensorPlan

# Million weights a second that two cores quantize into a type, with an imatrix.
_QUANTIZE_RATE = {
    "iq1_s": 16.0,
    "iq1_m": 17.0,
    "iq2_xxs": 8.0,
    "iq2_xs": 4.5,
    "iq2_s": 12.0,
    "iq3_xxs": 6.0,
    "iq3_s": 8.0,
    "iq4_xs": 11.0,
    "iq4_nl": 11.0,
    "q3_k": 60.0,
    "q4_k": 23.0,
    "q5_k": 22.0,
    "q6_k": 70.0,
    "q4_0": 80.0,
    "q5_0": 80.0,
    "q8_0": 400.0,
    "f16": 440.0,
    "bf16": 440.0,
    "f32": 440.0,
}
# Seconds of two cores until ggml has the tables of a type, once a process whatever the model's size.
_TABLES_S = {"iq1_s": 7.0, "iq1_m": 7.0, "iq2_xxs": 0.7, "iq2_xs": 1.3, "iq2_s": 3.3}
_OTHER_RATE = 20.0
_FAST_RATE = 200.0  # from here on a tensor is quantized about as fast as it is read back
_SCORE_S_PER_TOKEN = 0.9e-3  # fixed part: attention, vocabulary, scheduling
_SCORE_S_PER_TOKEN_AND_WEIGHT = 5.8e-12
_READ_BYTES_PER_S = 5e9
_CHILD_S = 0.5  # start a process, import llama.cpp, load the model


def quantize_s(tensors: Iterable[TensorPlan], n_threads: int) -> float:
    """Seconds to quantize a plan's tensors."""
    made = [t for t in tensors if t.quantizable]
    tables = sum(tables_s(name, n_threads) for name in {t.type for t in made})
    return _CHILD_S + tables + sum(tensor_s(t.type, t.n_weights, n_threads) for t in made)


def tables_s(type_name: str, n_threads: int) -> float:
    """Seconds until a process can quantize into a type."""
    return _TABLES_S.get(type_name, 0.0) * 2 / n_threads


def tensor_s(type_name: str, n_weights: int, n_threads: int) -> float:
    """Seconds to quantize one tensor, the tables of its type apart."""
    return n_weights / (1e6 * _QUANTIZE_RATE.get(type_name, _OTHER_RATE)) * 2 / n_threads


def quantizes_fast(type_name: str) -> bool:
    """Whether a type is made about as fast as it is read from a disk."""
    return _QUANTIZE_RATE.get(type_name, _OTHER_RATE) >= _FAST_RATE


def score_s(n_weights: int, n_tokens: int, n_threads: int) -> float:
    """Seconds to run tokens through a model of that many weights."""
    return _CHILD_S + n_tokens * (_SCORE_S_PER_TOKEN + _SCORE_S_PER_TOKEN_AND_WEIGHT * n_weights) * 2 / n_threads


def generate_s(file_bytes: int, n_tokens: int) -> float:
    """Seconds to generate tokens one by one: every weight is read once for each."""
    return n_tokens * file_bytes / _READ_BYTES_PER_S


def scoring_bytes(file_bytes: int, n_logits: int, at_once: int) -> int:
    """Memory to score a file: its pages, and for each of the windows that run at once 1.3 times the float32 logits of a
    window and 200 MB for the rest. benchmarks/scoring_overhead.py quotes what is really taken beside this."""
    return int(file_bytes + at_once * (1.3 * 4 * n_logits + 200e6))


def minutes(seconds: float) -> str:
    """'40 s', '2.5 min', '3.2 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def file_size(n_bytes: int) -> str:
    """'1.2 GB', '3.4 MB'."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
