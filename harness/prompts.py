"""Text -> tokens -> windows: the fixed prompt set, whose id is the sha256 of its token ids."""

import glob
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import TextConfig, text_label
from harness.errors import EngineError, UserError
from harness.isolate import run_in_child
from harness.store import Cache, key_of

CUT_VERSION = 2  # of how windows are cut; part of the key of every cached window file


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of one text. tokens: int32 [n_windows, window_tokens]. bos: put in front, or None."""

    name: str
    tokens: np.ndarray
    bos: int | None
    text_tokens: int
    text_sha256: str

    @property
    def id(self) -> str:
        """sha256 of the token ids as little-endian int32, window after window: the same id means the same test."""
        return hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()

    @property
    def key(self) -> str:
        """For keys: the id and the shape, since the same tokens can be cut into other windows."""
        return key_of(self.id, list(self.tokens.shape))


def load_windows(
    text: TextConfig,
    group: str,
    file: Path | None,
    model: Path,
    model_id: str,
    engine_version: str,
    cache: Cache,
) -> Windows:
    """Tokenize the text with the model's vocabulary and cut its first windows. Cached by content.

    Raises UserError when the text is empty, unreadable, or too short for the windows asked for.
    """
    text_sha256 = cache.sha256(file) if file else key_of("hub", asdict(text.hub))
    kind = _format_of(text, file) if file else "hub"
    key = key_of(
        *(CUT_VERSION, engine_version, text_sha256, kind, text.column, text.join),
        *(model_id, text.n_windows, text.window_tokens),
    )

    def make(target: Path) -> dict[str, Any]:
        log = cache.path("logs", f"tokenize-{group}", ".log")
        try:
            return run_in_child(_cut, text, group, file, model, target, log_path=log)
        except EngineError as error:
            raise UserError(
                f"the text of {group} ({text_label(text)}) cannot be made tokens of ({error.with_log}): see {log}"
            ) from error

    path = cache.make("windows", key, ".npy", make)
    return Windows(text_label(text), np.load(path, allow_pickle=False), **cache.facts(path))


def cut_windows(tokens: np.ndarray, n_windows: int, window_tokens: int, bos: int | None) -> np.ndarray:
    """The first `n_windows` consecutive windows, int32 [n_windows, window_tokens].

    Where the model adds a BOS token, the first token of every window is replaced by it (as llama-perplexity does).
    Raises ValueError when there are not enough tokens.
    """
    if len(tokens) < n_windows * window_tokens:
        raise ValueError(f"{len(tokens)} tokens are not enough for {n_windows} windows of {window_tokens}")
    windows = tokens[: n_windows * window_tokens].reshape(n_windows, window_tokens).astype(np.int32)
    if bos is not None:
        windows[:, 0] = bos
    return windows


def read_text(text: TextConfig, group: str, file: Path | None) -> str:
    """The whole text, loaded by `datasets`: plain text as one document whose lines end with a line feed; rows of json,
    parquet and hub data are joined with `join`.

    Raises UserError when it cannot be read as that.
    """
    where = f"{group}.path={file}" if file else f"{group}.hub.repo_id={text.hub.repo_id}"
    kind = _format_of(text, file) if file else "hub"
    try:
        if file and not file.stat().st_size:
            return ""  # `datasets` wants something to read
        if file and kind == "json":
            _require_rows(file)
        import datasets

        datasets.disable_progress_bars()
        if file is None:
            rows = datasets.load_dataset(
                text.hub.repo_id, text.hub.config, split=text.hub.split, revision=text.hub.revision
            )
        else:
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report the load of a local file to a server
            pattern = glob.escape(str(file))  # `datasets` takes the name for a pattern
            whole = {"sample_by": "document"} if kind == "text" else {}
            rows = datasets.load_dataset(kind, data_files=pattern, split="train", streaming=True, **whole)
        parts = []
        column = "text" if kind == "text" else text.column
        for row in rows:
            if column not in row:
                raise UserError(f"{where} has no column {column!r}: it has {', '.join(row)}; set {group}.column")
            value = row[column]
            if not isinstance(value, str | None):
                raise UserError(
                    f"{where}: column {column!r} holds {type(value).__name__}, not text; set {group}.column"
                )
            parts.append(value or "")
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds, from decoding to the network
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{where} cannot be read as text ({lines[0][:200]}): check the file and {group}.format"
        ) from error
    return text.join.join(parts)


def _require_rows(file: Path) -> None:
    """pyarrow, with which `datasets` reads JSON, ends the process at rows that are no objects (release 26.0.1). Rows:
    objects one after the other, or one list of objects or of texts. Raises ValueError and RecursionError."""
    text, kinds, n, at = file.read_text(encoding="utf-8-sig"), set(), 0, 0
    value, decoder = None, json.JSONDecoder()
    while (at := _SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        value, at = decoder.raw_decode(text, at)
        kinds.add(type(value))
        n += 1
    if n == 1 and isinstance(value, list):
        kinds = {str if row is None else type(row) for row in value}
        kinds = {dict} if kinds == {str} else kinds
    if kinds - {dict}:
        raise ValueError("its rows are no JSON objects")


def _cut(text: TextConfig, group: str, file: Path | None, model: Path, target: Path) -> dict[str, Any]:
    from harness.engine.model import tokenize

    content = read_text(text, group, file)
    if not content.strip():
        raise UserError(f"the text of {group} ({text_label(text)}) is empty: give a text with words")
    tokens, bos = tokenize(model, content)
    try:
        windows = cut_windows(tokens, text.n_windows, text.window_tokens, bos)
    except ValueError as error:
        most = len(tokens) // text.window_tokens
        fits = len(tokens) // text.n_windows
        mend = f"{group}.n_windows={most}" if most else f"a longer text, or {group}.window_tokens={fits} or less"
        raise UserError(f"the text of {group} ({text_label(text)}) is too short: {error}; use {mend}") from error

    with target.open("wb") as file_out:
        np.save(file_out, windows)
    return {
        "bos": bos,
        "text_tokens": len(tokens),
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
    }


_SPACE = re.compile(r"[ \t\r\n]*")
_FORMATS: dict[str, str] = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _format_of(text: TextConfig, file: Path) -> str:
    return text.format or _FORMATS.get(file.suffix.lower(), "text")
