"""Results -> the blocks of a model card as Markdown, and the figures of its front matter. Pure."""

import html
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from harness.compare import dominators
from harness.cpu import features_text
from harness.errors import UserError
from harness.formats import markdown
from harness.frames import measured_cases
from harness.ggml_types import GGML_TYPES, UNQUANTIZED
from harness.mixture import Mixture, type_changes
from harness.plan import role_and_layer
from harness.recipes import short_entries
from harness.record import Record
from harness.results import Results
from harness.summary import key_improvements, tradeoffs
from harness.tables import Table, card_table, file_table, measured_rows, plus_minus, pure_notes, recommendation, size

# The formats of the summary table that cards of GGUF files have -> quants that are such files.
CARD_FORMATS = {
    "bf16": ("bf16",),
    "f16": ("f16",),
    "q4_k": ("q4_k", "q4_k_m", "q4_k_s"),
    "q6_k": ("q6_k", "q6_k_m"),
    "q8_0": ("q8_0",),
    "iq3_xs": ("iq3_xs",),
    "q4_0": ("q4_0",),
}
# What runs a family of formats well: facts about llama.cpp and processors, nothing that was measured here.
_HARDWARE = (
    (
        r"bf16",
        "Processors that compute in BF16 (NVIDIA since Ampere, x86 with AVX512_BF16, Arm with its BF16 extension)",
    ),
    (r"f16", "Nearly all GPUs; CPUs that convert or compute F16 (x86 with F16C, Arm since v8.2)"),
    (r"f32", "Any; twice the memory traffic of the 16-bit formats"),
    (r"q4_0|iq4_nl", "Any; on CPUs llama.cpp can rearrange it at load time for the vector units of Arm and AVX2"),
    (r"iq\d.*", "CPU or GPU; weights go through a lookup table, which costs CPUs more time than K types do"),
    (r"tq\d_0", "CPU or Vulkan, no CUDA; made for models that were trained with ternary weights"),
    (r"q\d_k.*", "CPU or GPU, all the usual back ends of llama.cpp"),
    (r"q\d_[01]", "CPU or GPU, all the usual back ends; simple blocks of 32 weights"),
)
_NOT_MEASURED = "not measured"
# Findings about the folder of results or about choosing a file, which the table of files tells already.
_NOT_FOR_READERS = frozenset({"dominated", "not_timed", "rules_for_other_models", "unreadable_record"})


@dataclass(frozen=True)
class Offer:
    """What a card is about: the results of the files to offer, the name in front of theirs, and the names of the
    shipped options of conf/ by group (model, prompts, calibration, policy, and of quant the presets), for the commands;
    sources: by group and option where its file comes from, in words, and its sha256 where that is known.
    """

    results: Results
    name: str
    shipped: Mapping[str, Collection[str]]
    sources: Mapping[str, Mapping[str, tuple[str, str | None]]] = field(default_factory=dict)

    @cached_property
    def measured(self) -> tuple[Record, ...]:
        """`offered`, the reference among them."""
        return offered(self.results)

    @property
    def variants(self) -> list[Record]:
        """The measured files, without the reference."""
        return [record for record in self.measured if record.data["mode"] != "reference"]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """Their rows; only an offered file dominates another."""
        runs = self.results.runs
        runs = runs[runs.name.isin(self._names) & (runs.status == "ok")].copy()
        better = dominators([case for case in measured_cases(self.measured) if case.mode != "reference"])
        runs["dominated_by"] = runs.name.map(better).astype(object)
        return runs

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """Their rows. Speeds stay where both sides of a row were timed in one pass."""
        comparison = self.results.comparison
        comparison = comparison[comparison.dg_name.isin(self._names) | comparison.dg_name.isna()].copy()
        passes = dict(zip(self.runs.name, self.runs.speed_pass, strict=True))
        for row in comparison.index:
            both = [passes.get(comparison.at[row, column]) for column in ("std_name", "dg_name")]
            if not isinstance(both[0], str) or both[0] != both[1]:
                comparison.loc[row, ["std_speed_s", "dg_speed_s"]] = None
        return comparison

    @cached_property
    def speed(self) -> pd.DataFrame:
        """Their rows."""
        speed = self.results.speed
        return speed[speed.name.isin(self._names)] if len(speed) else speed

    @cached_property
    def _names(self) -> set[str]:
        return {record.name for record in self.measured}

    def file(self, case: str) -> str:
        """Name of a case's file."""
        return f"{file_name(self.name)}-{file_name(case)}.gguf"


