"""Model files on the Hugging Face hub: which file a name or a pattern means, all of its parts, fetched."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from harness.config import HubConfig
from harness.errors import UserError, some
from harness.store import Cache

Found = TypeVar("Found")


def hub_file(hub: HubConfig, key: str, cache: Cache, say: Callable[[str], None]) -> Path:
    """The file that `hub.filename` names or, with *, ? or [], matches; of a split model the first part, and all others
    beside it. Raises UserError when there is no such file, or several."""
    from huggingface_hub import hf_hub_download

    name, files = hub.filename or "", None
    if not name or re.search(r"[*?\[]", name):
        files = _ask(hub, key, name, lambda: _files(hub))
        name = chosen_gguf(files, name, hub.repo_id or "", key)
    parts = _parts(name, key)
    where = f"{hub.repo_id}/{name} at {hub.revision}"
    if len(parts) > 1:
        files = files or _ask(hub, key, name, lambda: _files(hub))
        if absent := [part for part in parts if part not in files]:
            raise UserError(f"{where} is split, and the hub lacks {some(absent)}: check {key}.*")
    say(f"fetching {name} of {hub.repo_id} from the hub")

    def fetch() -> Path:
        paths = [hf_hub_download(hub.repo_id or "", part, revision=hub.revision) for part in parts]
        return Path(paths[0])

    path = _ask(hub, key, name, fetch)
    if hub.sha256 and (found := cache.sha256(path)) != hub.sha256.lower():
        raise UserError(f"{where} has sha256 {found}, expected {hub.sha256}: check {key}.revision")
    return path


def chosen_gguf(files: Sequence[str], pattern: str, repo_id: str, key: str) -> str:
    """The one model that the pattern matches: its file, or the first part of it. Raises UserError on none or several.

    The pattern stands for the whole path in the repository, and * matches / too. Projectors of vision models (mmproj)
    are not looked at.
    """
    models = _models(files)
    if not models:
        raise UserError(f"{repo_id}: {_offer(files, repo_id)}")
    if not pattern:
        raise UserError(
            f"{key}.repo_id={repo_id}: say which file with {key}.filename=NAME.gguf; it has {some(list(models))}"
        )
    found = [first for first, names in models.items() if any(fnmatchcase(name, pattern) for name in names)]
    if not found:
        raise UserError(f"{key}.filename={pattern} matches no model of {repo_id}: {_offer(files, repo_id)}")
    if len(found) > 1:
        raise UserError(f"{key}.filename={pattern} matches {len(found)} models of {repo_id}: {some(found)}; say which")
    return found[0]


def _models(files: Sequence[str]) -> dict[str, list[str]]:
    """The GGUF files of each model, in the order of their names, by that of its first part."""
    models: dict[str, list[str]] = {}
    for name in sorted(files):
        if name.endswith(".gguf") and not name.rpartition("/")[2].startswith("mmproj"):
            models.setdefault(_first_part(name), []).append(name)
    return models


def _offer(files: Sequence[str], repo_id: str) -> str:
    """What the repository has, and what to do when that is not GGUF."""
    if models := list(_models(files)):
        return f"it has {some(models)}"
    if not any(name.endswith(".safetensors") for name in files):
        return "it has no GGUF file"
    name = repo_id.rpartition("/")[2]
    return (
        f"it has no GGUF file but safetensors: fetch them with `hf download {repo_id} --local-dir {name}`, convert "
        f"them with `python -m harness convert {name} out={name}-bf16.gguf`, and give model.path={name}-bf16.gguf"
    )


def _first_part(name: str) -> str:
    return re.sub(r"-\d{5}(-of-\d{5}\.gguf)\Z", r"-00001\1", name)


def _parts(name: str, key: str) -> list[str]:
    """Names of all parts of a split model when `name` is the first, else `name` alone."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", name, re.DOTALL)
    if not match:
        return [name]
    if match[2] != "00001":
        raise UserError(f"{key}.filename={name}: give the first part of a split model, {_first_part(name)}")
    return [f"{match[1]}-{i:05d}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)] or [name]


def _files(hub: HubConfig) -> list[str]:
    """Paths of all files of the repository; when the hub cannot be reached, of those in its cache on this machine."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().list_repo_files(hub.repo_id or "", revision=hub.revision)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # no connection, in the words of whatever HTTP library it is
        folder = Path(HF_HUB_CACHE, f"models--{(hub.repo_id or '').replace('/', '--')}")
        commit = folder / "refs" / hub.revision
        snapshot = folder / "snapshots" / (commit.read_text().strip() if commit.is_file() else hub.revision)
        cached = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        if not cached:
            raise
        return cached


def _ask(hub: HubConfig, key: str, name: str, question: Callable[[], Found]) -> Found:
    """What the hub answers. Raises UserError on whatever goes wrong, with what the repository has instead of `name`."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    where = f"{hub.repo_id}/{name} at {hub.revision}"
    try:
        return question()
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(f"{where} is not in the hub's cache and the hub cannot be reached: go online once") from error
    except Exception as error:  # of the hub, and of whatever HTTP library this release of its client stands on
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        there = ""
        if isinstance(error, EntryNotFoundError):
            with suppress(Exception):
                there = f"; {_offer(_files(hub), hub.repo_id or '')}"
        answered = isinstance(error, HfHubHTTPError | HFValidationError)
        mend = f"check {key}.*, and HF_TOKEN if gated{there}" if answered else "check the connection and try again"
        raise UserError(f"the hub does not give {where} ({first_line}): {mend}") from error
