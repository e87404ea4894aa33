"""The two sides of beside_llama_cpp.py: the same inputs, the commands of each, what they took and what came out."""

import csv
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, llama_tools
from benchmarks.common import in_child, measured, say
from harness.errors import UserError
from harness.store import write_text

Results = dict[str, dict[str, Any]]  # by case: ppl, kld, tensors (by name)


@dataclass(frozen=True)
class Step:
    """One command of llama.cpp's tools: its kind (a row of the table), its case, and what runs it: returns "usage" and
    what it found."""

    kind: str
    case: str
    run: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        """For people, and for the list of finished steps."""
        return f"{self.kind} {self.case}"


@dataclass(frozen=True)
class File:
    """A quantized file: its case, llama.cpp's file type, the types of all tensors as --tensor-type-file takes them
    (None: llama-quantize finds them itself), and the name that the sweep's cache gives it."""

    case: str
    file_type: str
    recipe: str | None
    variant: str


@dataclass(frozen=True)
class Inputs:
    """What both sides get. share: of the quantizing work, what is left when no tensor is quantized twice."""

    reference: Path
    prompts: Path
    calibration: Path
    files: tuple[File, ...]
    linked: tuple[Path, ...]
    windows: tuple[int, int]
    calibration_windows: tuple[int, int]
    n_threads: int
    flash_attention: bool
    share: float
    environment: dict[str, Any]


def resolve(overrides: list[str]) -> Inputs:
    """In a child: fetches and derives what is not there yet. Raises UserError."""
    from harness.compose import configs_of_sweep
    from harness.cpu import cpu_features, engine_facts
    from harness.prepare import prepare
    from harness.recipes import recipe_text
    from harness.record import environment, mode_label
    from harness.sources import text_file

    sweep = prepare(configs_of_sweep(overrides), say, with_reference=False)
    config, facts = sweep.config, engine_facts(sweep.cache)
    prompts, calibration = (
        text_file(text, name, sweep.cache, say)
        for text, name in ((config.prompts, "prompts"), (config.calibration, "calibration"))
    )
    if prompts is None or calibration is None or not config.calibration.enabled or config.measure.first_scored:
        raise UserError("llama.cpp's tools need both texts as files, and score the second half of each window")
    files = tuple(
        File(
            f"{case.plan.quant}-{mode_label(case.plan.mode, case.plan.policy)}",
            case.plan.file_type or "",
            recipe_text(case.plan, comments=False) if case.plan.policy else None,
            sweep.variant_path(case).name,
        )
        for case in sweep.cases
    )
    return Inputs(
        reference=sweep.reference.path,
        prompts=prompts,
        calibration=calibration,
        files=files,
        linked=tuple(sweep.cache.folder / kind for kind in ("sources", "references")),
        windows=(config.prompts.n_windows, config.prompts.window_tokens),
        calibration_windows=(config.calibration.n_windows, config.calibration.window_tokens),
        n_threads=sweep.n_threads,
        flash_attention=config.measure.flash_attention,
        share=common.unique_share([case.plan for case in sweep.cases], sweep.source_types),
        environment=environment({**facts, "cpu_features": cpu_features(facts["system_info"])}),
    )


def tensors_of(path: Path) -> dict[str, str]:
    """In a child: by name, type and sha256 of every tensor."""
    from harness.engine.gguf_file import read_header
    from harness.quantize import tensor_sha256

    digests = tensor_sha256(path, n_threads=2)
    return {tensor.name: f"{tensor.type} {digests[tensor.name]}" for tensor in read_header(path).tensors}


def imatrix_difference(a: Path, b: Path) -> float:
    """In a child: the largest relative difference of a weight; infinite where the tensors are others."""
    from harness.imatrix import read_imatrix

    one, other = read_imatrix(a).weights, read_imatrix(b).weights
    if one.keys() != other.keys():
        return float("inf")
    return max(float((abs(one[name] - other[name]) / (abs(one[name]) + 1e-12)).max()) for name in one)