def offered(results: Results) -> tuple[Record, ...]:
    """The records without placebos and the parts of an attribution: they test a policy, and are not files to offer.

    Raises UserError when nothing was measured.
    """
    measured = tuple(record for record in results.measured if _is_offered(record))
    if not any(record.data["mode"] != "reference" for record in measured):
        raise UserError("these results hold no measured file to write a card about: run a sweep with quants first")
    return measured


def comparison_block(offer: Offer) -> str:
    """Standard beside DynamicGate, with a key and what it shows beyond noise."""
    table = offer.comparison
    if table.std_name.isna().all() or table.dg_name.isna().all():
        return "No file type was measured both with llama.cpp's own mixture and with DynamicGate."
    timed = bool(table.dg_speed_s.notna().any())
    speed = (
        "Speed: seconds to run the prompt set once, at the median speed of a timing pass on the CPU; lower is better"
        if timed
        else "Speed: not measured"
    )
    improvements = key_improvements(table) or ["No perplexity is lower beyond noise"]
    return _paragraphs(
        markdown(_escaped(card_table(table))),  # the key below has its notes
        "Key:",
        _bullets(
            [
                "PPL: perplexity, lower is better; ± one standard error, with tokens taken as independent",
                "Δ PPL: change from standard to DynamicGate on the same tokens; [a, b]: its 95 % interval",
                speed,
                "Size: of the file; G and M are binary (2^30 and 2^20 bytes)",
                *pure_notes(offer.runs),
                _text_said(offer),
            ]
        ),
        "Key Improvements:",
        _bullets(improvements),
        "Tradeoffs:",
        _bullets([*tradeoffs(table, offer.runs, offer.speed), *_control_sentences(offer.runs)]),
    )


def files_block(offer: Offer) -> str:
    """Every file with its figures, and which of its tensors have which type."""
    runs = offer.runs
    stems = {name: offer.file(name).removesuffix(".gguf") for name in runs.name}
    better = pd.Series([_named(one, offer) for one in runs.dominated_by], index=runs.index, dtype=object)
    named = runs.assign(name=runs.name.map(stems), dominated_by=better)
    return _paragraphs(
        markdown(_escaped(file_table(measured_rows(named)))),
        "bpw: bits per weight over all tensors. Mean KLD: KL divergence from the reference, in nats; lower is better. "
        + md(". ".join([_text_said(offer), *pure_notes(offer.runs)])),
        "\n".join(f"- {code(offer.file(record.name))}: {_types_text(record)}" for record in offer.variants),
    )


