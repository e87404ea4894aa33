"""Shows where a long run is: a bar with ETA on a terminal, one line a step elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from harness.cost import minutes


class ProgressDisplay:
    """Steps of known estimated length; the time left follows from how long the finished ones really took."""

    def __init__(self, console: Console, total_s: float) -> None:
        self._console = console
        self._total_s = max(total_s, 1e-9)
        self._done_s = 0.0
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "ProgressDisplay":
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total_s, left="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @contextmanager
    def step(self, description: str, estimate_s: float) -> Iterator[Callable[[float], None]]:
        """One step; the block reports its share done (0 to 1) through what this yields."""
        if not self._bar:
            self._console.print(f"{description} ({self._left(0.0)})", highlight=False)

        def on_progress(share: float) -> None:
            if self._bar and self._task is not None:
                done = share * estimate_s
                self._bar.update(
                    self._task, description=description, completed=self._done_s + done, left=self._left(done)
                )

        on_progress(0.0)
        yield on_progress
        self._done_s += estimate_s

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _left(self, done_of_step_s: float) -> str:
        done = self._done_s + done_of_step_s
        elapsed = time.monotonic() - self._begin
        # Believe the estimates until a tenth of the work is done, then the pace seen so far.
        pace = elapsed / done if done > 0.1 * self._total_s else 1.0
        return f"about {minutes(max(0.0, self._total_s - done) * pace)} left"
