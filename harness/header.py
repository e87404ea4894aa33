"""What the header of a GGUF file says. Plain data; `harness.engine.gguf_file` reads it from a file."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.ggml_types import UNQUANTIZED

_EXACT = UNQUANTIZED | {"f64", "i8", "i16", "i32", "i64"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape` is in ggml's order, row width first; `type` a lower-case ggml name."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufInfo:
    """A whole model, all parts of a split file taken together.

    `quantized_header_bytes` is the size of the header that llama_model_quantize would write, without the padding at its
    end; `provenance_bytes` is what of it the keys of `harness.provenance` take that the file has already, by key.
    `unknown_tensors`: those that this llama.cpp does not know; `idle_tensors`: those that it does not use to score;
    `refusal`: why the model cannot be scored.
    """

    architecture: str
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    file_type: str | None
    quantized_header_bytes: int
    provenance_bytes: dict[str, int]
    file_bytes: int
    unknown_tensors: tuple[str, ...] = ()
    idle_tensors: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def quantized_types(self) -> tuple[str, ...]:
        """Types in the file that lose precision, the largest share first."""
        n_bytes: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.type not in _EXACT:
                n_bytes[tensor.type] = n_bytes.get(tensor.type, 0) + tensor.n_bytes
        return tuple(sorted(n_bytes, key=lambda name: -n_bytes[name]))

    @property
    def n_ctx_train(self) -> int | None:
        """Longest context the model was trained for; None when the header does not say."""
        value = self.metadata.get(f"{self.architecture}.context_length")
        return value if isinstance(value, int) else None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "GgufInfo":
        """The inverse of `to_json`."""
        tensors = tuple(TensorInfo(t["name"], tuple(t["shape"]), t["type"], t["n_bytes"]) for t in data["tensors"])
        names = {key: tuple(data[key]) for key in ("unknown_tensors", "idle_tensors")}
        return GgufInfo(**{**data, **names, "tensors": tensors})


def split_parts(path: Path) -> list[Path]:
    """All files of a split GGUF when `path` is its first part, else just `path`. Raises UserError on a missing part."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not match:
        return [path]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if number != 1:
        raise UserError(f"{path}: give the first part of a split model, {stem}-00001-of-{count:05d}.gguf")
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UserError(f"{path}: parts of the split model are missing: {', '.join(missing[:3])}")
    return parts
