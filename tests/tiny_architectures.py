"""Tiny models of the families that people publish: tensors and metadata as llama.cpp wants them, random weights.

Shapes are numpy's, the row width last. Facts from src/models/*.cpp of the llama.cpp inside llama-cpp-python 0.3.36.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny_model import N_VOCAB, add_vocabulary, close

Shapes = dict[str, tuple[int, ...]]
N_CTX = 256


@dataclass(frozen=True)
class Family:
    """One model. keys: metadata, without the architecture's name in front; change: weights that must not be random."""

    name: str
    architecture: str
    keys: dict[str, Any]
    shapes: Shapes
    change: Callable[[dict[str, np.ndarray]], None] | None = None


def write_family(family: Family, path: Path, name: str = "tiny") -> Path:
    """Write an F16 model of the family that llama.cpp loads."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_name(name)
    for key, value in {"context_length": N_CTX, **family.keys}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array, bool: writer.add_bool}
        add[type(value)](f"{family.architecture}.{key}", value)
    add_vocabulary(writer)
    weights = {name: _weights(name, shape, rng) for name, shape in family.shapes.items()}
    if family.change:
        family.change(weights)
    for tensor, values in weights.items():
        writer.add_tensor(tensor, values)
    close(writer)
    return path


def _weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Matrices in F16, all else in F32, as convert_hf_to_gguf.py writes them."""
    if "norm" in name:
        return rng.normal(1.0, 0.1, shape).astype(np.float32)
    if name.endswith("exp_probs_b.bias"):
        return np.zeros(shape, np.float32)
    if name.endswith("ssm_a"):  # decay: negative
        return -rng.uniform(0.5, 2.0, shape).astype(np.float32)
    if len(shape) == 1 or "conv1d" in name or "shortconv.conv" in name or name.endswith("ssm_d"):
        return rng.normal(0.0, 0.3, shape).astype(np.float32)
    return rng.normal(0.0, 0.06, shape).astype(np.float16)


def _ends(width: int, *, tied: bool = False, norm: str = "output_norm") -> Shapes:
    shapes: Shapes = {"token_embd.weight": (N_VOCAB, width), f"{norm}.weight": (width,)}
    return shapes if tied else {**shapes, "output.weight": (N_VOCAB, width)}


def _attention(i: int, width: int, q: int, kv: int) -> Shapes:
    """Attention with q and kv rows of queries and keys."""
    return {
        f"blk.{i}.attn_norm.weight": (width,),
        f"blk.{i}.attn_q.weight": (q, width),
        f"blk.{i}.attn_k.weight": (kv, width),
        f"blk.{i}.attn_v.weight": (kv, width),
        f"blk.{i}.attn_output.weight": (width, q),
    }


def _matrices(i: int, width: int, inner: int, suffix: str = "", n_experts: int = 0) -> Shapes:
    lead = (n_experts,) if n_experts else ()
    return {
        f"blk.{i}.ffn_gate{suffix}.weight": (*lead, inner, width),
        f"blk.{i}.ffn_up{suffix}.weight": (*lead, inner, width),
        f"blk.{i}.ffn_down{suffix}.weight": (*lead, width, inner),
    }


def _feed_forward(i: int, width: int, inner: int) -> Shapes:
    return {f"blk.{i}.ffn_norm.weight": (width,), **_matrices(i, width, inner)}


def _keys(n_layers: int, width: int, inner: int | list[int], heads: Any, kv_heads: Any, **more: Any) -> dict[str, Any]:
    return {
        "block_count": n_layers,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **more,
    }


