"""The verbs of the command line."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from harness.compose import (
    CASE_GROUPS,
    GROUPS,
    compose,
    configs_of_sweep,
    has_experiment,
    options,
    presets,
    require_quant,
    setting_names,
    split_launcher,
    with_quant,
)
from harness.errors import EngineError, UserError, disk_error, nearest
from harness.paths import cache_dir, user_path

if TYPE_CHECKING:  # heavy at run time: --help must answer at once
    from harness.config import Config
    from harness.sweep import Sweep

HELP = """usage: python -m harness VERB [key=value ...]

Measures what quantizing a GGUF model costs: perplexity, size and CPU speed against its reference.

verbs
  sweep    quantize, measure and compare: every quant in both modes, and the reference
  plan     show the type of every tensor, the file's bytes and the time, and do nothing
  compare  two measured cases on the same tokens: difference, interval, what this much text can resolve
  report   tables in all formats, plots and one page from finished sweeps, without llama.cpp: report results=DIR
  card     the marked blocks and the metadata of a model card from finished sweeps: card CARD.md results=DIR
  audit    a published table in a model card or CSV: what is wrong, missing, or lost at equal size
  convert  safetensors to GGUF, with the converter of the same llama.cpp: convert FOLDER out=FILE.gguf
  cache    what the cache holds and how much of it: cache; prune=5GB or prune=all removes quantized tensors
  doctor   show versions, CPU features, memory, disk, cache, and whether the default inputs can be had

overrides that matter (any value may be a list a,b,c; `python -m harness sweep --help` shows all groups)
  quant=iq1_m,iq2_s            file types of llama.cpp, lower case, and presets (bf16-q8_0, q4_k_l, ...)
  mode=standard,dynamicgate    both are the default of a sweep, dynamicgate of plan; placebo: its types elsewhere
  model=smollm2_135m           or model.path=FILE.gguf, or model.hub.repo_id=... model.hub.filename=...
  prompts=wiki_sample          or prompts.path=FILE; prompts.n_windows=16 for smaller errors
  +experiment=ladder_ultra_low the standard ladder around 1 and 2 bits and DynamicGate on it, instead of quant=
  +experiment=card_files       the named files of published cards, which `card` then lists
  +experiment=attribution      what each rule of the policy saves, for the bytes it costs; with quant=...
  calibration=c4_sample        text of the imatrix; or calibration.path=FILE, calibration=none
  policy=dynamicgate           what the mode dynamicgate applies; or policy.file=RULES.yaml, or policy=recipe
                               policy.file=RECIPE.txt, or policy=like policy.file=OTHER.gguf (its types)
  measure.speed=false          leave out the timing pass; measure.layers=true: compare every layer with the reference
  runtime.threads=2            default: the physical cores; runtime=card_cpu: 6 threads and AVX2, as published cards say
  results.dir=results          where results go; results.name=NAME for the folder in it
  hydra/launcher=ray           give the cases to a Ray cluster; submitit_slurm: to a SLURM queue (docs/scaling.md)

examples
  python -m harness sweep quant=iq1_m,iq2_s
  python -m harness plan quant=iq1_m mode=dynamicgate        (--json for programs; --recipe, --tensor-type-file)
  python -m harness compare iq1_m-dynamicgate iq1_m-standard
  python -m harness card CARD.md results=results/NAME        (--new for a whole card, --check before an upload)
  python -m harness audit CARD.md                            (or TABLE.csv; --json for programs)
  python -m harness sweep model.path=my-f16.gguf quant=iq2_xs,iq2_s,q2_k prompts.n_windows=16

exit codes: 0 done, 1 a case or a disk failed, 2 bad input, 130 stopped (the same command goes on where it was)
"""

AUDIT_HELP = """usage: python -m harness audit CARD.md|TABLE.csv [--json]

Reads the comparison tables (type, perplexity, size, speed) of a model card or a CSV file, recomputes what can be
recomputed, and prints what is wrong, what is missing, what a standard file of the same size would beat, and which
sentences of the card its table contradicts. A table about Llama 3 8B is also compared with published boards.

exit codes: 0 read, whatever was found; 2 no file, or no such table in it
"""

CARD_HELP = """usage: python -m harness card CARD.md results=DIR [results=DIR2 ...] [--check | --new] [key=value ...]

