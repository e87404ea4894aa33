"""Loads a model, tokenizes, and runs windows through llama_decode."""

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from harness.errors import EngineError
from harness.memory import free_memory_bytes

EvalCallback = Callable[[int, bool, Any], bool]


@contextmanager
def open_model(path: Path, *, vocab_only: bool = False, check_weights: bool = False) -> Iterator[Any]:
    """A loaded llama_model, memory-mapped. Raises EngineError when llama.cpp cannot load it, or finds NaN or Inf in it
    when asked to check the weights."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only, params.check_tensors = vocab_only, check_weights
    params.n_gpu_layers = 0  # the harness measures the CPU
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise EngineError(f"llama.cpp cannot load {path}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@contextmanager
def open_context(
    model: Any,
    *,
    n_ctx: int,
    ubatch_tokens: int,
    flash_attention: bool,
    n_threads: int,
    eval_callback: EvalCallback | None = None,
) -> Iterator[Any]:
    """A llama_context that decodes `ubatch_tokens` at a time. Raises EngineError when it does not fit."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = ubatch_tokens
    params.n_threads = params.n_threads_batch = n_threads
    # Said, not left to llama.cpp: the two kinds of attention round differently.
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.no_perf = True
    if eval_callback:
        params.cb_eval = llama_cpp.ggml_backend_sched_eval_callback(eval_callback)
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise EngineError(f"llama.cpp cannot make a context of {n_ctx} tokens")
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


@contextmanager
def open_contexts(model: Any, callbacks: Sequence[EvalCallback | None], **options: Any) -> Iterator[list[Any]]:
    """Contexts with these eval callbacks; options: as of `open_context`, but for the threads, see `use_threads`. Fewer,
    but one, where llama.cpp cannot make as many. Raises EngineError when it can make none."""
    contexts: list[Any] = []
    with ExitStack() as opened:
        for callback in callbacks:
            try:
                context = open_context(model, n_threads=1, eval_callback=callback, **options)
                contexts.append(opened.enter_context(context))
            except EngineError:
                if not contexts:
                    raise
                break
        yield contexts


def contexts_that_fit(model: Any, *, n_ctx: int, ubatch_tokens: int, flash_attention: bool) -> int:
    """How many contexts the free memory has room for beside the model, estimated: keys and values in 16 bits, logits of
    a micro-batch twice, its attention scores where they are kept, 200 MB for the rest. At least 1."""
    n_head = max(1, llama_cpp.llama_model_n_head(model))
    n_kv_head = llama_cpp.llama_model_n_head_kv(model) or n_head  # 0: the first layer has no attention
    width = llama_cpp.llama_model_n_embd(model) // n_head
    key, value = (max(width, _number_in_header(model, f"attention.{name}_length")) for name in ("key", "value"))
    kv_bytes = 2 * llama_cpp.llama_model_n_layer(model) * n_kv_head * (key + value) * n_ctx
    scores_bytes = 0 if flash_attention else 4 * n_head * ubatch_tokens * n_ctx
    each_bytes = kv_bytes + scores_bytes + 8 * ubatch_tokens * n_vocab(model) + 200_000_000
    return max(1, (free_memory_bytes() - llama_cpp.llama_model_size(model)) // each_bytes)


def _number_in_header(model: Any, name: str) -> int:
    """Of a key of the model's architecture; 0 where there is none."""

    def value_of(key: bytes) -> bytes:
        text = ctypes.create_string_buffer(64)
        llama_cpp.llama_model_meta_val_str(model, key, text, len(text))
        return text.value

    value = value_of(value_of(b"general.architecture") + b"." + name.encode())
    return int(value) if value.isdigit() else 0


def tokenize(path: Path, text: str) -> tuple[np.ndarray, int | None]:
    """Token ids of the whole text (int32), and the BOS id if the model puts one in front of a text.

    Special tokens are added as the model says and never parsed from the text, as llama-perplexity does.
    """
    with open_model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        data = text.encode()
        tokens = np.empty(len(data) + 16, np.int32)  # a byte is at least a token's share, plus the special ones
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        n = llama_cpp.llama_tokenize(vocab, data, len(data), pointer, tokens.size, True, False)
        if n < 0:
            raise EngineError(f"llama_tokenize failed ({n}) on {len(data)} bytes of text")
        bos = llama_cpp.llama_vocab_bos(vocab) if llama_cpp.llama_vocab_get_add_bos(vocab) else None
        return tokens[:n].copy(), bos


def n_vocab(model: Any) -> int:
    """Size of the vocabulary, the number of logits of one position."""
    return llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))


def use_threads(context: Any, n_threads: int) -> None:
    """Let the next decodes take that many threads."""
    llama_cpp.llama_set_n_threads(context, n_threads, n_threads)


def warm_up(context: Any) -> None:
    """Decode one token and forget it, so that pages, buffers and threads are there before anything is timed."""
    _decode(context, np.zeros(1, np.int32), 0, np.zeros(1, bool))
    clear(context)


def clear(context: Any) -> None:
    """Empty the KV cache, so that the next window starts from nothing."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)


def decode_window(
    context: Any, tokens: np.ndarray, wanted: np.ndarray, vocab_size: int, ubatch_tokens: int
) -> Iterator[tuple[int, np.ndarray, float]]:
    """Run one window through the model from an empty KV cache.

    tokens: int32 [n]; wanted: bool [n], the positions whose logits are asked for. Yields, a micro-batch at a time,
    (first wanted position, logits float32 [k, vocab_size], seconds in llama_decode). The logits are a view of
    llama.cpp's buffer, valid until the next step; k may be 0.
    """
    clear(context)
    for start in range(0, len(tokens), ubatch_tokens):
        flags = wanted[start : start + ubatch_tokens]
        seconds = _decode(context, tokens[start : start + ubatch_tokens], start, flags)
        n_wanted = int(flags.sum())
        if n_wanted:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n_wanted, vocab_size))
            yield start + int(np.argmax(flags)), logits, seconds
        else:
            yield start, np.empty((0, vocab_size), np.float32), seconds


def _decode(context: Any, tokens: np.ndarray, first_position: int, wanted: np.ndarray) -> float:
    """Seconds of one llama_decode, its results ready."""
    n = len(tokens)
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    try:
        batch.n_tokens = n
        np.ctypeslib.as_array(batch.token, (n,))[:] = tokens
        np.ctypeslib.as_array(batch.pos, (n,))[:] = np.arange(first_position, first_position + n)
        np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1
        np.ctypeslib.as_array(batch.logits, (n,))[:] = wanted
        for i in range(n):
            batch.seq_id[i][0] = 0
        begin = time.perf_counter()
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_synchronize(context)
        seconds = time.perf_counter() - begin
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise EngineError(f"llama_decode failed with status {status} at position {first_position}")
    return seconds