def formats_block(offer: Offer) -> str:
    """Which format to take: measured figures where there are any, and what hardware the format wants."""
    runs = offer.runs.astype(object).where(offer.runs.notna(), None).to_dict("records")
    timed = any(row["prompt_tokens_per_s"] is not None for row in runs)
    reference = offer.measured[0].data["reference"]
    for row in runs:
        row["format"] = row["quant"]
        if row["mode"] == "reference":
            row["format"] = row["file_type"] = reference["file_type"]
            row["mixture"] = (reference["file_type"] or "unknown").upper()
    rest = sorted(runs, key=lambda row: (row["mode"] != "reference", -row["file_bytes"]))
    lines: list[tuple[str, ...]] = []
    for name, types in CARD_FORMATS.items():
        same = [row for row in rest if row["format"] in types and row["mode"] in ("standard", "reference")]
        rest = [row for row in rest if row not in same]
        lines += [_format_row(row, offer, timed, name) for row in same]
        if not same:
            absent = (name.upper(), _NOT_MEASURED, _NOT_MEASURED, *([_NOT_MEASURED] if timed else []))
            lines.append((*absent, _hardware(name), _NOT_MEASURED))
    lines += [_format_row(row, offer, timed) for row in rest]
    header = ("Model Format", "Precision", "Memory Usage", *(["Speed"] if timed else []))
    table = Table("Formats", (*header, "Device Requirements", "Best Use Case"), lines)
    key = [
        "Precision: perplexity and mean KL divergence from the reference, both better when lower. Memory: of the file; "
        "the context comes on top."
    ]
    if timed:
        where = _timed_on(offer) or " on the CPU named under the method"
        key.append(f"Speed: tokens/s{where}, of the prompt and of generation.")
    variants = sorted((row for row in runs if row["mode"] != "reference"), key=lambda row: -row["file_bytes"])
    kept = [offer.file(row["name"]) for row in variants if row["dominated_by"] is None]
    key.append(
        f"No measured file that is no larger has a lower perplexity, beyond noise, than {', '.join(map(code, kept))}: "
        "of these, take the largest that fits into your memory."
        if len(kept) > 1
        else f"The file to take of those measured: {code(kept[0])}."
    )
    key += map(md, pure_notes(offer.runs))
    return _paragraphs(markdown(_escaped(table)), " ".join(key))


def method_block(offer: Offer) -> str:
    """How it was measured: inputs with their checksums, settings, machine, commands, and what to know."""
    data = offer.measured[0].data
    reference, prompts, settings, versions = (
        data[name] for name in ("reference", "prompt_set", "settings", "versions")
    )
    environment, n_tokens = data["environment"], prompts["window_tokens"]
    scored = n_tokens - settings["first_scored"]
    calibration, features = _calibration(offer), features_text(environment)
    commit = f", commit {environment['commit']}" if environment.get("commit") else ""
    machine = [
        environment.get("cpu"),
        f"llama.cpp uses {features}" if features else None,
        f"{environment.get('cores_physical')} cores, {settings['threads']} threads",
        f"{size(environment.get('memory_bytes'))} memory",
        environment.get("platform"),
    ]
    facts = {
        "Reference": f"{reference['name']} {(reference['file_type'] or '').upper()}, {size(reference['file_bytes'])}; "
        f"sha256 of its source {reference['source_sha256']}" + _origin("model", reference["name"], offer, reference),
        "Text": f"{prompts['name']}, its first {prompts['n_windows']} windows of {n_tokens} tokens; sha256 of the text "
        f"{prompts['text_sha256']}" + _origin("prompts", prompts["name"], offer, prompts),
        "Prompt set": f"id {prompts['id']} (sha256 of the token ids); the same for every file",
        "PPL": f"exp of the mean negative log-likelihood of the last {scored} tokens of every window, each window from "
        "an empty context",
        "KLD": "KL(reference || file) over the whole vocabulary, mean over the same tokens, in nats",
        "Noise": "95 % intervals of paired differences from a bootstrap over blocks of tokens; a change is named "
        "when it holds after Holm's adjustment over the rows of the table. All of it speaks about this text only",
        "imatrix": _imatrix_text(calibration, offer),
        "Software": f"gguf-harness {environment.get('harness')}{commit}; llama-cpp-python "
        f"{versions['llama_cpp_python']}; {settings['ubatch_tokens']} tokens at a time, flash attention "
        f"{'on' if settings.get('flash_attention', True) else 'off'}",
        "Machine": "; ".join(str(one) for one in machine if one),
        "Speed": f"a timing pass of its own{_timed_on(offer)}, every file in turn, several rounds; the median counts"
        if len(offer.speed)
        else _NOT_MEASURED,
    }
    notes = _findings(offer)
    return _paragraphs(
        "\n".join(f"- {name}: {md(text)}" for name, text in facts.items()),
        "To repeat it:",
        _fence(_commands(offer)),
        *(("What to know about these figures:", _bullets(notes)) if notes else ()),
    )