Makes the marked blocks of a model card and its metadata anew from finished sweeps, and leaves every other byte alone.
A block stands between two lines of their own, <!-- harness:NAME --> and <!-- /harness:NAME -->, where NAME is one of
comparison, files, formats, method, recipes. The same results always give the same card.

  --check                  write nothing; say which parts of the card are stale
  --new                    make a whole new card with every block
  base_model=OWNER/NAME    of the hub: what was quantized; stays in the card once it is there
  quantized_by=NAME        stays in the card once it is there
  name=MODEL               in front of the files' names; default: as in the card's model-index, else the reference's
  allow_different=FIELD    as in `report`

exit codes: 0 written or current, 1 stale (--check), 2 bad input; a card is written whole or not at all
"""

REPORT_HELP = """usage: python -m harness report [results=DIR ...] [out=DIR] [allow_different=FIELD ...]

Writes tables in all formats (Markdown, HTML, LaTeX, CSV, Parquet), plots (PNG, SVG) and one HTML page from finished
sweeps. It reads records only and needs no llama.cpp.

  results=DIR              folder of a sweep (it has records/), also several; default: the only one in results/
  out=DIR                  where to write; default: DIR/report; needed with several sweeps
  allow_different=FIELD    rows may differ in FIELD, and a finding says so; also a list a,b:
                           {may_differ}

exit codes: 0 written, 1 a disk or a process that draws failed, 2 bad input
"""

CONVERT_HELP = """usage: python -m harness convert FOLDER [out=FILE.gguf] [type=bf16] [runtime.cache_dir=DIR]

Makes a GGUF of a folder with config.json, the tokenizer and *.safetensors, with the converter of the llama.cpp that the
harness measures with. FP8 checkpoints are multiplied by their scales. Needs the extra: pip install -e '.[convert]'.

  out=FILE.gguf   default: FOLDER-bf16.gguf in this folder; nothing is overwritten
  type=bf16       or f16, f32

exit codes: 0 written, 1 llama.cpp's converter refuses the model, 2 bad input
"""

CACHE_HELP = """usage: python -m harness cache [prune=SIZE|all] [runtime.cache_dir=DIR]

Shows the cache by kind, its largest files, and the quantized tensors that were not used for longest. Whatever lies in
it can be made again; while no sweep runs, its folders may be deleted.

  prune=SIZE             remove quantized tensors, the least recently used first, until SIZE is left (5GB, 5GiB, 300MB,
                         0)
  prune=all              remove all of them
  runtime.cache_dir=DIR  default: the user's cache folder

How many tensors sweeps keep: runtime.tensor_cache_gb=20 (0 keeps none).

