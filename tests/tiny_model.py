"""Makes a tiny Llama model as a GGUF file: random weights, its own small vocabulary, widths of 256."""

from pathlib import Path

import gguf
import numpy as np

WORDS = (
    *("the", "of", "and", "in", "to", "a", "was", "is", "for", "on", "as", "by", "with", "that", "at", "from"),
    *("it", "his", "an", "were", "are", "which", "this", "be"),
)


def write_tiny_llama(
    path: Path,
    *,
    n_layers: int = 4,
    n_embd: int = 256,
    n_ff: int = 512,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    n_ctx: int = 512,
    tied: bool = False,
    add_bos: bool = True,
    seed: int = 0,
    poison: str | None = None,
    n_experts: int = 0,
    n_experts_used: int = 2,
) -> Path:
    """Write an F16 model that llama.cpp loads. `poison` names a tensor to fill with NaN; n_experts > 0: a mixture."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_rope_dimension_count(n_embd // n_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    if n_experts:
        writer.add_expert_count(n_experts)
        writer.add_expert_used_count(n_experts_used)
    add_vocabulary(writer, add_bos=add_bos)

    def add(name: str, *shape: int, scale: float) -> None:
        data = rng.normal(0.0, scale, shape)
        if name == poison:
            data[:] = np.nan
        writer.add_tensor(name, data.astype(np.float16 if len(shape) > 1 else np.float32))

    head = n_embd // n_heads
    add("token_embd.weight", N_VOCAB, n_embd, scale=1.0)
    for i in range(n_layers):
        add(f"blk.{i}.attn_norm.weight", n_embd, scale=1.0)
        add(f"blk.{i}.attn_q.weight", n_embd, n_embd, scale=0.06)
        add(f"blk.{i}.attn_k.weight", n_kv_heads * head, n_embd, scale=0.06)
        add(f"blk.{i}.attn_v.weight", n_kv_heads * head, n_embd, scale=0.06)
        add(f"blk.{i}.attn_output.weight", n_embd, n_embd, scale=0.06)
        add(f"blk.{i}.ffn_norm.weight", n_embd, scale=1.0)
        suffix, lead = ("_exps", (n_experts,)) if n_experts else ("", ())
        if n_experts:
            add(f"blk.{i}.ffn_gate_inp.weight", n_experts, n_embd, scale=0.06)
        add(f"blk.{i}.ffn_gate{suffix}.weight", *lead, n_ff, n_embd, scale=0.06)
        add(f"blk.{i}.ffn_up{suffix}.weight", *lead, n_ff, n_embd, scale=0.06)
        add(f"blk.{i}.ffn_down{suffix}.weight", *lead, n_embd, n_ff, scale=0.06)
    add("output_norm.weight", n_embd, scale=1.0)
    if not tied:
        add("output.weight", N_VOCAB, n_embd, scale=0.06)
    close(writer)
    return path


def close(writer: gguf.GGUFWriter) -> None:
    """Write everything to the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, *, add_bos: bool = True) -> None:
    """Metadata of the tokenizer: N_VOCAB tokens."""
    tokens = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(add_bos)


def vocabulary() -> list[tuple[str, float, int]]:
    """Token texts, scores and types of a SentencePiece vocabulary: control tokens, every byte, letters, words."""
    normal, unknown, control, byte = (
        gguf.TokenType.NORMAL,
        gguf.TokenType.UNKNOWN,
        gguf.TokenType.CONTROL,
        gguf.TokenType.BYTE,
    )
    tokens = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    tokens += [(f"<0x{i:02X}>", 0.0, byte) for i in range(256)]
    tokens += [(letter, -100.0, normal) for letter in "abcdefghijklmnopqrstuvwxyz\u2581"]
    tokens += [(f"\u2581{word}", -float(i + 1), normal) for i, word in enumerate(WORDS)]
    return tokens


N_VOCAB = len(vocabulary())


def random_text(n_words: int, seed: int) -> str:
    """Words of the vocabulary in random order: about one token a word."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words))
