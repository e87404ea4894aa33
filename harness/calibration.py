"""Where the imatrix comes from, and whether it may be used: no overlap with the prompts, data for every tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness import metrics, sources
from harness.config import CalibrationConfig, Config, text_label
from harness.errors import UserError
from harness.imatrix import COLLECTOR_VERSION, load_origin
from harness.paths import user_path
from harness.plan import Plan
from harness.prompts import Windows, load_windows
from harness.provenance import imatrix_metadata
from harness.reference import Reference
from harness.store import Cache, key_of


@dataclass(frozen=True)
class Calibration:
    """Where the imatrix comes from: `windows` of a text, or a ready `file`. `overlap`: share of shared 13-grams."""

    id: str
    name: str
    windows: Windows | None
    file: Path | None
    overlap: float | None
    max_overlap: float
    metadata: dict[str, str | int] = field(default_factory=dict)  # what files quantized with it say of it

    def describe(self) -> dict[str, Any]:
        """For the record."""
        windows = self.windows
        return {
            "id": self.id,
            "name": self.name,
            "windows_id": windows.id if windows else None,
            "n_windows": len(windows.tokens) if windows else None,
            "window_tokens": windows.tokens.shape[1] if windows else None,
            "overlap_share": self.overlap,
        }


def calibration_file(calibration: CalibrationConfig, cache: Cache, say: sources.Say) -> Path | None:
    """The text of the imatrix, verified; None when there is none or the hub has it."""
    if not calibration.enabled:
        return None
    if calibration.imatrix:
        return user_path(calibration.imatrix).absolute()
    return sources.text_file(calibration, "calibration", cache, say)


def resolve_calibration(
    config: Config,
    file: Path | None,
    reference: Reference,
    prompts: Windows,
    engine_version: str,
    cache: Cache,
) -> Calibration | None:
    """Tokenize the calibration text and compare it with the prompts, or check the imatrix that was given.

    Raises UserError when the two texts overlap or the imatrix cannot be read.
    """
    settings = config.calibration
    if not settings.enabled:
        return None
    if settings.imatrix:
        assert file is not None
        metadata = imatrix_metadata(file.name, *load_origin(file, cache.path("logs", "imatrix-check", ".log")))
        return Calibration(cache.sha256(file), file.name, None, file, None, settings.max_overlap, metadata)
    windows = load_windows(settings, "calibration", file, reference.path, reference.id, engine_version, cache)
    overlap = metrics.shared_ngram_share(prompts.tokens, windows.tokens)
    if overlap is not None and overlap > settings.max_overlap and not settings.allow_overlap:
        raise UserError(
            f"{overlap:.1%} of the prompts' 13-grams occur in the calibration text ({text_label(settings)}): "
            "the imatrix would have seen the test; choose another calibration=, or say calibration.allow_overlap=true"
        )
    key = key_of(reference.id, windows.key, config.measure.flash_attention, COLLECTOR_VERSION, engine_version)
    metadata = imatrix_metadata(f"{key}.gguf", windows.name, len(windows.tokens))
    return Calibration(key, windows.name, windows, None, overlap, settings.max_overlap, metadata)


def require_coverage(imatrix: dict[str, np.ndarray], plans: Sequence[Plan], path: Path) -> None:
    """Raises UserError when a tensor that needs imatrix data has none, or data of another width."""
    for plan in plans:
        columns = {t.name: t.shape[0] * (t.shape[2] if len(t.shape) > 2 else 1) for t in plan.tensors}
        missing = [name for name in plan.needs_imatrix if name not in imatrix]
        if missing:
            raise UserError(
                f"the imatrix {path} has no data for {missing[0]} and {len(missing) - 1} more tensors that "
                f"quant={plan.quant} needs it for: make it from this model"
            )
        for name, values in imatrix.items():
            if name in columns and values.size != columns[name]:
                raise UserError(
                    f"the imatrix {path} has {values.size} values for {name}, the model needs {columns[name]}: "
                    "it was made from another model"
                )
