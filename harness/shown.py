"""Which records stand in the pictures of what is inside files and measurements: a few of very many are examples enough.

Pure, and without pandas: these records go to the process that draws while the tables' library is still being loaded.
Each function may be given what it returned and returns the same.
"""

from collections.abc import Sequence

import numpy as np

from harness.record import Record

MOST_ROWS = 24  # of a picture with a line for each variant
MOST_QUANTS = 18  # of pictures with a panel for each quant
FEW_QUANTS = 2  # of more than that
MOST_POSITIONS = 8  # variants by position in the window


def spread_out(n: int, most: int) -> list[int]:
    """Indices of at most `most` of n items, evenly chosen, the first and the last among them."""
    return list(dict.fromkeys(np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()))


def variants(records: Sequence[Record]) -> list[Record]:
    """What was measured beside the reference."""
    return [record for record in records if record.ok and record.data["mode"] != "reference"]


def of_types(records: Sequence[Record], most: int = MOST_QUANTS) -> list[Record]:
    """One policy's file a quant, the first that changes anything (placebos last), in the order of the quants. With more
    than `most` quants FEW_QUANTS of them, evenly chosen."""
    others = [record for record in variants(records) if record.data["mode"] != "standard"]
    others.sort(key=lambda record: record.data["mode"].startswith("placebo"))
    quants = list(dict.fromkeys(record.data["quant"] for record in others))
    shown = {quants[i] for i in spread_out(len(quants), most if len(quants) <= most else FEW_QUANTS)}
    found: dict[str, Record] = {}
    for record in others:
        quant = record.data["quant"]
        if quant in shown and quant not in found and _changes_a_type(record):
            found[quant] = record
    in_order = dict.fromkeys(record.data["quant"] for record in records)
    return [found[quant] for quant in in_order if quant in found]


def _changes_a_type(record: Record) -> bool:
    return any(one["type"] != one["standard"] for one in record.data["variant"]["tensors"].values())


def of_kld(records: Sequence[Record]) -> list[Record]:
    """At most MOST_ROWS of the variants that were compared with the reference, evenly chosen."""
    measured = [record for record in variants(records) if "kld" in record.per_token()]
    return [measured[i] for i in spread_out(len(measured), MOST_ROWS)]


def of_positions(records: Sequence[Record], most: int = MOST_POSITIONS) -> list[Record]:
    """The reference and its variants, the best first; of more than `most` the best and the worst, half each."""
    reference = [record for record in records if record.ok and record.data["mode"] == "reference"][:1]
    if not reference:
        return []
    found = sorted(variants(records), key=lambda record: float(record.per_token()["nll"].mean()))
    if len(found) > most:
        found = found[: most // 2] + found[-(most - most // 2) :]
    return reference + found
