"""ctypes access to the parts of ggml that llama_cpp does not wrap, and the checks that make it safe to use.

The structure below is that of ggml.h inside llama-cpp-python 0.3.36. `check_layout` compares it with what the loaded
library reports and refuses to go on when they differ.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import llama_cpp

from harness.cpu import ggml_base_path
from harness.errors import UserError
from harness.ggml_types import PINNED_VERSION

GGML_MAX_NAME = 64
GGML_OP_PARAMS_BYTES = 64
GGML_OBJECT_BYTES = 32  # ggml_tensor_overhead() = this + sizeof(struct ggml_tensor)


class Tensor(ctypes.Structure):
    """struct ggml_tensor."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_char * GGML_OP_PARAMS_BYTES),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * GGML_MAX_NAME),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class GgufInitParams(ctypes.Structure):
    """struct gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]  # ctypes wants a list


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    handle, text, i64, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "ggml_log_set": (None, [handle, handle]),
        "ggml_tensor_overhead": (size, []),
        "ggml_type_name": (text, [ctypes.c_int]),
        "ggml_type_size": (size, [ctypes.c_int]),
        "ggml_blck_size": (i64, [ctypes.c_int]),
        "ggml_op_name": (text, [ctypes.c_int]),
        "ggml_fp16_to_fp32_row": (None, [handle, handle, i64]),
        "ggml_bf16_to_fp32_row": (None, [handle, handle, i64]),
        "ggml_quantize_init": (None, [ctypes.c_int]),
        "ggml_quantize_chunk": (size, [ctypes.c_int, handle, handle, i64, i64, i64, handle]),
        "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, handle, size]),
        "ggml_backend_buffer_is_host": (ctypes.c_bool, [handle]),
        "ggml_backend_tensor_get": (None, [handle, handle, size, size]),
        "gguf_init_from_file": (handle, [text, GgufInitParams]),
        "gguf_init_empty": (handle, []),
        "gguf_free": (None, [handle]),
        "gguf_set_kv": (None, [handle, handle]),
        "gguf_add_tensor": (None, [handle, handle]),
        "ggml_get_tensor": (handle, [handle, text]),
        "ggml_free": (None, [handle]),
        "gguf_get_data_offset": (size, [handle]),
        "gguf_get_meta_size": (size, [handle]),
        "gguf_get_meta_data": (None, [handle, handle]),
        "gguf_get_n_kv": (i64, [handle]),
        "gguf_get_key": (text, [handle, i64]),
        "gguf_get_kv_type": (ctypes.c_int, [handle, i64]),
        "gguf_get_arr_type": (ctypes.c_int, [handle, i64]),
        "gguf_get_arr_n": (size, [handle, i64]),
        "gguf_get_arr_data": (handle, [handle, i64]),
        "gguf_get_arr_str": (text, [handle, i64, size]),
        "gguf_get_val_data": (handle, [handle, i64]),
        "gguf_get_val_str": (text, [handle, i64]),
        "gguf_get_n_tensors": (i64, [handle]),
        "gguf_get_tensor_name": (text, [handle, i64]),
        "gguf_get_tensor_ne": (ctypes.POINTER(i64), [handle, i64]),
        "gguf_get_tensor_type": (ctypes.c_int, [handle, i64]),
        "gguf_get_tensor_offset": (size, [handle, i64]),
        "gguf_get_tensor_size": (size, [handle, i64]),
        "gguf_set_tensor_type": (None, [handle, text, ctypes.c_int]),
        "gguf_set_val_u32": (None, [handle, text, ctypes.c_uint32]),
        "gguf_set_val_str": (None, [handle, text, text]),
        "gguf_remove_key": (i64, [handle, text]),
    }
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(lib, name)
        except AttributeError as error:
            raise UserError(
                f"this build of llama.cpp lacks {name}: install llama-cpp-python=={PINNED_VERSION}"
            ) from error
        function.restype, function.argtypes = result, arguments
    return lib


ggml = _declare(ctypes.CDLL(str(ggml_base_path())))


def check_layout() -> None:
    """Raise UserError unless the loaded library is the release that the structures above describe."""
    if llama_cpp.__version__ != PINNED_VERSION:
        raise UserError(
            f"llama-cpp-python is {llama_cpp.__version__}, the harness needs {PINNED_VERSION}: "
            f"pip install llama-cpp-python=={PINNED_VERSION}"
        )
    expected, found = GGML_OBJECT_BYTES + ctypes.sizeof(Tensor), ggml.ggml_tensor_overhead()
    if expected != found:
        raise UserError(
            f"ggml reports {found} bytes a tensor where the harness knows {expected}: "
            f"another llama.cpp is loaded, reinstall llama-cpp-python=={PINNED_VERSION}"
        )


check_layout()


@contextmanager
def log_lines(on_line: Callable[[str], None]) -> Iterator[None]:
    """Pass every complete line that llama.cpp logs to `on_line`, and on to stderr, while the block runs."""
    pending = ""

    def receive(_level: int, text: bytes, _user_data: object) -> None:
        nonlocal pending
        pending += text.decode("utf-8", "replace")
        *lines, pending = pending.split("\n")
        for line in lines:
            on_line(line)
            with suppress(OSError):  # of a full disk; plans are read from these lines
                print(line, file=sys.stderr, flush=True)

    callback = llama_cpp.llama_log_callback(receive)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    # A wheel holds copies where the library has links: the ggml that we loaded may be another than libllama's.
    ggml.ggml_log_set(ctypes.cast(callback, ctypes.c_void_p), None)
    try:
        yield
    finally:
        llama_cpp.llama_log_set(_default_callback, ctypes.c_void_p(0))
        ggml.ggml_log_set(ctypes.cast(_default_callback, ctypes.c_void_p), None)


@llama_cpp.llama_log_callback
def _default_callback(_level: int, text: bytes, _user_data: object) -> None:
    sys.stderr.write(text.decode("utf-8", "replace"))
    sys.stderr.flush()


llama_cpp.llama_log_set(_default_callback, ctypes.c_void_p(0))


def engine_facts() -> dict[str, str]:
    """What the loaded llama.cpp says of itself: version of the package and CPU features of this build."""
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "system_info": llama_cpp.llama_print_system_info().decode().strip(),
    }