def harness_side(inputs: Inputs, overrides: Sequence[str], work: Path) -> dict[str, Any]:
    """One sweep in an empty cache: what each of its steps took, and its results."""
    cache, results = work / "cache", work / "results"
    for folder in (cache, results):
        shutil.rmtree(folder, ignore_errors=True)
    cache.mkdir()
    for folder in inputs.linked:
        if folder.is_dir():
            (cache / folder.name).symlink_to(folder)
    command = [
        *(sys.executable, "-m", "harness", "sweep", *overrides, "measure.speed=false", "runtime.keep_variants=true"),
        *(f"runtime.threads={inputs.n_threads}", f"runtime.cache_dir={cache}"),
        *(f"results.dir={results}", "results.name=sweep"),
    ]
    usage = measured(
        command,
        work / "harness.log",
        step_of=common.step_of_sweep,
        last_step_ended=lambda: common.last_record(results / "sweep"),
    )
    with (results / "sweep" / "runs.csv").open(newline="", encoding="utf-8") as file:
        runs = {row["name"]: row for row in csv.DictReader(file)}
    found: Results = {"reference": {"ppl": float(runs["reference"]["ppl"])}}
    for one in inputs.files:
        row = runs[one.case]
        tensors = in_child(tensors_of, cache / "variants" / one.variant)
        found[one.case] = {"ppl": float(row["ppl"]), "kld": float(row["kld_mean"]), "tensors": tensors}
    for made in (cache / "imatrix").glob("*.gguf"):
        shutil.copyfile(made, work / "imatrix.gguf")
    shutil.rmtree(cache)
    return {"usage": {step: asdict(one) for step, one in usage.items()}, "results": found}


def llama_steps(inputs: Inputs, tools: Path, work: Path) -> Iterator[Step]:
    """The commands of the other side, in order. They use the imatrix that is in `work`."""
    threads = ["-t", inputs.n_threads, "-fa", "on" if inputs.flash_attention else "off"]

    def step(
        kind: str, case: str, command: Sequence[Any], figures: Sequence[str], then: Callable[[], dict[str, Any]] = dict
    ) -> Step:
        def run() -> dict[str, Any]:
            usage, found = llama_tools.run_tool(command, work / f"{kind}-{case}.log", figures)
            return {"usage": asdict(usage), **found, **then()}

        return Step(kind, case, run)

    n, size = inputs.calibration_windows
    imatrix = [tools / "llama-imatrix", *threads, "-m", inputs.reference, "-f", inputs.calibration, "--no-ppl"]
    imatrix += ["-c", size, "-b", size, "-ub", size, "--chunks", n, "-o", work / "llama-imatrix.gguf"]
    yield step("imatrix", "", imatrix, [])

    n, size = inputs.windows
    perplexity = [tools / "llama-perplexity", *threads, "-c", size, "-b", size]  # its own micro-batch, 512
    perplexity += ["--chunks", n, "--kl-divergence-base", work / "logits.bin"]
    reference = [*perplexity, "-m", inputs.reference, "-f", inputs.prompts]
    yield step("reference", "reference", reference, ["ppl"])

    for file in inputs.files:
        target, types = work / f"{file.case}.gguf", work / f"{file.case}.txt"
        quantize = [tools / "llama-quantize", "--imatrix", work / "imatrix.gguf"]
        if file.recipe is not None:
            write_text(types, file.recipe)
            quantize += ["--tensor-type-file", types]
        quantize += [inputs.reference, target, file.file_type.upper(), inputs.n_threads]

        def made(target: Path = target) -> dict[str, Any]:
            return {"tensors": in_child(tensors_of, target)}

        def scored(target: Path = target) -> dict[str, Any]:
            target.unlink()
            return {}

        yield step("quantize", file.case, quantize, ["quantize_s"], made)
        yield step("score", file.case, [*perplexity, "-m", target, "--kl-divergence"], ["ppl", "kld"], scored)
