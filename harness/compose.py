"""Overrides -> configurations. The only module that knows Hydra, which is loaded when it is needed."""

import itertools
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from harness.errors import UserError, nearest

if TYPE_CHECKING:
    from harness.config import Config

GROUPS = ("model", "prompts", "calibration", "quant", "mode", "policy", "measure", "runtime")
PATH_SETTINGS = ("path", "file", "dir", "cache_dir", "imatrix", "filename")
CASE_GROUPS = ("quant", "mode", "policy")  # what makes a case; everything else is shared by a sweep
_STOP_S = 5.0
LAUNCHERS = ("ray", "submitit_local", "submitit_slurm")
DEFAULT_MODES = "mode=standard,dynamicgate"


def compose(overrides: Sequence[str]) -> list["Config"]:
    """One configuration for each combination of the overrides' values (`quant=a,b` has two).

    Raises UserError on unknown groups, options, keys and values of the wrong type.
    """
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    _register_schema()
    for one in overrides:
        if "=" not in one:
            raise UserError(f"{one!r} is no setting: write KEY=VALUE, and lists without spaces (quant=iq1_m,iq2_s)")
    choices: dict[str, list[str]] = {}
    try:
        for override in OverridesParser.create().parse_overrides([_quoted(one) for one in overrides]):
            key = override.get_key_element()
            _require_plain(override)
            if key in choices and key in GROUPS:
                raise UserError(f"{key}= is given twice: give a list, {key}=a,b")
            if override.is_sweep_override():
                choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                choices[key] = [override.input_line or ""]
        with initialize_config_dir(str(_conf_dir()), version_base="1.3"):
            return _combinations(choices)
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise UserError(_one_line(error, overrides)) from error


def _combinations(choices: dict[str, list[str]]) -> list["Config"]:
    """A configuration for each combination of values. choices: by key, its overrides, one a value.

    Hydra takes a tenth of a second for each, so a part of the configuration (`quant`, `policy`) is composed once for
    the overrides that touch it: the parts do not refer to each other.
    """
    first = {key: values[0] for key, values in choices.items()}
    base = _composed(first.values())
    part_of = {key: key.lstrip("+").split(".")[0] for key, values in choices.items() if len(values) > 1}
    if not {*part_of.values()} <= {field.name for field in fields(base)}:  # an experiment touches everything
        return [_composed(values) for values in itertools.product(*choices.values())]
    parts: dict[tuple[str, ...], Any] = {}
    configs = []
    for combination in itertools.product(*choices.values()):
        values = dict(zip(choices, combination, strict=True))
        changed = {}
        for part in dict.fromkeys(part_of.values()):
            own = {key: values[key] for key in part_of if part_of[key] == part}
            known = (part, *own.values())
            if known not in parts:
                whole = (
                    base
                    if all(first[key] == value for key, value in own.items())
                    else _composed({**first, **own}.values())
                )
                parts[known] = getattr(whole, part)
            changed[part] = parts[known]
        configs.append(deepcopy(replace(base, **changed)))  # none shares a part with another
    return configs


def _composed(overrides: Iterable[str]) -> "Config":
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    return OmegaConf.to_object(hydra_compose("config", list(overrides)))  # type: ignore[return-value]


def _require_plain(override: Any) -> None:
    """Raises UserError on forms of overrides that would silently do something else than a reader expects."""
    line, key = override.input_line, override.get_key_element()
    if override.is_sweep_override() and not override.is_discrete_sweep():
        raise UserError(f"{line}: give a list of values")
    if key.startswith(("+", "~")) and key != "+experiment":
        raise UserError(f"{line}: settings are changed, not added or removed; leave out the {key[0]}")
    value = override.value()
    if key in GROUPS and not override.is_sweep_override() and not isinstance(value, str):
        raise UserError(f"{line}: {key} wants the name of an option, or several with commas and no brackets")


def _quoted(override: str) -> str:
    """A path with characters that Hydra's grammar wants quoted, in quotes; everything else as it is."""
    key, equals, value = override.partition("=")
    name = key.rsplit(".", 1)[-1]
    if name not in PATH_SETTINGS or not equals or value[:1] in ("'", '"') or "," in value:
        return override
    return override if re.fullmatch(r"[A-Za-z0-9/._-]+", value) else f"{key}='{_escaped(value)}'"


def _escaped(value: str) -> str:
    return value.replace("'", r"\'")


