"""Makes tiny Llama checkpoints as safetensors: BF16, and the same weights in FP8 as they are published.

Written by hand, so that the tests need no library of the extra `convert` and the arithmetic is independent of it.
"""

import json
import struct
from pathlib import Path

import numpy as np

N_EMBD, N_FF, N_HEADS, N_KV_HEADS, N_LAYERS = 256, 512, 4, 2, 2
BLOCK = 128  # of the scales of DeepSeek's and Qwen's FP8 checkpoints

# The values of float8 E4M3FN by code 0..126: exponent bias 7, 3 bits of mantissa, no infinities, 448 the largest.
_EXPONENT, _MANTISSA = np.divmod(np.arange(127), 8)
E4M3 = np.where(_EXPONENT == 0, _MANTISSA / 8 * 2.0**-6, (1 + _MANTISSA / 8) * 2.0 ** (_EXPONENT - 7.0))


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest BF16, ties to even, as its bits: uint16."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of BF16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_fp8(values: np.ndarray) -> np.ndarray:
    """Nearest E4M3FN value's code; what lies beyond the largest becomes the largest."""
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    codes = np.searchsorted(middles, np.abs(values))
    return (codes + 128 * (values < 0)).astype(np.uint8)


def from_fp8(codes: np.ndarray) -> np.ndarray:
    """float32 of E4M3FN codes."""
    return (E4M3[codes & 127] * np.where(codes & 128, -1, 1)).astype(np.float32)


def llama_weights(n_vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights that BF16 holds exactly, by their names in transformers; [rows, columns]."""
    rng = np.random.default_rng(seed)
    head = N_EMBD // N_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (n_vocab, N_EMBD)}
    for i in range(N_LAYERS):
        prefix = f"model.layers.{i}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (N_EMBD,),
            f"{prefix}self_attn.q_proj.weight": (N_EMBD, N_EMBD),
            f"{prefix}self_attn.k_proj.weight": (N_KV_HEADS * head, N_EMBD),
            f"{prefix}self_attn.v_proj.weight": (N_KV_HEADS * head, N_EMBD),
            f"{prefix}self_attn.o_proj.weight": (N_EMBD, N_EMBD),
            f"{prefix}post_attention_layernorm.weight": (N_EMBD,),
            f"{prefix}mlp.gate_proj.weight": (N_FF, N_EMBD),
            f"{prefix}mlp.up_proj.weight": (N_FF, N_EMBD),
            f"{prefix}mlp.down_proj.weight": (N_EMBD, N_FF),
        }
    shapes |= {"model.norm.weight": (N_EMBD,), "lm_head.weight": (n_vocab, N_EMBD)}
    return {name: from_bf16(to_bf16(rng.normal(0, 0.06, shape))) for name, shape in shapes.items()}


def is_linear(name: str) -> bool:
    """Whether published FP8 checkpoints quantize the weight: the projections, neither embeddings nor norms."""
    return "_proj." in name


def fp8_by_block(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and float32 scales of blocks of 128 x 128: weight = value * scale."""
    rows, columns = weight.shape[0] // BLOCK, weight.shape[1] // BLOCK
    blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
    scale = (np.abs(blocks).max(axis=(1, 3)) / 448).astype(np.float32)
    return to_fp8(blocks / scale[:, None, :, None]).reshape(weight.shape), scale


def fp8_by_row(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and a scale a row, [rows, 1]: weight = value * scale."""
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 448).astype(np.float32)
    return to_fp8(weight / scale), scale


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    """The format as its description has it: length of the header, header in JSON, data."""
    header, data = {}, b""
    for name, (kind, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_checkpoint(
    folder: Path, tensors: dict[str, tuple[str, np.ndarray]], *, n_vocab: int, quantization: dict | None = None
) -> Path:
    """config.json and one file of safetensors; no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": N_EMBD,
        "intermediate_size": N_FF,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": n_vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def bf16_tensors(weights: dict[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """As safetensors take them."""
    return {name: ("BF16", to_bf16(weight)) for name, weight in weights.items()}
