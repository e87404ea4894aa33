"""Runs a function in a child process of its own: an abort inside llama.cpp ends the child, not the sweep."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from harness.errors import EngineError, UserError

TERMINATED = "died of SIGTERM"  # in messages; nobody sends it to a child but who takes the machine away
_TAIL_LINES = 20


def run_in_child(
    function: Callable[..., Any],
    *args: Any,
    log_path: Path,
    on_progress: Callable[[float], None] | None = None,
    **kwargs: Any,
) -> Any:
    """What `function(*args, **kwargs)` returns in a spawned child, whose stdout and stderr go to `log_path`.

    With `on_progress`, the function gets a keyword argument of that name, and what it reports (a share, 0 to 1)
    arrives here. The parent sleeps while it waits. UserError, EngineError and OSError (a full disk, say) come back as
    they are; any other exception, and a child that dies, as EngineError with the log's last lines. The child dies with
    its parent.
    """
    spawn = multiprocessing.get_context("spawn")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = spawn.Pipe()
    process = spawn.Process(
        target=_child,
        args=(theirs, str(log_path), function, args, kwargs, on_progress is not None),
        daemon=True,
    )
    with deaf_to_ctrl_c():
        process.start()
    theirs.close()
    try:
        while True:
            ready = wait([ours, process.sentinel])
            if ours not in ready and not ours.poll():
                break
            try:
                kind, payload = ours.recv()
            except EOFError:
                break
            if kind == "progress":
                if on_progress:
                    on_progress(payload)
                continue
            process.join(timeout=5)  # let it clean up: killed at once, it would leave semaphores behind
            if kind == "result":
                return payload
            if kind == "user_error":
                raise UserError(payload)
            if kind == "os_error":
                raise OSError(*payload)
            raise EngineError(payload, log_tail(log_path))
        process.join()
        raise EngineError(_cause_of_death(process.exitcode), log_tail(log_path))
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started inside take no Ctrl-C from their first moment on: it reaches the whole group, and the
    parent decides. One that comes meanwhile waits until the parent leaves: half a start is a traceback of the child."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield  # Windows has no such mask, and only the main thread may set a handler
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # started inside, it would let Ctrl-C through again
    came: list[int] = []  # the mask is the child's; here another thread may still take the signal
    handler = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def log_tail(path: Path, n_lines: int = _TAIL_LINES) -> list[str]:
    """Last lines of a log that are not blank."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-n_lines:]


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = f"signal {-exit_code}"
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"the engine's process died of {name}{hint}"
    return f"the engine's process ended with exit code {exit_code} before it gave a result"


def _child(
    connection: Connection,
    log_path: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    with_progress: bool,
) -> None:
    # Ctrl-C reaches the whole group; the parent decides what happens to this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else an abort starts a debugger, whose output hides the reason
    threading.Thread(target=_die_with_parent, args=(connection,), daemon=True).start()
    try:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if with_progress:
            kwargs = {**kwargs, "on_progress": lambda share: connection.send(("progress", share))}
        connection.send(("result", function(*args, **kwargs)))
    except UserError as error:
        connection.send(("user_error", str(error)))
    except EngineError as error:
        connection.send(("error", str(error)))
    except BaseException as error:
        with suppress(OSError):  # the disk of the log may be the one that is full
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno is not None:
            connection.send(("os_error", (error.errno, error.strerror, error.filename)))
        else:
            connection.send(("error", f"{type(error).__name__}: {error}"))
    with suppress(OSError):
        sys.stderr.flush()


def _die_with_parent(connection: Connection) -> None:
    """The parent never sends: this returns only when its end is closed, that is when it is gone."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
