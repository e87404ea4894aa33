"""The two kinds of failure that a user meets."""

import difflib
import errno
from collections.abc import Iterable, Sequence

_LONGEST_NAME = 120


def printable(text: str) -> str:
    """On one line, and without what a terminal would take for a command: such characters are replaced."""
    return "".join(c if c.isprintable() else "?" for c in text)


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to mend it. Exit code 2, no traceback.

    It may quote anybody's file, so what cannot be printed is replaced.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class EngineError(Exception):
    """llama.cpp refused or died while it worked on one case. `log_tail` holds its last lines."""

    def __init__(self, message: str, log_tail: list[str] | None = None) -> None:
        super().__init__(printable(message))
        self.log_tail = log_tail or []

    @property
    def with_log(self) -> str:
        """The message, and the last line of the log that tells more."""
        said = [line.strip() for line in self.log_tail if any(word in line.lower() for word in ("error", "assert"))]
        return f"{self} ({printable(said[-1])})" if said and said[-1] not in str(self) else str(self)


def disk_error(error: OSError) -> str:
    """One line of an error that the system gave: which file, what, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    mend = "make room, then " if full else "" if error.errno == errno.ENOENT else "mend that, then "
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; {mend}give the same command again: what was measured is kept"


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """' Did you mean a, b?' for a misspelt word, or the known words when nothing is near; '' when none are known."""
    known = sorted(known)
    near = difflib.get_close_matches(word.lower(), known, n=n, cutoff=0.5)
    if near:
        return f" Did you mean {', '.join(near)}?"
    return f" Known: {', '.join(known)}." if 0 < len(known) <= 40 else ""


def some(names: Sequence[str], n: int = 5) -> str:
    """The first names, and how many more there are; what cannot be printed or is too long is replaced."""
    shown = [printable(name[:_LONGEST_NAME]) for name in names[:n]]
    return ", ".join(shown) + (f" and {len(names) - n} more" if len(names) > n else "")
