"""A sweep of a 70B model, planned by the harness without any weights, as jobs for `benchmarks.schedule`."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import in_child
from benchmarks.schedule import Job, Step

if TYPE_CHECKING:
    from harness.sweep import Case, Sweep

QUANTS = "iq1_s,iq1_m,iq2_xxs,iq2_xs,iq2_s,iq2_m,iq3_xxs,iq3_s,q3_k_m,q4_k_m"


@dataclass(frozen=True)
class Setup:
    """How a sweep is started: its name in tables, and the settings that move the schedule."""

    name: str
    shared: bool
    keeps_tensors: bool
    n_parts: int = 1  # of each file's windows


KEPT = Setup("shared, tensors kept", shared=True, keeps_tensors=True)
SETUPS = (
    KEPT,
    Setup("own caches", shared=False, keeps_tensors=True),
    Setup("shared, none kept", shared=True, keeps_tensors=False),
    Setup("none kept, 4 parts", shared=True, keeps_tensors=False, n_parts=4),
    Setup("none kept, 16 parts", shared=True, keeps_tensors=False, n_parts=16),
)


def write_llama_70b(path: Path) -> None:
    """A GGUF with the header of Llama 3 70B in F16, without a vocabulary. Its data are a hole in the file."""
    import gguf
    import numpy as np

    n_layers, n_embd, n_ff, n_kv, n_vocab = 80, 8192, 28672, 1024, 128256
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(n_layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(64)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    block: dict[str, tuple[int, ...]] = {"attn_norm": (n_embd,), "attn_q": (n_embd, n_embd), "attn_k": (n_kv, n_embd)}
    block |= {"attn_v": (n_kv, n_embd), "attn_output": (n_embd, n_embd), "ffn_norm": (n_embd,)}
    block |= {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (n_vocab, n_embd), "output": (n_vocab, n_embd)}
    shapes |= {f"blk.{i}.{role}": shape for i in range(n_layers) for role, shape in block.items()}
    shapes["output_norm"] = (n_embd,)
    data_bytes = 0
    for name, shape in shapes.items():
        dtype = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        n_bytes = int(np.prod(shape)) * dtype.itemsize  # all of them multiples of the 32 bytes of an alignment
        writer.add_tensor_info(f"{name}.weight", shape, dtype, n_bytes)
        data_bytes += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + data_bytes)


def header(path: Path) -> Any:
    """In a child."""
    from harness.engine.gguf_file import read_header

    return read_header(path)


def large_sweep(folder: Path, n_windows: int, n_threads: int, quants: str = QUANTS) -> "Sweep":
    """A sweep of the 70B model in `folder`, planned by the harness, with nothing in its cache."""
    import numpy as np

    from harness.calibration import Calibration
    from harness.compose import compose
    from harness.ggml_types import PINNED_VERSION
    from harness.policy_file import load_policy
    from harness.prepare import plans_of
    from harness.prompts import Windows
    from harness.reference import Reference
    from harness.store import Cache
    from harness.sweep import Case, Sweep

    path, cache = folder / "llama-70b.gguf", Cache(folder / "cache")
    write_llama_70b(path)
    reference = Reference("llama-70b", path, "llama-70b", in_child(header, path), "", None)
    windows, chunks = (
        Windows("none", np.zeros(shape, np.int32), None, 0, "") for shape in ((n_windows, 2048), (20, 512))
    )
    calibration = Calibration("calibration", "none", chunks, None, None, 0.01)
    configs = compose([f"quant={quants}", "mode=standard,dynamicgate", "policy=dynamicgate_ladder"])
    policies = [load_policy(one.policy) for one in configs]
    plans = plans_of(configs, policies, reference, calibration, PINNED_VERSION, cache)
    cases = [Case(plan, plan.id, folder / f"{i}.json") for i, plan in enumerate([reference.plan, *plans])]
    inputs = (reference, windows, calibration, tuple(cases))
    return Sweep(folder, cache, configs[0], *inputs, n_threads, 1025, PINNED_VERSION, "probabilities")


def with_setup(sweep: "Sweep", setup: Setup) -> "Sweep":
    """The sweep with the settings of a setup."""
    config = sweep.config
    runtime = replace(config.runtime, tensor_cache_gb=1000 if setup.keeps_tensors else 0)
    measure = replace(config.measure, shard=f"all/{setup.n_parts}" if setup.n_parts > 1 else None)
    return replace(sweep, config=replace(config, measure=measure, runtime=runtime))


def jobs_of(sweep: "Sweep", copy_s: float) -> tuple[list[Job], Job]:
    """The jobs of the cases in the order in which they are given away, and the timing pass.

    What is made once in a cache: the imatrix, (a part of) the reference's scores, kept tensors, and the file of a case
    in parts. Tensors that are kept have a lock each (harness.quantize).
    copy_s: to fetch the reference, once a machine where caches are their own.
    """
    from harness import cost
    from harness.jobs import cases_apart
    from harness.work import kept_tensors

    keeps, sharded = sweep.config.runtime.tensor_cache_gb > 0, sweep.config.measure.shard is not None
    reference_s = sweep.score_s(sweep.reference_case)
    copy = Step(0.0, {"copy": copy_s}, "copy")
    imatrix = Step(0.0, {"imatrix": sweep.imatrix_s}, "imatrix")

    def quantize(case: "Case", stays: bool) -> Step:
        kept = kept_tensors(case.plan, sweep.source_types) if keeps else {}
        pieces: dict[Any, float] = {
            piece: cost.tensor_s(t.type, t.n_weights, sweep.n_threads) for piece, t in kept.items()
        }
        own_s = cost.quantize_s(case.plan.tensors, sweep.n_threads) - sum(pieces.values())
        file = f"file {case.key}"
        if stays:  # the parts of one file: one makes it, the others wait
            return Step(0.0, pieces | {file: own_s}, file)
        return Step(own_s, pieces)

    jobs: list[Job] = []
    for job in cases_apart(sweep):
        case, name = job.cases[0], f"reference {job.shard}"
        steps = [copy, Step(0.0, {name: reference_s}, name)]
        if case is not sweep.reference_case:
            steps = [copy, imatrix, quantize(case, sharded), steps[1], Step(sweep.score_s(case))]
        jobs.append(steps)
    measure, timed = sweep.config.measure, [case for case in sweep.speed_cases if case is not sweep.reference_case]
    made = [quantize(case, False) for case in timed]  # anew: the jobs removed their files
    read_s = sum(cost.generate_s(case.plan.file_bytes, measure.generate_tokens) for case in sweep.speed_cases)
    speed_s = sweep.speed_s - measure.speed_rounds * read_s * (1 - 2 / sweep.n_threads)  # the rate is that of two cores
    return jobs, [copy, imatrix, *made, Step(speed_s)]