exit codes: 0 done, 2 bad input
"""

USAGE = {
    "compare": "compare CASE CASE [results=DIR] [key=value ...]\n\n"
    "CASE: a name in the tables (iq1_m-dynamicgate) or the path of a record.",
    "plan": "plan quant=... [mode=dynamicgate] [--json | --recipe | --tensor-type-file] [key=value ...]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what the terminal's encoding lacks is no reason to lose a table
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb, *rest = arguments or ["--help"]
    verbs = {
        "sweep": _sweep,
        "plan": _plan,
        "compare": _compare,
        "report": _report,
        "card": _card,
        "audit": _audit,
        "convert": _convert,
        "cache": _cache,
        "doctor": _doctor,
    }
    signal.signal(signal.SIGTERM, _stop)
    try:
        if verb in ("-h", "--help", "help"):
            print(HELP, end="", flush=True)
            return 0
        if verb not in verbs:
            raise UserError(f"there is no verb {verb!r}.{nearest(verb, verbs)}")
        if "-h" in rest or "--help" in rest:
            print(_verb_help(verb), end="", flush=True)
            return 0
        code = verbs[verb](rest)
        if sys.stdout:  # None where the caller closed it
            sys.stdout.flush()
        return code
    except UserError as error:
        _say(f"error: {error}")
        return 2
    except EngineError as error:  # of what a whole sweep stands on; a failed case is recorded and the sweep goes on
        _say(f"error: {error.with_log}")
        return 1
    except BrokenPipeError:  # the reader of a pipe went away, as `| head` does
        _forget_output()
        return 1
    except OSError as error:  # a full disk, a folder that refuses: no other case would fare better
        _say(f"error: {disk_error(error)}")
        if not error.filename:
            _forget_output()
        return 1
    except KeyboardInterrupt:
        _say("stopped; what was measured is kept, the same command goes on from there")
        return 130


def _open_standard_streams() -> None:
    """A caller may have closed them: then pipes to children would get their numbers."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _say(text: str) -> None:
    """To stderr, if it takes it: the exit code tells the rest."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _forget_output() -> None:
    """What could not be written to stdout: Python would try again at its end."""
    with suppress(OSError, AttributeError):  # it may be closed, or be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sweep(overrides: list[str]) -> int:
    from rich.console import Console

    from harness.apart import run_apart
    from harness.config import parse_shard
    from harness.launchers import launcher_name
    from harness.plan_view import sweep_summary
    from harness.progress import ProgressDisplay
    from harness.record import RECORDS
    from harness.report import write_report

    console = Console()
    of_launcher, overrides = split_launcher(overrides)
    launcher = launcher_name(of_launcher)
    groups = _by_inputs(configs_of_sweep(overrides))
    shard = groups[0][0].measure.shard
    if shard and parse_shard(shard, groups[0][0].prompts.n_windows)[0] is None and not launcher:
        raise UserError(f"measure.shard={shard} needs hydra/launcher=ray or another; here give one part, such as 1/4")
    sweeps = [_prepare(group) for group in groups]
    for i, sweep in enumerate(sweeps):
        if sweep.folder in [other.folder for other in sweeps[:i]]:
            raise UserError(
                f"a list of settings other than quant, mode and policy asks for two sweeps in one folder "
                f"({sweep.folder}): run them one by one, each with a results.name of its own"
            )
    failures: list[str] = []
    # Everything is checked for every group of inputs before the first of them is measured.
    for group, sweep in zip(groups, sweeps, strict=True):
        console.print(f"{sweep.reference.name} -> {sweep.folder}", highlight=False, markup=False, soft_wrap=True)
        console.print(sweep_summary(sweep), highlight=False, markup=False)
        with ProgressDisplay(console, sweep.estimate_s) as display:
            failures += run_apart(sweep, group, of_launcher, display)
        if sweep.config.measure.shard and not any(case.done for case in sweep.cases):
            print(_shard_text(sweep))
            continue
        if failures and not any((sweep.folder / RECORDS).glob("*.json")):
            continue  # every job was lost: the failures tell it
        allowed = sweep.config.results.allow_different
        report = write_report(sweep.folder, [case.key for case in sweep.cases], allowed)
        print(f"\n{report.text}")
        print("written:", *report.paths, sep="\n  ")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _shard_text(sweep: "Sweep") -> str:
    return (
        f"part {sweep.config.measure.shard} of the windows is scored; when all parts are in one cache "
        f"({sweep.cache.folder / 'scores'}), the same command without measure.shard makes the records of them"
    )


def _plan(arguments: list[str]) -> int:
    from harness.plan_view import disk_lines, estimate_s, plan_json, plan_text
    from harness.recipes import recipe_text

    forms = ("--json", "--recipe", "--tensor-type-file")
    for argument in arguments:
        if argument.startswith("--") and argument not in forms:
            raise UserError(f"plan has no {argument}.{nearest(argument, forms)}")
    given = [argument for argument in arguments if argument in forms]
    if len(given) > 1:
        raise UserError(f"plan prints one thing: give one of {', '.join(given)}")
    overrides = [argument for argument in arguments if argument not in forms]
    if has_experiment(overrides):
        configs = configs_of_sweep(overrides)
    else:
        require_quant(overrides, "plan")
        configs = compose(overrides)
    as_recipe = given in (["--recipe"], ["--tensor-type-file"])
    if as_recipe and (len(configs) != 1 or configs[0].quant.file_type is None):
        raise UserError(f"{given[0]} is of one quantized file: give one quant and one mode, not {' '.join(overrides)}")
    shown = [
        (sweep, case.plan)
        for group in _by_inputs(configs)
        for sweep in [_prepare(group, with_reference=False)]
        for case in sweep.cases
    ]
    if as_recipe:
        print("".join(recipe_text(plan, comments=given == ["--recipe"]) for _, plan in shown), end="")
    elif given == ["--json"]:
        import json

        print(json.dumps([plan_json(plan, estimate_s(sweep, plan)) for sweep, plan in shown], indent=1))
    else:
        print("\n\n".join(plan_text(plan, estimate_s(sweep, plan)) for sweep, plan in shown))
        sweeps = {id(sweep): sweep for sweep, _ in shown}.values()
        print("".join(f"\n{line}\n" for sweep in sweeps for line in disk_lines(sweep)), end="")
    return 0


def _compare(arguments: list[str]) -> int:
    from harness.compare_view import comparison_text
    from harness.config import check
    from harness.record import find_record

    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 2:
        raise UserError("compare needs two cases, such as: compare iq1_m-dynamicgate iq1_m-standard")
    overrides = [one for one in arguments if "=" in one]
    for one in [one for one in overrides if one.startswith("results=")]:  # as the verbs that read results take it
        folder = Path(one.partition("=")[2])
        overrides.remove(one)
        overrides += [f"results.dir={folder.parent}", f"results.name={folder.name}"]
    config = compose(with_quant(overrides))[0]
    check(config)
    results = config.results
    folder = user_path(results.dir)
    a, b = (find_record(folder, name, results.name) for name in names)
    print(comparison_text(a, b, results.allow_different))
    return 0


def _report(arguments: list[str]) -> int:
    """Plain settings of its own, not Hydra's: it must run where only pandas and matplotlib are."""
    # Thousands of small products: a second thread would only wait for the core that draws. Read when numpy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from harness.record import RECORDS
    from harness.report import write_full_report

    given: dict[str, list[str]] = {"results": [], "out": [], "allow_different": []}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in given or not value:
            raise UserError(f"report takes results=DIR, out=DIR and allow_different=FIELD, not {argument!r}")
        given[key] += value.split(",") if key == "allow_different" else [value]
    _require_may_differ(given["allow_different"])
    folders = [user_path(one) for one in given["results"]]
    if not folders:
        folders = sorted(path.parent for path in Path("results").glob(f"*/{RECORDS}"))
        if len(folders) != 1:
            found = ", ".join(map(str, folders)) or "none in results/"
            raise UserError(f"say which sweep with results=DIR ({found})")
    if len(given["out"]) > 1:
        raise UserError("out= is given twice: give one folder")
    if len(folders) > 1 and not given["out"]:
        raise UserError("several sweeps make a new report: say where with out=DIR")
    _require_sweeps(folders)
    out = user_path(given["out"][0]) if given["out"] else folders[0] / "report"
    report = write_full_report(folders, out, given["allow_different"])
    print(report.text)
    print("written:", *report.paths, sep="\n  ")
    return 0


