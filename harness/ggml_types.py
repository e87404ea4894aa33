"""Tensor types and file types of llama.cpp (b-version inside llama-cpp-python 0.3.36), as plain tables.

Facts from ggml.h, llama.h and llama-quant.cpp of that release. `tests/test_engine.py` compares every row with the
library itself, so a new pin that changes one fails there first.
"""

import math
from typing import NamedTuple


class GgmlType(NamedTuple):
    """One tensor type: its ggml id and how many bytes a block of weights takes."""

    id: int
    block_weights: int
    block_bytes: int

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_weights


PINNED_VERSION = "0.3.36"  # of llama-cpp-python; pyproject.toml pins it
GGUF_ALIGNMENT = 32  # the default of the format, and what llama_model_quantize pads to
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION, which quantized files carry
IMATRIX_MIN_ROWS = 16  # llama-imatrix skips multiplications with fewer rows: they are not weights times tokens

GGML_TYPES: dict[str, GgmlType] = {
    "f32": GgmlType(0, 1, 4),
    "f16": GgmlType(1, 1, 2),
    "q4_0": GgmlType(2, 32, 18),
    "q4_1": GgmlType(3, 32, 20),
    "q5_0": GgmlType(6, 32, 22),
    "q5_1": GgmlType(7, 32, 24),
    "q8_0": GgmlType(8, 32, 34),
    "q2_k": GgmlType(10, 256, 84),
    "q3_k": GgmlType(11, 256, 110),
    "q4_k": GgmlType(12, 256, 144),
    "q5_k": GgmlType(13, 256, 176),
    "q6_k": GgmlType(14, 256, 210),
    "iq2_xxs": GgmlType(16, 256, 66),
    "iq2_xs": GgmlType(17, 256, 74),
    "iq3_xxs": GgmlType(18, 256, 98),
    "iq1_s": GgmlType(19, 256, 50),
    "iq4_nl": GgmlType(20, 32, 18),
    "iq3_s": GgmlType(21, 256, 110),
    "iq2_s": GgmlType(22, 256, 82),
    "iq4_xs": GgmlType(23, 256, 136),
    "i8": GgmlType(24, 1, 1),
    "i16": GgmlType(25, 1, 2),
    "i32": GgmlType(26, 1, 4),
    "i64": GgmlType(27, 1, 8),
    "f64": GgmlType(28, 1, 8),
    "iq1_m": GgmlType(29, 256, 56),
    "bf16": GgmlType(30, 1, 2),
    "tq1_0": GgmlType(34, 256, 54),
    "tq2_0": GgmlType(35, 256, 66),
    "mxfp4": GgmlType(39, 32, 17),
    "nvfp4": GgmlType(40, 64, 36),
    "q1_0": GgmlType(41, 128, 18),
    "q2_0": GgmlType(42, 64, 18),
}

WEIGHT_TYPES = tuple(name for name in GGML_TYPES if name not in ("i8", "i16", "i32", "i64", "f64"))
UNQUANTIZED = frozenset({"f32", "f16", "bf16"})

# Every file type that llama_model_quantize accepts: lower-case name -> llama_ftype.
FILE_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq2_xxs": 19,
    "iq2_xs": 20,
    "q2_k_s": 21,
    "iq3_xs": 22,
    "iq3_xxs": 23,
    "iq1_s": 24,
    "iq4_nl": 25,
    "iq3_s": 26,
    "iq3_m": 27,
    "iq2_s": 28,
    "iq2_m": 29,
    "iq4_xs": 30,
    "iq1_m": 31,
    "bf16": 32,
    "tq1_0": 36,
    "tq2_0": 37,
    "mxfp4_moe": 38,
    "q1_0": 40,
    "q2_0": 41,
}

# What llama.cpp takes instead when a row's width is no multiple of the type's block (tensor_type_fallback).
SHAPE_FALLBACK: dict[str, str] = {
    "iq1_s": "iq4_nl",
    "iq1_m": "iq4_nl",
    "iq2_xxs": "iq4_nl",
    "iq2_xs": "iq4_nl",
    "iq2_s": "iq4_nl",
    "iq3_xxs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "q2_0": "q4_0",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

# Types that llama.cpp refuses to write without imatrix data for the tensor (tensor_requires_imatrix).
NEEDS_IMATRIX = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})
# Types that ggml itself cannot make without, whatever the tensor (ggml_quantize_requires_imatrix).
ABORTS_WITHOUT_IMATRIX = frozenset({"iq1_s", "iq2_xxs", "iq2_xs"})


def fit_type(wanted: str, width: int) -> str:
    """The type a tensor of this row width really gets when `wanted` is asked for; f16 when even the fallback fails.

    Raises ValueError where llama.cpp has no fallback either (q1_0 and nvfp4).
    """
    block = GGML_TYPES[wanted].block_weights
    if width % block == 0:
        return wanted
    if wanted not in SHAPE_FALLBACK and block > 32:
        raise ValueError(
            f"rows of {width} weights do not fit {wanted} blocks of {block}, and llama.cpp has no fallback"
        )
    fallback = SHAPE_FALLBACK.get(wanted, "f16")
    return fallback if width % GGML_TYPES[fallback].block_weights == 0 else "f16"


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of one tensor's data, without padding. `shape` is in ggml's order: row width first."""
    ggml_type = GGML_TYPES[type_name]
    return math.prod(shape[1:]) * (shape[0] // ggml_type.block_weights) * ggml_type.block_bytes


def requires_imatrix(tensor_name: str, type_name: str, file_type: str) -> bool:
    """Whether llama.cpp refuses this type for this tensor when it has no imatrix data."""
    if tensor_name in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
        return False
    return type_name in NEEDS_IMATRIX or (type_name == "q2_k" and file_type == "q2_k_s")