def llama(name: str, *, width: int = 256, inner: int = 512, heads: int = 4, kv_heads: int = 2, tied: bool) -> Family:
    """Llama with grouped queries."""
    shapes = _ends(width, tied=tied)
    for i in range(4):
        shapes |= _attention(i, width, width, width // heads * kv_heads) | _feed_forward(i, width, inner)
    keys = _keys(4, width, inner, heads, kv_heads, **{"rope.dimension_count": width // heads})
    return Family(name, "llama", keys, shapes)


def t5() -> Family:
    """An encoder and a decoder of one block each."""
    width = 64
    shapes = {f"{part}.output_norm.weight": (width,) for part in ("enc", "dec")} | {
        "token_embd.weight": (N_VOCAB, width)
    }
    for part, kinds in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
        for kind in kinds:
            shapes[f"{part}.blk.0.{kind}_norm.weight"] = (width,)
            shapes |= {f"{part}.blk.0.{kind}_{x}.weight": (width, width) for x in "qkvo"}
        shapes |= {f"{part}.blk.0.ffn_{x}.weight": (width, width) for x in ("up", "down")}
        shapes[f"{part}.blk.0.ffn_norm.weight"] = (width,)
    return Family("t5", "t5", _keys(1, width, width, 2, 2, **{"attention.relative_buckets_count": 8}), shapes)


def qwen2moe() -> Family:
    """A mixture of 8 experts, 2 used, and a shared one. No token ever goes to expert 7 of layer 1."""
    width, inner = 256, 256
    shapes = _ends(width)
    for i in range(2):
        shapes |= _attention(i, width, width, width) | {
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.ffn_gate_inp.weight": (8, width),
            f"blk.{i}.ffn_gate_inp_shexp.weight": (width,),
        }
        shapes |= _matrices(i, width, inner, "_exps", n_experts=8) | _matrices(i, width, 512, "_shexp")

    def shun_one_expert(weights: dict[str, np.ndarray]) -> None:
        # What every token has in its first column stays there, and the router's row for the expert is against it.
        weights["token_embd.weight"] *= 16
        weights["token_embd.weight"][:, 0] = 8
        for i in range(2):
            weights[f"blk.{i}.attn_norm.weight"][0] = 0
            weights[f"blk.{i}.ffn_gate_inp.weight"][:, 0] = 0
        weights["blk.1.ffn_gate_inp.weight"][7] = 0
        weights["blk.1.ffn_gate_inp.weight"][7, 0] = -4

    experts = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": inner}
    more = {**experts, "expert_shared_feed_forward_length": 512}
    return Family("qwen2moe", "qwen2moe", _keys(2, width, inner, 4, 4, **more), shapes, shun_one_expert)


def deepseek2(*, mtp: bool = False) -> Family:
    """Latent attention with 3-D matrices a head, a dense block before the mixture, sigmoid router with a bias.

    mtp: a block for multi-token prediction behind, which llama.cpp does not run when it scores.
    """
    width, inner, heads, latent, rotated, part = 256, 256, 4, 256, 32, 32
    n_blocks = 3 if mtp else 2
    shapes = _ends(width)
    for i in range(n_blocks):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.attn_q_a.weight": (latent, width),
            f"blk.{i}.attn_q_a_norm.weight": (latent,),
            f"blk.{i}.attn_q_b.weight": (heads * (part + rotated), latent),
            f"blk.{i}.attn_kv_a_mqa.weight": (latent + rotated, width),
            f"blk.{i}.attn_kv_a_norm.weight": (latent,),
            f"blk.{i}.attn_k_b.weight": (heads, latent, part),
            f"blk.{i}.attn_v_b.weight": (heads, 64, latent),
            f"blk.{i}.attn_output.weight": (width, heads * 64),
            f"blk.{i}.ffn_norm.weight": (width,),
        }
        if i == 0:
            shapes |= _matrices(i, width, inner)
        else:
            shapes |= _matrices(i, width, inner, "_exps", n_experts=8) | _matrices(i, width, inner, "_shexp")
            shapes |= {f"blk.{i}.ffn_gate_inp.weight": (8, width), f"blk.{i}.exp_probs_b.bias": (8,)}
    more = {
        "leading_dense_block_count": 1,
        "attention.q_lora_rank": latent,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        "attention.key_length_mla": part + rotated,
        "attention.value_length_mla": 64,
        "rope.dimension_count": rotated,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": inner,
        "expert_gating_func": 2,
        "nextn_predict_layers": int(mtp),
    }
    if mtp:
        shapes |= {f"blk.{n_blocks - 1}.nextn.{x}norm.weight": (width,) for x in "eh"}
        shapes[f"blk.{n_blocks - 1}.nextn.eh_proj.weight"] = (width, 2 * width)
    return Family("deepseek2", "deepseek2", _keys(n_blocks, width, inner, heads, 1, **more), shapes)


# (query heads, key-value heads, feed-forward width) of each block. Without heads: no attention. Without key-value heads
# alone: a matrix instead of attention. Block 4 has nothing at all.
DECI_BLOCKS = ((8, 2, 512), (8, 0, 256), (0, 0, 512), (8, 4, 768), (0, 0, 0), (8, 1, 256), (8, 0, 512), (8, 2, 512))


def deci() -> Family:
    """Nemotron-Super-49B and -51B: heads and widths by block."""
    width, head = 256, 32
    shapes = _ends(width)
    for i, (heads, kv_heads, inner) in enumerate(DECI_BLOCKS):
        if kv_heads:
            shapes |= _attention(i, width, heads * head, kv_heads * head)
        elif heads:
            shapes |= {f"blk.{i}.attn_norm.weight": (width,), f"blk.{i}.attn_output.weight": (width, width)}
        if inner:
            shapes |= _feed_forward(i, width, inner)
    heads_list, kv_list, inner_list = (list(column) for column in zip(*DECI_BLOCKS, strict=True))
    keys = _keys(len(DECI_BLOCKS), width, inner_list, heads_list, kv_list, **{"rope.dimension_count": head})
    return Family("deci", "deci", keys, shapes)


def falcon_h1() -> Family:
    """Attention and a Mamba 2 mixer side by side in every block."""
    width, inner, heads, ssm_inner, ssm_heads, state = 256, 256, 4, 256, 8, 32
    shapes = _ends(width)
    for i in range(4):
        feed_forward = _feed_forward(i, width, inner)
        feed_forward[f"blk.{i}.ffn_norm"] = feed_forward.pop(f"blk.{i}.ffn_norm.weight")  # llama.cpp wants it so
        shapes |= _attention(i, width, width, 128) | feed_forward
        shapes |= {
            f"blk.{i}.ssm_in.weight": (2 * ssm_inner + 2 * state + ssm_heads, width),
            f"blk.{i}.ssm_conv1d.weight": (ssm_inner + 2 * state, 4),
            f"blk.{i}.ssm_conv1d.bias": (ssm_inner + 2 * state,),
            f"blk.{i}.ssm_dt.bias": (ssm_heads,),
            f"blk.{i}.ssm_a": (ssm_heads, 1),
            f"blk.{i}.ssm_d": (ssm_heads, 1),
            f"blk.{i}.ssm_norm.weight": (1, ssm_inner),
            f"blk.{i}.ssm_out.weight": (width, ssm_inner),
        }
    ssm = {
        "conv_kernel": 4,
        "inner_size": ssm_inner,
        "state_size": state,
        "time_step_rank": ssm_heads,
        "group_count": 1,
    }
    more = {f"ssm.{key}": value for key, value in ssm.items()}
    return Family("falcon-h1", "falcon-h1", _keys(4, width, inner, heads, 2, **more), shapes)


def lfm2() -> Family:
    """Short convolutions, and attention in the blocks that have key-value heads."""
    width, inner, kv_heads = 256, 256, [0, 0, 2, 0, 0, 2]
    shapes = _ends(width, tied=True, norm="token_embd_norm")
    for i, kv in enumerate(kv_heads):
        shapes |= _feed_forward(i, width, inner)
        if kv:
            shapes |= _attention(i, width, width, kv * 64)
            shapes |= {f"blk.{i}.attn_{x}_norm.weight": (64,) for x in "qk"}
        else:
            shapes |= {
                f"blk.{i}.attn_norm.weight": (width,),
                f"blk.{i}.shortconv.conv.weight": (width, 3),
                f"blk.{i}.shortconv.in_proj.weight": (3 * width, width),
                f"blk.{i}.shortconv.out_proj.weight": (width, width),
            }
    return Family("lfm2", "lfm2", _keys(6, width, inner, 4, kv_heads, **{"shortconv.l_cache": 3}), shapes)


def mamba() -> Family:
    """Nothing but recurrent blocks: no attention, no feed-forward."""
    width, ssm_inner, state, rank = 256, 512, 16, 32
    shapes = _ends(width, tied=True)
    for i in range(4):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.ssm_in.weight": (2 * ssm_inner, width),
            f"blk.{i}.ssm_conv1d.weight": (ssm_inner, 4),
            f"blk.{i}.ssm_conv1d.bias": (ssm_inner,),
            f"blk.{i}.ssm_x.weight": (rank + 2 * state, ssm_inner),
            f"blk.{i}.ssm_dt.weight": (ssm_inner, rank),
            f"blk.{i}.ssm_dt.bias": (ssm_inner,),
            f"blk.{i}.ssm_a": (ssm_inner, state),
            f"blk.{i}.ssm_d": (ssm_inner,),
            f"blk.{i}.ssm_out.weight": (width, ssm_inner),
        }
    ssm = {"conv_kernel": 4, "inner_size": ssm_inner, "state_size": state, "time_step_rank": rank}
    keys = _keys(4, width, 0, 0, 0, **{f"ssm.{key}": value for key, value in ssm.items()})
    return Family("mamba", "mamba", keys, shapes)


def gpt2() -> Family:
    """Fused queries, keys and values, biases, learned positions, tied embeddings."""
    width, inner = 256, 512
    shapes = {**_ends(width, tied=True), "output_norm.bias": (width,), "position_embd.weight": (N_CTX, width)}
    for i in range(4):
        for role, rows, columns in (
            ("attn_qkv", 3 * width, width),
            ("attn_output", width, width),
            ("ffn_up", inner, width),
            ("ffn_down", width, inner),
        ):
            shapes |= {f"blk.{i}.{role}.weight": (rows, columns), f"blk.{i}.{role}.bias": (rows,)}
        for role in ("attn_norm", "ffn_norm"):
            shapes |= {f"blk.{i}.{role}.weight": (width,), f"blk.{i}.{role}.bias": (width,)}
    return Family("gpt2", "gpt2", _keys(4, width, inner, 4, 4, **{"attention.layer_norm_epsilon": 1e-5}), shapes)


def gemma2() -> Family:
    """Soft-capped attention and logits, sliding windows, norms after attention and feed-forward, tied embeddings."""
    width, inner, head = 256, 512, 64
    shapes = _ends(width, tied=True)
    for i in range(4):
        shapes |= _attention(i, width, 4 * head, 2 * head) | _feed_forward(i, width, inner)
        shapes |= {f"blk.{i}.post_attention_norm.weight": (width,), f"blk.{i}.post_ffw_norm.weight": (width,)}
    more = {
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.sliding_window": 32,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 2.0,
    }
    return Family("gemma2", "gemma2", _keys(4, width, inner, 4, 2, **more), shapes)


FAMILIES = (
    llama("llama-gqa", heads=8, kv_heads=2, tied=False),
    llama("llama-tied", tied=True),
    llama("llama-288", width=288, inner=416, tied=False),  # multiples of 32, not of 256
    llama("llama-272", width=272, inner=400, tied=False),  # multiples of 16 only
    qwen2moe(),
    deepseek2(),
    deci(),
    falcon_h1(),
    lfm2(),
    mamba(),
    gpt2(),
    gemma2(),
)