def _require_may_differ(names: Sequence[str]) -> None:
    from harness.record import MAY_DIFFER

    for name in names:
        if name not in MAY_DIFFER:
            raise UserError(f"allow_different={name}: such rows measure another thing.{nearest(name, MAY_DIFFER)}")


def _require_sweeps(folders: Sequence[Path]) -> None:
    from harness.record import RECORDS

    for folder in folders:
        if not (folder / RECORDS).is_dir():
            raise UserError(f"results={folder}: no folder of a sweep (it has no {RECORDS}/)")


def _card(arguments: list[str]) -> int:
    """Plain settings of its own, as `report`."""
    from harness.model_card import Settings, new_card, read_card, update_card, write_card
    from harness.results import load_results

    flags = [argument for argument in arguments if argument in ("--check", "--new")]
    single = ("base_model", "quantized_by", "name")
    given: dict[str, list[str]] = {name: [] for name in ("results", "allow_different", *single)}
    cards = []
    for argument in (one for one in arguments if one not in flags):
        key, equals, value = argument.partition("=")
        if equals and key in given and value:
            given[key] += value.split(",") if key == "allow_different" else [value]
        elif equals or argument.startswith("-"):
            raise UserError(f"card takes CARD.md, --check or --new, and {'=, '.join(given)}=, not {argument!r}")
        else:
            cards.append(argument)
    if len(cards) != 1 or len(flags) > 1 or not given["results"]:
        raise UserError("card needs one file and one sweep: card CARD.md results=DIR (with --check or --new)")
    twice = [name for name in single if len(given[name]) > 1]
    if twice:
        raise UserError(f"{twice[0]}= is given twice")
    _require_may_differ(given["allow_different"])
    folders = [user_path(one) for one in given["results"]]
    _require_sweeps(folders)
    path = user_path(cards[0])
    if flags == ["--new"] and os.path.lexists(path):
        raise UserError(f"{path} is there already: --new overwrites nothing")
    text = "" if flags == ["--new"] else read_card(path)
    results = load_results(folders, allow_different=given["allow_different"])
    settings = Settings(**{name: given[name][0] for name in single if given[name]})
    shipped = {group: options(group) for group in ("model", "prompts", "calibration", "policy")}
    shipped["quant"] = presets()
    if flags == ["--new"]:
        write_card(path, new_card(results, settings, shipped))
        print(f"{path}: written")
        return 0
    update = update_card(text, results, settings, shipped)
    if not update.changed:
        print(f"{path}: current")
        return 0
    if flags == ["--check"]:
        print(f"{path}: stale: {', '.join(update.changed)}")
        return 1
    write_card(path, update.text)
    print(f"{path}: written: {', '.join(update.changed)}")
    return 0


