"""The order of work in a sweep, and how long its quantizing will take when no tensor is quantized twice. Pure."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from harness import cost
from harness.plan import Plan, TensorPlan
from harness.tensor_cache import is_kept

Piece = tuple[str, str]  # a tensor's name and the type it is quantized into


def kept_tensors(plan: Plan, source_types: Mapping[str, str]) -> dict[Piece, TensorPlan]:
    """The tensors of a plan that are kept for other files. source_types: by name."""
    return {(t.name, t.type): t for t in plan.quantizable if is_kept(t, source_types[t.name])}


def quantizing_s(
    plans: Mapping[str, Plan | None],
    source_types: Mapping[str, str],
    held: Collection[Piece],
    n_threads: int,
    *,
    keeps_tensors: bool,
) -> dict[str, float]:
    """Estimated seconds to make each file, in the order of work. plans: by key; None for a file that is there already.
    held: pieces that are there already.

    The order: the cheapest first, given what those before it made. So the first answer comes soon, and files that share
    tensors follow each other, while these are surely still kept.
    """
    pieces: dict[str, dict[Piece, float]] = {}
    left: dict[str, float] = {}
    n_missing: dict[str, Counter[str]] = {}  # pieces of each type, whose tables a file needs as long as there are some
    users: dict[Piece, list[str]] = defaultdict(list)
    for key, plan in plans.items():
        seconds = 0.0 if plan is None else cost.quantize_s(plan.tensors, n_threads)
        shared = kept_tensors(plan, source_types) if plan and keeps_tensors else {}
        pieces[key] = {one: cost.tensor_s(t.type, t.n_weights, n_threads) for one, t in shared.items()}
        left[key], n_missing[key] = seconds, Counter(type_name for _, type_name in pieces[key])
        for one in pieces[key]:
            users[one].append(key)

    def make(one: Piece) -> None:
        made.add(one)
        for key in users[one]:
            if key in left:
                left[key] -= pieces[key][one]
                n_missing[key][one[1]] -= 1
                if not n_missing[key][one[1]]:
                    left[key] -= cost.tables_s(one[1], n_threads)

    made, order = set[Piece](), dict[str, float]()
    for one in set(held) & users.keys():
        make(one)
    while left:
        key = min(left, key=lambda name: round(left[name], 6))  # the first of those that cost the same
        order[key] = left.pop(key)
        for one in pieces[key].keys() - made:
            make(one)
    return order
