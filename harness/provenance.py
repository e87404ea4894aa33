"""Where a quantized GGUF comes from, as metadata of the file itself, and the bytes that takes. Pure functions.

The keys of the imatrix are those that llama-quantize writes; the others tell how to make the same file again. No value
is a path of the machine that made the file.
"""

from collections.abc import Mapping
from dataclasses import replace

from harness import __version__
from harness.header import GgufInfo
from harness.plan import Plan, padded

IMATRIX_FILE = "quantize.imatrix.file"
IMATRIX_DATASET = "quantize.imatrix.dataset"
IMATRIX_ENTRIES = "quantize.imatrix.entries_count"
IMATRIX_CHUNKS = "quantize.imatrix.chunks_count"
# Every key, and what stands for "none" where the reference brings one along that is not true of the variant.
KEYS: dict[str, str | int] = {
    IMATRIX_FILE: "",
    IMATRIX_DATASET: "",
    IMATRIX_ENTRIES: 0,
    IMATRIX_CHUNKS: 0,
    "harness.version": "",
    "harness.quant": "",
    "harness.mode": "",
    "harness.policy": "",
    "harness.plan": "",
}
_MAX_TEXT_BYTES = 127  # llama_model_kv_override holds 128, the last of them a zero


def with_provenance(plan: Plan, reference: GgufInfo, imatrix: Mapping[str, str | int]) -> Plan:
    """The plan of a quantized file with its metadata, and the header that holds it.

    imatrix: the keys of the imatrix, empty without one (`imatrix_metadata`).
    """
    metadata: dict[str, str | int] = {
        **{key: KEYS[key] for key in reference.provenance_bytes},
        **imatrix,
        "harness.version": __version__,
        "harness.quant": plan.quant,
        "harness.mode": plan.mode,
        **({"harness.policy": plan.policy} if plan.policy else {}),
        "harness.plan": plan.id,
    }
    metadata = {key: _clipped(value) if isinstance(value, str) else value for key, value in metadata.items()}
    # A key that the reference has is replaced.
    added = sum(kv_bytes(key, value) for key, value in metadata.items()) - sum(reference.provenance_bytes.values())
    return replace(
        plan, metadata=tuple(metadata.items()), header_bytes=padded(reference.quantized_header_bytes + added)
    )


def imatrix_metadata(file_name: str, dataset: str | None, n_chunks: int | None) -> dict[str, str | int]:
    """The keys that llama-quantize writes of an imatrix, without the folders of file and dataset. The number of its
    entries is 0 until the quantizer has read the file."""
    found: dict[str, str | int] = {IMATRIX_FILE: _base_name(file_name)}
    if dataset:
        found[IMATRIX_DATASET] = _base_name(dataset)
    found[IMATRIX_ENTRIES] = 0
    if n_chunks:
        found[IMATRIX_CHUNKS] = n_chunks
    return found


def kv_bytes(key: str, value: str | int) -> int:
    """Bytes of one key in a GGUF header: uint64 length and text of the key, uint32 type, and the value, a uint32 or a
    uint64 length and text."""
    return 8 + len(key.encode()) + 4 + (4 if isinstance(value, int) else 8 + len(value.encode()))


def _base_name(path: str) -> str:
    """The last part, whatever system the path is of."""
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _clipped(text: str) -> str:
    """What of a text fits, in whole characters."""
    return text.encode("utf-8", "replace")[:_MAX_TEXT_BYTES].decode("utf-8", "ignore")
