"""Paths as users give them. Light: the command line loads it for every verb."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.config import Config


def user_path(given: str) -> Path:
    """With ~ replaced. Raises UserError on the home of a user that does not exist."""
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise UserError(f"{given}: there is no such user: give the whole path") from error


def read_small(path: Path, max_bytes: int) -> bytes:
    """A whole file that somebody gave. Raises UserError when it is missing, cannot be read, or is larger."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from error
    if len(content) > max_bytes:
        raise UserError(f"{path}: larger than {max_bytes >> 20} MiB: give the model card or the table alone")
    return content


def cache_dir(config: Config) -> Path:
    """The folder of the cache: runtime.cache_dir, or the user's cache folder of the platform."""
    if config.runtime.cache_dir:
        return user_path(config.runtime.cache_dir).absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("gguf-harness", appauthor=False))