def _audit(arguments: list[str]) -> int:
    from harness.audit import audit, audit_json, audit_text_view

    names = [argument for argument in arguments if argument != "--json"]
    if len(names) != 1 or names[0].startswith("-"):
        raise UserError("audit needs one file, such as: audit CARD.md (or TABLE.csv; --json for programs)")
    path = Path(names[0])
    audits = audit(path)
    if "--json" in arguments:
        import json

        print(json.dumps(audit_json(path.name, audits), indent=1))
    else:
        print(audit_text_view(path.name, audits))
    return 0


def _convert(arguments: list[str]) -> int:
    """Plain settings of its own, as `report`."""
    from harness.config import Config
    from harness.convert import convert
    from harness.store import Cache

    given, folders = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("out", "type", "runtime.cache_dir") and value and key not in given:
            given[key] = value
        elif equals or argument.startswith("-"):
            raise UserError(f"convert takes FOLDER, and out=, type=, runtime.cache_dir= once each, not {argument!r}")
        else:
            folders.append(user_path(argument))
    if len(folders) != 1:
        raise UserError("convert needs one folder of safetensors, such as: convert FOLDER out=FILE.gguf")
    config, file_type = Config(), given.get("type", "bf16")
    config.runtime.cache_dir = given.get("runtime.cache_dir")
    out = user_path(given.get("out", f"{Path(os.path.realpath(folders[0])).name}-{file_type}.gguf"))
    info = convert(folders[0], out, file_type, Cache(cache_dir(config)), lambda text: print(text, file=sys.stderr))
    print(f"{out}: {info.architecture}, {len(info.tensors)} tensors, {info.file_bytes:,} bytes")
    return 0


def _cache(arguments: list[str]) -> int:
    """Plain settings of its own, as `report`."""
    from harness.cache_view import cache_text, parse_size
    from harness.config import Config
    from harness.store import Cache
    from harness.tensor_cache import prune

    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in ("prune", "runtime.cache_dir") or not value or key in given:
            raise UserError(f"cache takes prune=SIZE (or all) and runtime.cache_dir=DIR, once each, not {argument!r}")
        given[key] = value
    config = Config()
    config.runtime.cache_dir = given.get("runtime.cache_dir")
    cache = Cache(cache_dir(config))
    if "prune" in given:
        n_removed, n_bytes = prune(cache, parse_size(given["prune"]))
        print(f"removed {n_removed} quantized tensors, {n_bytes / 1e6:,.1f} MB")
    else:
        print(cache_text(cache))
    return 0


def _doctor(overrides: list[str]) -> int:
    from harness.doctor import doctor_text

    text, healthy = doctor_text(compose(with_quant(overrides))[0])
    print(text)
    return 0 if healthy else 1


def _prepare(configs: list["Config"], *, with_reference: bool = True) -> "Sweep":
    from harness.prepare import prepare

    return prepare(configs, lambda text: print(text, file=sys.stderr, flush=True), with_reference=with_reference)


def _by_inputs(configs: list["Config"]) -> list[list["Config"]]:
    """Groups whose members differ only in what makes a case: quant, mode and policy."""
    from dataclasses import asdict

    groups: dict[str, list[Config]] = {}
    for config in configs:
        inputs = {name: value for name, value in asdict(config).items() if name not in CASE_GROUPS}
        groups.setdefault(repr(inputs), []).append(config)
    return list(groups.values())


def _verb_help(verb: str) -> str:
    own = {"audit": AUDIT_HELP, "cache": CACHE_HELP, "card": CARD_HELP, "convert": CONVERT_HELP}
    if verb in own:
        return own[verb]
    if verb == "report":
        from harness.record import MAY_DIFFER

        return REPORT_HELP.format(may_differ=_wrapped(list(MAY_DIFFER), indent=27))
    head = HELP.split("\n\nverbs", maxsplit=1)[0]
    usage = USAGE.get(verb, f"{verb} [key=value ...]")
    lines = [head.replace("VERB [key=value ...]", usage), "", "groups (GROUP=OPTION)"]
    launchers = ("hydra/launcher",) if verb == "sweep" else ()
    for group in (*GROUPS, "+experiment", *launchers):
        lines.append(f"  {group:<14} {_wrapped(options(group.lstrip('+')), indent=17)}")
    lines += ["", "settings (KEY=VALUE; what they mean: harness/config.py)"]
    lines.append(f"  {_wrapped([name for name in setting_names() if '.' in name], indent=2)}")
    return "\n".join(lines) + "\n"


def _wrapped(words: list[str], indent: int) -> str:
    import textwrap

    return f"\n{' ' * indent}".join(textwrap.wrap(", ".join(words), 110 - indent, break_on_hyphens=False))


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
