"""The build of llama.cpp in use: what it says of itself, and which of its CPU features reports name."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.errors import UserError, nearest
from harness.ggml_types import PINNED_VERSION
from harness.isolate import run_in_child
from harness.store import Cache

_VECTOR_LEVELS = ("AVX512", "AVX2", "AVX", "SSE3", "SVE", "NEON", "RISCV_V", "VSX", "VXE", "WASM_SIMD")
_LARGEST_N = 100  # features that a report names; a record may be anybody's file


def ggml_base_path() -> Path:
    """The library whose code quantizes. llama_cpp is not loaded for it. Raises UserError when it is not there."""
    package = find_spec("llama_cpp")
    folder = Path(package.origin).parent / "lib" if package and package.origin else Path("llama_cpp") / "lib"
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll")
    for path in (folder / name for name in names):
        if path.exists():
            return path
    raise UserError(f"llama-cpp-python has no libggml-base in {folder}: reinstall llama-cpp-python=={PINNED_VERSION}")


def engine_facts(cache: Cache) -> dict[str, str]:
    """Version of llama-cpp-python and its system info. Raises EngineError when it does not load."""
    return run_in_child(_engine_facts, log_path=cache.path("logs", "engine", ".log"))


def cpu_features(system_info: str) -> list[str]:
    """Names of what is on in llama.cpp's system info ("CPU : AVX = 1 | AVX2 = 1 | ..."), in its order.

    They are those that the library was compiled for, not those of the CPU.
    """
    pairs = (item.rpartition(":")[2].partition("=") for item in system_info.split("|"))
    return [name.strip() for name, _, value in pairs if value.strip() == "1"]


def vector_level(features: Sequence[str]) -> str:
    """The widest vector unit that the build uses."""
    return next((name for name in _VECTOR_LEVELS if name in features), "no vector unit")


def chosen_features(features: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The features to report: all of them, or the `wanted` ones in that order, spelt as llama.cpp does.

    Raises UserError on a feature that the build does not report.
    """
    if wanted is None:
        return list(features)
    by_name = {name.lower(): name for name in features}
    absent = [name for name in wanted if name.lower() not in by_name]
    if absent:
        raise UserError(
            f"runtime.cpu_features: this build of llama.cpp does not report {absent[0]}."
            f"{nearest(absent[0], by_name)} docs/building.md tells how to build for other CPUs"
        )
    return list(dict.fromkeys(by_name[name.lower()] for name in wanted))


def features_text(environment: Mapping[str, Any]) -> str | None:
    """ "AVX2, FMA" of a record's environment, and how many more are in use when only some were to be reported."""
    system_info, named = environment.get("system_info"), environment.get("cpu_features")
    features = cpu_features(system_info) if isinstance(system_info, str) else []
    if not isinstance(named, list) or not set(map(str, named)) <= set(features):
        named = features  # an older record, or one that was made up
    if not named:
        return None
    n_more = len(features) - len(named)
    return ", ".join(named[:_LARGEST_N]) + (f" ({n_more} more in use)" if n_more else "")


def _engine_facts() -> dict[str, str]:
    """In a child: only there llama.cpp is loaded."""
    from harness.engine.native import engine_facts

    return engine_facts()
