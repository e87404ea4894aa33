"""What llama.cpp makes of a model before any weight is read: whether it loads, which tensors it does not know."""

import re
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from harness.engine.native import log_lines

# Whole lines: the log also repeats texts of the file, such as general.name.
_ASKED_FOR = re.compile(r"create_tensor: loading tensor (\S+)")
_ERROR = re.compile(r".*error loading model: (.+)")
_CAUSAL = re.compile(r"print_info: causal attn\s+= (\d)")
_IDLE = re.compile(r"model has unused tensor (\S+) \(size = \d+ bytes\) -- ignoring")
_LEFT_OVER = "wrong number of tensors"  # llama.cpp's words for tensors in the file that nothing asked for


@dataclass(frozen=True)
class LoadCheck:
    """unknown: tensors of the file that this llama.cpp does not know in this architecture; it refuses a file that has
    some. idle: tensors that it knows and does not use when it scores (blocks for multi-token prediction). refusal: why
    the model cannot be scored; None when it can."""

    unknown: tuple[str, ...]
    idle: tuple[str, ...]
    refusal: str | None


def check_load(path: Path, names: tuple[str, ...]) -> LoadCheck:
    """Load metadata, vocabulary and the list of tensors, and no weights. names: the tensors of the file."""
    asked_for: set[str] = set()
    idle: list[str] = []
    errors: list[str] = []
    causal: list[str] = []

    def on_line(line: str) -> None:
        line = line.rstrip()
        if match := _ASKED_FOR.fullmatch(line):
            asked_for.add(match[1])
        elif match := _IDLE.fullmatch(line):
            idle.append(match[1])
        elif match := _ERROR.fullmatch(line):
            errors.append(match[1].strip())
        elif match := _CAUSAL.fullmatch(line):
            causal.append(match[1])  # the first counts: general.name, which may hold such a line, is printed later

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.no_alloc, params.load_mode = (
        True,
        llama_cpp.LLAMA_LOAD_MODE_NONE,
    )  # llama.cpp maps no file that it only lists
    with log_lines(on_line):
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        reason = errors[-1] if errors else "no reason was logged"
        unknown = tuple(name for name in names if name not in asked_for) if _LEFT_OVER in reason else ()
        return LoadCheck(unknown, (), f"llama.cpp cannot load it ({reason})")
    has_encoder = llama_cpp.llama_model_has_encoder(model)
    llama_cpp.llama_model_free(model)
    refusal = None
    if has_encoder:
        refusal = "it has an encoder, and the harness feeds text to decoders only"
    elif causal[:1] == ["0"]:
        refusal = "its attention is not causal, so it does not predict the next token"
    return LoadCheck((), tuple(idle), refusal)
