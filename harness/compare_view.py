"""Two records side by side, as `python -m harness compare` prints them."""

import math
from collections.abc import Collection

from harness.compare import difference
from harness.errors import UserError
from harness.frames import measured_cases, percent_change
from harness.record import Record, first_difference
from harness.stats import MIN_BLOCKS, SMALLEST_P, Interval
from harness.tables import percent, size


def comparison_text(a: Record, b: Record, allow_different: Collection[str] = ()) -> str:
    """Two records compared on the same tokens, with what this prompt set can and cannot tell.

    Raises UserError when they may not be compared, naming the field that differs.
    """
    for record in (a, b):
        if not record.ok:
            raise UserError(f"{record.name} failed, {record.path} has no values to compare: run its sweep again")
    unlike = first_difference([a.data, b.data], allow_different)
    if unlike:
        name, one, other = unlike
        raise UserError(f"{a.name} and {b.name} differ in {name} ({one} and {other}): they cannot be compared")
    first, second = measured_cases([a])[0], measured_cases([b])[0]
    paired = difference(first, second)
    n_windows = first.nll.shape[0]
    prompts = a.data["prompt_set"]
    lines = [
        f"{a.name} against {b.name}",
        f"{prompts['name']}, {n_windows} windows of {prompts['window_tokens']} tokens, {first.nll.size} scored, "
        f"{paired.ln_ppl.n_blocks} blocks",
        "",
        f"  PPL      {math.exp(first.nll.mean()):.4f} and {math.exp(second.nll.mean()):.4f}: "
        + percent(*(percent_change(x) for x in (paired.ln_ppl.mean, paired.ln_ppl.low, paired.ln_ppl.high))),
        f"  ln PPL   {_interval_text(paired.ln_ppl)}",
    ]
    if paired.kld:
        lines.append(f"  KLD      {_interval_text(paired.kld)} nats")
    lines += [
        f"  size     {size(first.file_bytes)} and {size(second.file_bytes)}",
        "",
        *_resolution(paired.ln_ppl, n_windows),
    ]
    return "\n".join(lines)


def _interval_text(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.6f}, no interval: {interval.reason}"
    p = f"p < {SMALLEST_P:.4f}" if interval.p is not None and interval.p < SMALLEST_P else f"p = {interval.p:.4f}"
    return f"{interval.mean:+.6f} [{interval.low:+.6f}, {interval.high:+.6f}], {p}"


def _resolution(interval: Interval, n_windows: int) -> list[str]:
    """What difference this much text can show, and how much text would show the one that was seen."""
    if interval.resolvable is None:
        if interval.n_blocks >= MIN_BLOCKS:
            return [f"No difference to resolve: {interval.reason}."]
        return [f"This prompt set resolves nothing: {interval.reason}. More windows (prompts.n_windows) help."]
    seen = "a difference" if interval.sign else "no difference beyond noise"
    lines = [
        f"This shows {seen}. {n_windows} windows resolve a change of {percent_change(interval.resolvable):.2f}% of PPL "
        "(seen 4 times out of 5)."
    ]
    need = interval.windows_to_resolve(n_windows)
    if interval.sign == 0 and need:
        lines.append(f"If the true change is the one seen here, about {need} windows would show it.")
    return lines