def configs_of_sweep(overrides: list[str]) -> list["Config"]:
    """All cases that a sweep's overrides ask for; an experiment brings its own lists of quants and modes."""
    if has_experiment(overrides):
        lines = compose(with_quant(overrides))[0].sweep
        if not any(_has_quant(line.split()) for line in lines):
            require_quant(overrides, "this experiment")
        return [config for line in lines for config in compose([*overrides, *line.split()])]
    if not any(one.startswith("mode=") for one in overrides):
        overrides = [*overrides, DEFAULT_MODES]
    require_quant(overrides, "sweep")
    return compose(overrides)


def config_from(plain: Mapping[str, Any]) -> "Config":
    """A configuration of what `dataclasses.asdict` made of one."""
    from omegaconf import OmegaConf

    from harness.config import Config

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[return-value]


def split_launcher(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides of the launcher (hydra/launcher=..., hydra.launcher...), and the others."""
    of_launcher = [one for one in overrides if one.lstrip("+").startswith(("hydra/launcher", "hydra.launcher."))]
    for one in overrides:
        if one.lstrip("+").startswith("hydra") and one not in of_launcher:
            raise UserError(f"{one}: of Hydra's own settings only hydra/launcher= and hydra.launcher. mean something")
    return of_launcher, [one for one in overrides if one not in of_launcher]


def launcher_settings(overrides: Sequence[str], request: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the launcher that the overrides choose, resolved. request: of conf/launch.yaml.

    Raises UserError on unknown launchers and settings.
    """
    from omegaconf import OmegaConf

    with _launch_config(overrides, request) as (_, config):
        return OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[return-value]


def launch(
    overrides: Sequence[str], request: Mapping[str, Any], n_jobs: int, work: Callable[[Any], Any], at_once: int
) -> Iterator[tuple[int, Any]]:
    """The number of each job as it ends, 0 to n_jobs - 1, and what `work` returned for it (it finds the number in its
    argument's `job`), or the exception that it or the launcher raised.

    Each job is a launch of its own, in a thread that waits for it: of several in one launch, nothing would be known
    before the last one ends, and nothing at all once a worker is lost. at_once: jobs that may run at a time.
    """
    ended: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    with _launch_config(overrides, request) as (context, config):
        same, numbers, stopped = _assignments(request), iter(range(n_jobs)), Event()

        def wait_for_jobs() -> None:
            if hasattr(signal, "pthread_sigmask"):  # Ctrl-C is for this process; what it starts here ends with it
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            for i in numbers:
                if not stopped.is_set():
                    ended.put((i, _launched(context, config, work, [*same, f"job={i}"])))

        threads = [Thread(target=wait_for_jobs, daemon=True) for _ in range(min(n_jobs, at_once))]
        for thread in threads:
            thread.start()
        try:
            for _ in range(n_jobs):
                yield ended.get()
        finally:
            stopped.set()
            if any(thread.is_alive() for thread in threads) and "ray" in sys.modules:
                sys.modules["ray"].shutdown()  # its core aborts when Python ends while a thread waits for it
                for thread in threads:
                    thread.join(_STOP_S)


def _launched(context: Any, config: Any, work: Callable[[Any], Any], overrides: list[str]) -> Any:
    """What one job returned, or the exception that it or the launcher raised."""
    from hydra.core.plugins import Plugins

    try:
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=work, config=config)
        (done,) = launcher.launch([overrides], initial_job_idx=0)
    except BaseException as error:  # of Ray, of submitit: whatever they raise when a worker is lost
        return error
    # The property `return_value` would raise what the job raised.
    return done._return_value or RuntimeError(f"it ended as {done.status}")


@contextmanager
def _launch_config(overrides: Sequence[str], request: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Hydra's context and the configuration of a launch."""
    from hydra import initialize_config_dir
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import HydraContext, RunMode
    from omegaconf.errors import OmegaConfBaseException

    with warnings.catch_warnings(), initialize_config_dir(str(_conf_dir()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra
        try:
            # The launchers bring settings of the same names, whose types Hydra checks; it means to stop that some day.
            warnings.filterwarnings("ignore", r"\s*'hydra/launcher/.*is validated against ConfigStore schema")
            config = hydra.compose_config(
                "launch", [*overrides, *_assignments(request)], RunMode.MULTIRUN, with_log_configuration=False
            )
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_one_line(error, overrides)) from error
        yield HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)), config