def recipes_block(offer: Offer) -> str:
    """Of every file the llama-quantize command that gives each tensor its type, folded away."""
    reference = offer.measured[0].data["reference"]
    stem, kind = file_name(reference["name"]), reference["file_type"] or "f16"
    source = f"{stem}.gguf" if stem.lower().endswith(kind) else f"{stem}-{kind}.gguf"
    parts = [
        "Each file can be made with llama.cpp alone: the patterns name every tensor, taken from the written file. The "
        "imatrix is the one described under the method."
    ]
    for record in offer.variants:
        imatrix = ["--imatrix imatrix.gguf"] if record.data.get("calibration") else []
        options = [*imatrix, *(f"--tensor-type {shlex.quote(one)}" for one in tensor_types(record))]
        names = f"{source} {offer.file(record.name)} {(record.data['file_type'] or '').upper()}"
        command = " \\\n  ".join(["llama-quantize", *options, names])
        parts.append(f"<details>\n<summary>{html.escape(offer.file(record.name))}</summary>")
        parts += [_fence(command), "</details>"]
    return _paragraphs(*parts)


BLOCKS: dict[str, Callable[[Offer], str]] = {
    "comparison": comparison_block,
    "files": files_block,
    "formats": formats_block,
    "method": method_block,
    "recipes": recipes_block,
}


def tensor_types(record: Record) -> list[str]:
    """`pattern=type` of all tensors that llama.cpp quantizes, as --tensor-type takes it: anchored and escaped, because
    patterns are searched for. Norms and biases, which stay F32, have none.

    Raises UserError on names that a pattern or a shell would not take as they are.
    """
    tensors = record.data["variant"]["tensors"].items()
    types = {name: one["type"] for name, one in tensors if not one["type"] == one["standard"] == "f32"}
    try:
        return short_entries(types)
    except UserError as error:
        raise UserError(f"{record.path}: {error}") from error


def figures(offer: Offer) -> list[dict[str, Any]]:
    """PPL and mean KLD of every file, rounded, as the keyword arguments of huggingface_hub's EvalResult."""
    prompts = offer.measured[0].data["prompt_set"]
    shared = {
        "task_type": "text-generation",
        "dataset_type": str(prompts["name"]),
        "dataset_name": f"{prompts['name']}, {prompts['n_windows']} windows of {prompts['window_tokens']} tokens",
        "dataset_args": {"prompt_set_id": prompts["id"]},
    }
    found = []
    for row in offer.runs.to_dict("records"):
        if row["mode"] == "reference":
            continue
        file = offer.file(row["name"])
        for kind, words, value, error, digits in (
            ("perplexity", "Perplexity", row["ppl"], row["ppl_se"], 4),
            ("kl_divergence", "Mean KL divergence from the reference in nats", row["kld_mean"], row["kld_se"], 6),
        ):
            if pd.isna(value):
                continue
            arguments: dict[str, Any] = {"file": file}
            if not pd.isna(error):
                arguments["standard_error"] = round(float(error), digits)
            metric = {"metric_type": kind, "metric_name": f"{words}, {file}", "metric_args": arguments}
            found.append({**shared, **metric, "metric_value": round(float(value), digits)})
    return found


def has_imatrix(offer: Offer) -> bool:
    """Whether every file was made with an imatrix."""
    return all(record.data.get("calibration") for record in offer.variants)


def md(text: object) -> str:
    """Text that stays text in Markdown and HTML: one line, no tags, no emphasis, no links."""
    line = re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(text))
    line = re.sub(r"([\\`*~])", r"\\\1", html.escape(line, quote=False))
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)
    return line.replace("](", "]&#40;").replace("][", "]&#91;")


def code(name: str) -> str:
    """A name as a code span."""
    return f"`{file_name(name)}`"


