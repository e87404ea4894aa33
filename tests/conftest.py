"""Fixtures: a tiny model, texts, and overrides that run the whole way on them in seconds."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults import World
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
    return _overrides(tiny_gguf, texts, tmp_path)


def _overrides(model: Path, texts: tuple[Path, Path], folder: Path, threads: int = 2) -> list[str]:
    return [
        f"model.path={model}",
        f"prompts.path={texts[0]}",
        "prompts.n_windows=2",
        "prompts.window_tokens=128",
        f"calibration.path={texts[1]}",
        "calibration.n_windows=2",
        "calibration.window_tokens=128",
        f"runtime.threads={threads}",
        "measure.speed=false",
        f"runtime.cache_dir={folder / 'cache'}",
        f"results.dir={folder / 'results'}",
        "results.name=tiny",
    ]


@pytest.fixture(scope="session")
def finished_sweep(tiny_gguf: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cache/ and results/tiny/ of a finished sweep; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    overrides = ["mode=standard", *_overrides(tiny_gguf, texts, folder, threads=1)]
    assert main(["sweep", "quant=q8_0", *overrides]) == 0
    assert main(["plan", "quant=q8_0,q4_0", *overrides]) == 0, "now in the cache, for all that sweep it further"
    return folder


@pytest.fixture
def world(
    finished_sweep: Path,
    tiny_gguf: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    """The test's own copy of the finished sweep."""
    shutil.copytree(finished_sweep, tmp_path, dirs_exist_ok=True)
    with ExitStack() as stack:
        yield World(
            tmp_path, _overrides(tiny_gguf, texts, tmp_path, threads=1), tiny_gguf, texts, cli, monkeypatch, stack
        )


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return run
