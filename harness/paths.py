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


def cache_dir(config: Config) -> Path:
    """The folder of the cache: runtime.cache_dir, or the user's cache folder of the platform."""
    if config.runtime.cache_dir:
        return user_path(config.runtime.cache_dir).absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("gguf-harness", appauthor=False))