def file_name(text: str) -> str:
    """`text` with everything replaced that a file name, a shell or Markdown could take for something else."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).lstrip("-.") or "unnamed"


def _is_offered(record: Record) -> bool:
    return not record.data["mode"].startswith("placebo") and "_without_" not in (record.data["policy"] or "")


def _escaped(table: Table) -> Table:
    return Table(table.title, tuple(map(md, table.header)), [tuple(map(md, row)) for row in table.rows])


def _text_said(offer: Offer) -> str:
    prompts = offer.measured[0].data["prompt_set"]
    return (
        f"Measured on the text {prompts['name']} (sha256 {prompts['text_sha256'][:12]}), "
        f"{prompts['n_windows']} windows of {prompts['window_tokens']} tokens, the same for every file"
    )


def _timed_on(offer: Offer) -> str:
    """Where it was, unless on the machine that the method names."""
    cpu = offer.results.timed_passes[-1].environment.get("cpu")
    return f" on {cpu}" if cpu and cpu != offer.measured[0].data["environment"].get("cpu") else ""


def _named(case: object, offer: Offer) -> str | None:
    return offer.file(case) if isinstance(case, str) else None


def _control_sentences(runs: pd.DataFrame) -> list[str]:
    """What was and was not settled about the gain: more bytes, or the choice of layers?"""
    words = {"wins": "better than", "ties": "no better than", "loses": "worse than"}
    found = []
    alone = runs[~runs["mode"].isin(("standard", "reference")) & runs.verdict.isna()]["name"]
    if len(alone):
        found.append(f"Not compared at equal size, for want of standard files of about their size: {', '.join(alone)}")
    for verdict, word in words.items():
        names = runs[runs.vs_placebo == verdict]["name"]
        if len(names):
            found.append(f"{', '.join(names)}: {word} a file with the same types on other layers (a placebo)")
    return found


def _types_text(record: Record) -> str:
    variant = record.data["variant"]
    tensors = variant["tensors"]
    embedding, output = ((variant[name] or "none").upper() for name in ("embedding_type", "output_type"))
    tied = not any(name.startswith("output.") for name in tensors)
    parts = [f"embeddings and output (one tensor) {embedding}" if tied else f"embeddings {embedding}, output {output}"]
    mixture = Mixture.from_json(record.data["mixture"]) if record.data.get("mixture") else None
    if mixture and mixture.is_preset:
        standard = {name: kind for name, one in tensors.items() if (kind := one["standard"]) in GGML_TYPES}
        changes = [(role_and_layer(n)[0], kind, standard[n]) for n, kind in mixture.plain if n in standard]
        unlike = f"; unlike llama.cpp's {mixture.plain_file_type.upper()}: {type_changes(changes)}" if changes else ""
        parts.insert(0, f"{mixture.words}{unlike}")
    roles: dict[str, Counter[str]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"blk\.\d+\.(.+?)(?:\.weight)?", name)
        if found and not tensor["type"] == tensor["standard"] == "f32":
            roles.setdefault(found[1], Counter())[tensor["type"].upper()] += 1
    alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for role, counts in roles.items():
        alike.setdefault(tuple(counts.most_common()), []).append(role)
    layers = [
        f"{', '.join(names)} {' and '.join(f'{n} × {kind}' for kind, n in counts)}" for counts, names in alike.items()
    ]
    if layers:
        parts.append(f"layers: {'; '.join(layers)}")
    raised, lowered = variant.get("n_raised") or 0, variant.get("n_lowered") or 0
    if record.data["mode"] != "standard":
        parts.append(f"{raised} tensors with more bits than in the standard file, {lowered} with fewer")
    return md(". ".join(part[0].upper() + part[1:] for part in parts)) + "."


def _format_row(row: Mapping[Any, Any], offer: Offer, timed: bool, card_format: str = "") -> tuple[str, ...]:
    is_reference = row["mode"] == "reference"
    name = (row["format"] or "unknown").upper()
    made = [] if row["mixture"] == name else [row["mixture"].removeprefix(f"{name}, ")]
    if card_format and card_format.upper() != name:
        name, made = card_format.upper(), [name, *made]
    label = f"{name} ({', '.join(made)})" if made else name
    if row["mode"] not in ("standard", "reference"):
        policy = row["policy"] if row["policy"] not in (None, "dynamicgate") else None
        label += f" DynamicGate{f' ({policy})' if policy else ''}"
    precision = f"PPL {plus_minus(row['ppl'], row['ppl_se'])}"
    if row["kld_mean"] is not None and not is_reference:
        precision += f", KLD {plus_minus(row['kld_mean'], row['kld_se'])}"
    speed = []
    if timed:
        speeds = (row["prompt_tokens_per_s"], row["generate_tokens_per_s"])
        speed = [_NOT_MEASURED if None in speeds else f"{speeds[0]:.1f} and {speeds[1]:.1f} tokens/s"]
    advice = recommendation({**row, "dominated_by": _named(row["dominated_by"], offer)})
    if is_reference:
        derived = offer.measured[0].data["reference"].get("derived_from")
        advice = "the reference, to quantize again" if not derived else f"the reference, made from {derived.upper()}"
    return label, precision, size(row["file_bytes"]), *speed, _hardware(row["file_type"], row["output_type"]), advice


def _hardware(file_type: str | None, output_type: str | None = None) -> str:
    """What runs the layers well, and the output where that was kept at 16 bits."""
    kinds = [file_type or "", *([output_type] if output_type in UNQUANTIZED and file_type not in UNQUANTIZED else [])]
    texts = [
        next((text for pattern, text in _HARDWARE if re.fullmatch(pattern, kind or "")), "CPU or GPU") for kind in kinds
    ]
    return "; for the output: ".join(texts)


def _calibration(offer: Offer) -> dict[str, Any] | None:
    return next((r.data["calibration"] for r in offer.measured if r.data.get("calibration")), None)


def _origin(group: str, name: str, offer: Offer, data: Mapping[str, Any]) -> str:
    """'; from ...': where a shipped option's file comes from, if these are its bytes; '' for a file of one's own."""
    where, sha256 = offer.sources.get(group, {}).get(name, ("", None))
    measured = data.get("source_sha256") or data.get("text_sha256")
    return f"; from {where}" if where and (sha256 is None or measured in (None, sha256)) else ""


def _imatrix_text(calibration: Mapping[str, Any] | None, offer: Offer) -> str:
    """What it was made of, or which ready file it is."""
    if calibration is None:
        return "none"
    if not calibration["n_windows"]:
        return f"the ready file {calibration['name']}, sha256 {calibration['id']}"
    windows = f"{calibration['n_windows']} windows of {calibration['window_tokens']} tokens"
    return f"of the text {calibration['name']}, its first {windows}" + _origin(
        "calibration", calibration["name"], offer, calibration
    )


def _commands(offer: Offer) -> str:
    """Sweeps that measure the same files and placebos again, one a policy; then llama.cpp's own tool on one file."""
    data = offer.measured[0].data
    prompts, settings = data["prompt_set"], data["settings"]
    calibration = _calibration(offer)
    half = prompts["window_tokens"] // 2 + 1
    shared = [
        _source("model", data["reference"]["name"], ".gguf", offer),
        _source("prompts", prompts["name"], ".txt", offer),
        f"prompts.n_windows={prompts['n_windows']} prompts.window_tokens={prompts['window_tokens']}",
        _calibration_setting(calibration, offer),
        *_calibration_windows(calibration),
        *([f"measure.first_scored={settings['first_scored']}"] if settings["first_scored"] != half else []),
        *([f"measure.kld_reference={settings['kld_reference']}"] if settings.get("kld_reference") else []),
        f"measure.ubatch_tokens={settings['ubatch_tokens']} "
        f"measure.flash_attention={str(settings.get('flash_attention', True)).lower()} "
        f"runtime.threads={settings['threads']}",
    ]
    groups: dict[tuple[str, str | None], list[str]] = {}
    for record in (*offer.variants, *_placebos(offer)):
        _, mode, policy = record.label
        groups.setdefault((mode, policy), []).append(_quant_setting(record, offer))
    by_quants: dict[tuple[str, ...], list[tuple[str, str | None]]] = {}
    for group, of_group in groups.items():
        listed = tuple(one for one in of_group if " " not in one)
        for quants in ([listed] if listed else []) + [(one,) for one in of_group if " " in one]:
            by_quants.setdefault(quants, []).append(group)
    lines = []
    for quants, modes in by_quants.items():
        plain = [mode for mode, policy in modes if policy in (None, "dynamicgate")]
        commands = [f"mode={','.join(map(file_name, plain))}"] if plain else []
        commands += [
            f"mode={file_name(mode)} {_source('policy', policy, '.yaml', offer)}"
            for mode, policy in modes
            if policy not in (None, "dynamicgate")
        ]
        for command in commands:
            lines.append(" \\\n  ".join([f"python -m harness sweep quant={','.join(quants)} {command}", *shared]))
    if settings["first_scored"] == half:
        window, file = prompts["window_tokens"], offer.file(offer.variants[0].name)
        lines += [
            "# the same perplexity with llama.cpp's own tool",
            f"llama-perplexity -m {file} -f {file_name(prompts['name'])}.txt -c {window} -b {window} "
            f"--chunks {prompts['n_windows']}",
        ]
    return "\n".join(lines)


