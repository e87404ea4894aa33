"""What this machine has, and whether the default inputs can be had."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from harness import __version__, sources
from harness.config import Config, WheelConfig, check
from harness.cpu import chosen_features, cpu_features, engine_facts, vector_level
from harness.errors import EngineError
from harness.paths import cache_dir, user_path
from harness.record import environment, physical_cores
from harness.store import Cache, free_bytes

_PACKAGES = ("llama-cpp-python", "numpy", "pandas", "hydra-core", "datasets", "huggingface_hub", "gguf", "matplotlib")


def doctor_text(config: Config) -> tuple[str, bool]:
    """The report, and whether everything needed is there."""
    check(config)
    cache = Cache(cache_dir(config))
    healthy = True
    lines = [f"harness {__version__}, Python {platform.python_version()}, {platform.platform()}", "", "packages"]
    for name in _PACKAGES:
        try:
            lines.append(f"  {name:<18} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"  {name:<18} MISSING: install the harness again")
            healthy = False
    lines += ["", "engine"]
    try:
        facts = engine_facts(cache)
        features = cpu_features(facts["system_info"])
        lines.append(f"  build              for {vector_level(features)}, in {_package_folder('llama_cpp')}")
        lines.append(f"  CPU features       {', '.join(features) or 'none reported'}")
        if config.runtime.cpu_features is not None:
            named = chosen_features(features, config.runtime.cpu_features)
            lines.append(f"  named in reports   {', '.join(named) or 'none'}")
    except EngineError as error:
        facts, healthy = {}, False
        lines.append(f"  does not load: {error}")
    here, n_threads = environment(facts), config.runtime.threads or physical_cores()
    load = "" if here["load_1min"] is None else f", load {here['load_1min']:.1f}"
    lines += [
        "",
        "machine",
        f"  CPU                {here['cpu']}",
        f"  threads            {n_threads} used of {here['cores_logical']} logical{load}",
        f"  memory             {_free_memory() / 1e9:.1f} GB free of {here['memory_bytes'] / 1e9:.1f} GB",
        f"  disk (results)     {free_bytes(user_path(config.results.dir)) / 1e9:.1f} GB free",
        f"  disk (cache)       {free_bytes(cache.folder) / 1e9:.1f} GB free, {cache.folder}",
        "",
        "cache",
    ]
    kinds = cache.files()
    for kind, files in kinds.items():
        lines.append(f"  {kind:<18} {len(files)} files, {sum(n_bytes for _, n_bytes, _ in files) / 1e6:.1f} MB")
    if not kinds:
        lines.append("  empty")
    lines += ["", "inputs"]
    wheels = {"model": config.model.wheel, "prompts": config.prompts.wheel, "calibration": config.calibration.wheel}
    for group, wheel in wheels.items():
        if wheel is None:
            continue
        state, available = _input_state(wheel, cache)
        healthy = healthy and available
        lines.append(f"  {group:<18} {state}")
    return "\n".join(lines), healthy


def _input_state(wheel: WheelConfig, cache: Cache) -> tuple[str, bool]:
    package = wheel.package.format(part=1)
    cached = list((cache.folder / "sources").glob(f"{wheel.sha256}.*"))
    if any(not path.name.startswith(".") for path in cached):
        return f"in the cache ({package})", True
    if sources.in_index(package):
        return f"not yet fetched; the package index has {package}", True
    return f"NOT to be had: the package index does not offer {package}", False


def _package_folder(name: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path("?")


def _free_memory() -> int:
    import psutil

    return psutil.virtual_memory().available