def _assignments(request: Mapping[str, Any]) -> list[str]:
    def value(one: Any) -> str:
        return "null" if one is None else f"'{_escaped(one)}'" if isinstance(one, str) else str(one).lower()

    return [f"request.{name}={value(one)}" for name, one in request.items()]


def _register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    from harness.config import Config
    from harness.ggml_types import FILE_TYPES

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name in set(FILE_TYPES) - set(presets()):  # a preset of that name takes its place
        store.store(group="quant", name=name, node={"name": name, "file_type": name})


def _conf_dir() -> Path:
    """conf/ inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def presets() -> list[str]:
    return sorted(path.stem for path in (_conf_dir() / "quant").glob("*.yaml"))


def options(group: str) -> list[str]:
    from harness.ggml_types import FILE_TYPES

    names = {path.stem for path in (_conf_dir() / group).glob("*.yaml")}
    return sorted(names | set(FILE_TYPES) if group == "quant" else names)


def sources(group: str) -> dict[str, tuple[str, str | None]]:
    """Of each shipped model or text: where it comes from, in words, and the sha256 of the file where conf/ has it."""
    import yaml

    found: dict[str, tuple[str, str | None]] = {}
    for path in sorted((_conf_dir() / group).glob("*.yaml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        wheel, hub = data.get("wheel"), data.get("hub")
        if wheel:
            n = wheel.get("parts", 1)
            package, member = (wheel[key].format(part=1) for key in ("package", "member"))
            where = f"{member} of the Python package {package}" + (f" and {n - 1} more parts" if n > 1 else "")
            found[path.stem] = where, wheel.get("sha256")
        elif hub:
            parts = (hub.get(key) for key in ("config", "split", "filename"))
            found[path.stem] = f"{', '.join(filter(None, (hub['repo_id'], *parts)))} on the Hugging Face hub", None
    return found


def has_experiment(overrides: list[str]) -> bool:
    return any(one.lstrip("+").startswith("experiment=") for one in overrides)


def _has_quant(overrides: list[str]) -> bool:
    return any(one.startswith("quant=") for one in overrides)


def with_quant(overrides: list[str]) -> list[str]:
    """For what needs a whole configuration but no quant."""
    return overrides if _has_quant(overrides) else [*overrides, "quant=reference"]


def require_quant(overrides: list[str], verb: str) -> None:
    if not _has_quant(overrides):
        for one in overrides:
            if get_close_matches(one.partition("=")[0], ["quant"]):
                raise UserError(f"there is no setting {one.partition('=')[0]!r}. Did you mean quant?")
        raise UserError(f"{verb} needs to know what to quantize: add quant=iq1_m,iq2_s (or any of llama.cpp's types)")


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's several lines as one that names the nearest right word."""
    text = f"{error} {error.__cause__ or ''}"
    missing = re.search(r"Could not find '([\w/]+)/([^']*)'", text)
    if missing and missing[1] == "hydra/launcher":
        return f"hydra/launcher={missing[2]}: the harness knows no such one.{nearest(missing[2], LAUNCHERS)}"
    if missing and missing[1] == "experiment":
        return f"+experiment={missing[2]} is no experiment.{nearest(missing[2], options('experiment'))}"
    if missing and missing[1] in GROUPS:
        hint = nearest(missing[2], options(missing[1])) or " Such as iq1_m or q4_k_m; sweep --help lists all."
        return f"{missing[1]}={missing[2]} is no option of {missing[1]}.{hint}"
    key = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' not in", text)
    if key:
        return f"there is no setting {key[1]!r}.{nearest(key[1], setting_names())}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [one for one in overrides if "=" in one and re.search(rf"\b{re.escape(one.split('=')[0])}\b", text)]
    value = max(named, key=lambda one: len(one.split("=")[0]), default=None)
    reason = lines[0] if lines else "these settings do not fit together"
    reason = reason.removeprefix(f"Error merging override {value}").strip()
    return f"{value or ' '.join(overrides)}: {reason} (see python -m harness sweep --help)"


def setting_names() -> list[str]:
    from harness.config import Config

    def names(node: Any, prefix: str) -> list[str]:
        result = []
        for item in fields(node):
            value = getattr(node, item.name)
            path = f"{prefix}{item.name}"
            result += names(value, f"{path}.") if is_dataclass(value) else [path]
        return result

    return [*GROUPS, *names(Config(), "")]
