"""Fixtures: a tiny model, texts, and overrides that run the whole way on them in seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from tiny_model import random_text, write_tiny_llama

from harness.cli import main

# A busy machine is no error: examples may take any time.
settings.register_profile("harness", deadline=None)
settings.load_profile("harness")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F16 Llama model of 4 layers with a vocabulary of its own, trained on nothing."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-f16.gguf")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text for the prompts and another for the calibration."""
    folder = tmp_path_factory.mktemp("texts")
    prompts, calibration = folder / "prompts.txt", folder / "calibration.txt"
    prompts.write_text(random_text(600, seed=1))
    calibration.write_text(random_text(600, seed=2))
    return prompts, calibration


@pytest.fixture
def tiny_overrides(tiny_gguf: Path, texts: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """Overrides for the command line: the tiny model, 2 windows of 128 tokens, folders of the test's own."""
    return [
        f"model.path={tiny_gguf}",
        f"prompts.path={texts[0]}",
        "prompts.n_windows=2",
        "prompts.window_tokens=128",
        f"calibration.path={texts[1]}",
        "calibration.n_windows=2",
        "calibration.window_tokens=128",
        "runtime.threads=2",
        "measure.speed=false",
        f"runtime.cache_dir={tmp_path / 'cache'}",
        f"results.dir={tmp_path / 'results'}",
        "results.name=tiny",
    ]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return run