def _quant_setting(record: Record, offer: Offer) -> str:
    """What to write after quant= for this record's mixture: its name, and more where that means something else."""
    data = record.data.get("mixture")
    name, file_type = file_name(record.data["quant"]), file_name(record.data["file_type"] or "")
    mixture = Mixture.from_json(data) if data else Mixture(file_type, plain_file_type=file_type)
    is_plain_name = name == file_type and not mixture.is_preset
    shipped = name in offer.shipped.get("quant", ())
    if is_plain_name != shipped:
        return name
    settings = [f"quant.name={name}", f"quant.file_type={mixture.file_type}"]
    settings += [f"quant.embedding_type={mixture.embedding_type or 'null'}"]
    settings += [f"quant.output_type={mixture.output_type or 'null'}", f"quant.pure={str(mixture.pure).lower()}"]
    return " ".join([mixture.file_type, *settings])


def _placebos(offer: Offer) -> list[Record]:
    """What the offered files were compared with; of the parts of an attribution the card says nothing."""
    return [
        record
        for record in offer.results.measured
        if record.data["mode"].startswith("placebo") and "_without_" not in (record.data["policy"] or "")
    ]


def _calibration_setting(calibration: Mapping[str, Any] | None, offer: Offer) -> str:
    if calibration is None:
        return "calibration=none"
    if not calibration["n_windows"]:
        return f"calibration.imatrix={file_name(calibration['name'])}"
    return _source("calibration", calibration["name"], ".txt", offer)


def _calibration_windows(calibration: Mapping[str, Any] | None) -> list[str]:
    if not calibration or not calibration["n_windows"]:
        return []
    windows, n_tokens = calibration["n_windows"], calibration["window_tokens"]
    return [f"calibration.n_windows={windows} calibration.window_tokens={n_tokens}"]


def _source(group: str, name: str, suffix: str, offer: Offer) -> str:
    """The option of conf/ with that name, or a file of the reader's own."""
    if name in offer.shipped.get(group, ()):
        return f"{group}={name}"
    for kind, ending in (("recipe", ".txt"), ("like", ".gguf")) if group == "policy" else ():
        if name.startswith(f"{kind}_"):
            return f"policy={kind} policy.file={file_name(name.removeprefix(f'{kind}_'))}{ending}"
    return f"{group}.{'file' if group == 'policy' else 'path'}={file_name(name)}{suffix}"


def _findings(offer: Offer) -> list[str]:
    """What was found about the offered files, each thing once."""
    names = {record.name for record in offer.measured}
    seen: dict[tuple[str, str], list[str]] = {}
    for name, findings in offer.results.findings.items():
        if name in names or name == "all":
            for finding in findings:
                if finding["kind"] not in _NOT_FOR_READERS:
                    seen.setdefault((finding["what"], finding["why"]), []).append(name)
    lines = []
    for (what, why), cases in seen.items():
        everywhere = cases == ["all"] or len(cases) == len(names)
        lines.append(f"{what}; {why}" if everywhere else f"{', '.join(cases)}: {what}; {why}")
    return lines


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {md(sentence)}" for sentence in sentences)


def _fence(text: str) -> str:
    return f"```sh\n{text}\n```"


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
