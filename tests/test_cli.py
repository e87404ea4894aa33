"""The command line in this process: help, what is refused in which words, how overrides become configurations."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from harness.cli import main
from harness.compose import GROUPS, compose, configs_of_sweep
from harness.config import Config, TextConfig, check, results_name
from harness.errors import UserError
from harness.ggml_types import FILE_TYPES
from harness.policy_file import load_policy
from harness.record import MAY_DIFFER, record_path, write_record

Cli = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

CONF = Path(__file__).resolve().parent.parent / "conf"
OPTIONS = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment")
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
HEAVY = {"hydra", "omegaconf", "numpy", "pandas", "matplotlib", "llama_cpp", "datasets", "rich", "yaml", "psutil"}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Overrides that keep whatever goes wrong away from the user's folders."""
    return [f"runtime.cache_dir={tmp_path / 'cache'}", f"results.dir={tmp_path / 'results'}"]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ought to be refused and is not fails here, before anything is fetched or measured."""
    import harness.doctor
    import harness.sources

    def begun(*_: object, **__: object) -> None:
        pytest.fail("the command was not refused")

    monkeypatch.setattr(harness.sources, "wheel_file", begun)
    monkeypatch.setattr(harness.sources, "model_file", begun)
    monkeypatch.setattr(harness.doctor, "doctor_text", begun)


@pytest.fixture
def refused(cli: Cli, folders: list[str], no_work: None) -> Refused:
    """Run a command that must be refused: exit code 2 and one line on stderr, which is returned."""

    def run(*arguments: str) -> str:
        verb = arguments[:1] if arguments[0] in ("sweep", "plan", "doctor", "compare") else ()
        code, out, err = cli(*arguments, *(folders if verb else []))
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err.removeprefix("error: ").strip()

    return run


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Config], bool]]:
    """What `prepare` would have been called with; it refuses, so that nothing is fetched or measured."""
    import harness.prepare

    calls: list[tuple[list[Config], bool]] = []

    def stop(configs: Sequence[Config], say: object, *, with_reference: bool = True) -> None:
        calls.append((list(configs), with_reference))
        raise UserError("stopped by the test")

    monkeypatch.setattr(harness.prepare, "prepare", stop)
    return calls


def names(configs: Sequence[Config]) -> list[tuple[str, str]]:
    """Quant and mode of each."""
    return [(config.quant.name, config.mode.name) for config in configs]


# --- help


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help(cli: Cli, arguments: list[str]) -> None:
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    for word in (
        "usage: python -m harness",
        "sweep",
        "plan",
        "compare",
        "doctor",
        "quant=",
        "exit codes",
        *EXPERIMENTS,
    ):
        assert word in out
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("verb", ["sweep", "plan", "compare", "doctor"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_a_verb_lists_groups_options_and_settings(cli: Cli, verb: str, flag: str) -> None:
    code, out, err = cli(verb, "quant=rubbish", flag)
    assert (code, err) == (0, "")
    assert f"python -m harness {verb}" in out
    words = out.replace(",", " ").split()
    for group, option in OPTIONS:
        assert group in words
        assert option in words
    assert set(FILE_TYPES) <= set(words)
    for setting in ("prompts.n_windows", "calibration.imatrix", "runtime.threads", "results.name", "model.hub.repo_id"):
        assert setting in words
    assert max(map(len, out.splitlines())) <= 120


def test_help_of_report_lists_what_it_takes_and_no_setting_of_a_sweep(cli: Cli) -> None:
    code, out, err = cli("report", "--help")
    assert (code, err) == (0, "")
    keys = ("results=DIR", "out=DIR", "allow_different=FIELD", *MAY_DIFFER)
    assert all(key in out for key in keys)
    assert not any(word in out for word in ("prompts.", "quant=", "runtime.", "iq1_m"))
    assert max(map(len, out.splitlines())) <= 120
    refused = cli("report", "prompts.n_windows=1")[2]
    assert all(key in refused for key in ("results=", "out=", "allow_different="))


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "harness", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "harness" in imported, "the list is read rightly"
    assert imported & HEAVY == set()


def test_help_answers_at_once() -> None:
    def once() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "harness", "--help"], capture_output=True, check=True)
        return time.perf_counter() - begin

    assert min(once() for _ in range(3)) < 0.5


def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "harness", "swep"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


def _closed() -> None:
    os.close(1)


def _without_input_and_output() -> None:
    os.closerange(0, 2)


def test_a_sweep_runs_without_standard_streams(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Pipes to children would otherwise get their numbers, and be taken for the log."""
    command = [sys.executable, "-m", "harness", "sweep", "quant=q4_0", "mode=standard", *tiny_overrides]
    result = subprocess.run(  # no threads are running here
        command, stderr=subprocess.PIPE, text=True, check=False, preexec_fn=_without_input_and_output
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_errors_that_nobody_can_read_keep_their_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run([sys.executable, "-m", "harness", "audit", "/no/such"], stderr=full, check=False)
    assert result.returncode == 2


@pytest.mark.parametrize("words", [["--help"], ["sweep", "--help"], ["cache"]])
def test_output_that_cannot_be_written_is_one_line(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert result.returncode == 1 and result.stderr.startswith("error: No space left on device")
    assert result.stderr.count("\n") == 1
    result = subprocess.run(  # no threads are running here
        command, stderr=subprocess.PIPE, text=True, check=False, preexec_fn=_closed, env=environment
    )
    assert (result.returncode, result.stderr) == (0, "")


# --- what is refused


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "quant=q4_0", "runtime.cache_dir=~no-such-user/x"],
        ["plan", "quant=q4_0", "model.path=~no-such-user/x.gguf"],
        ["report", "results=~no-such-user/x"],
        ["card", "CARD.md", "results=~no-such-user/x"],
        ["convert", "~no-such-user/x"],
    ],
)
def test_the_home_of_nobody_is_one_line(cli: Cli, words: list[str]) -> None:
    code, out, err = cli(*words)
    assert (code, out) == (2, "") and "there is no such user" in err and err.count("\n") == 1


def test_links_in_a_circle_are_one_line(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    circle = tmp_path / "a"
    circle.symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(circle)
    settings = [one for one in tiny_overrides if not one.startswith("results.dir")]
    for words in (
        ["sweep", "quant=q4_0", f"results.dir={circle}", *settings],
        ["report", f"results={circle}"],
        ["audit", str(circle)],
        ["convert", str(circle)],
    ):
        code, out, err = cli(*words)
        assert (code, out) == (2, "") and str(circle) in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["swep", "quant=iq1_m"], ["'swep'", "Did you mean sweep?"]),
        (["plans"], ["'plans'", "plan"]),
        (["--version"], ["'--version'"]),
        (["quant=iq1_m"], ["'quant=iq1_m'"]),
        # options of groups
        (["sweep", "quant=iq1_mm"], ["quant=iq1_mm", "Did you mean iq1_m"]),
        (["sweep", "quant=iq2_s,q4km"], ["quant=q4km", "q4_k_m"]),
        (["sweep", "quant="], ["quant=", "iq1_m"]),
        (["sweep", "quant=iq1_m", "mode=dynamic_gate"], ["mode=dynamic_gate", "Did you mean dynamicgate"]),
        (["sweep", "quant=iq1_m", "mode=standard,dynamcgate"], ["mode=dynamcgate", "Did you mean dynamicgate"]),
        (["sweep", "quant=iq1_m", "model=smollm"], ["model=smollm", "Did you mean smollm2_135m?"]),
        (["sweep", "quant=iq1_m", "prompts=wikitext"], ["prompts=wikitext", "wikitext2"]),
        (["sweep", "quant=iq1_m", "calibration=c4"], ["calibration=c4", "c4_sample"]),
        (["sweep", "quant=iq1_m", "policy=dynmicgate"], ["policy=dynmicgate", "Did you mean dynamicgate"]),
        (["sweep", "quant=iq1_m", "runtime=fast"], ["runtime=fast", "default"]),
        (["doctor", "model=smollm"], ["model=smollm", "smollm2_135m"]),
        # settings
        (["sweep", "quant=iq1_m", "promts.n_windows=2"], ["'promts.n_windows'", "prompts.n_windows"]),
        (["sweep", "quant=iq1_m", "n_windows=2"], ["'n_windows'", "prompts.n_windows"]),
        (["sweep", "quant=iq1_m", "prompt=wiki_sample"], ["'prompt'", "prompts"]),
        (["sweep", "quants=iq1_m", "quant=iq1_m"], ["'quants'", "quant"]),
        (["plan", "quant=iq1_m", "model.hub.repo=x"], ["'model.hub.repo'", "model.hub.repo_id"]),
        (["doctor", "runtime.cachedir=x"], ["'runtime.cachedir'", "runtime.cache_dir"]),
        # types of values
        (["sweep", "quant=iq1_m", "prompts.n_windows=null"], ["prompts.n_windows=null"]),
        (["sweep", "quant=iq1_m", "prompts.n_windows=2,x"], ["prompts.n_windows=x", "Integer"]),
        (["sweep", "quant=iq1_m", "runtime.keep_variants=maybe"], ["runtime.keep_variants=maybe", "bool"]),
        (["sweep", "quant=iq1_m", "calibration.max_overlap=low"], ["calibration.max_overlap=low", "Float"]),
        (["sweep", "quant=iq1_m", "policy.rules=none"], ["policy.rules=none"]),
        # values that no run could use
        (["sweep", "quant=iq1_m", "prompts.n_windows=-1"], ["prompts.n_windows=-1", "above 0"]),
        (["plan", "quant=iq1_m", "quant.file_type=iq1_x"], ["quant.file_type=iq1_x", "iq1_"]),
        (["sweep", "quant=iq1_m", "results.name=a/b"], ["results.name='a/b'"]),
        (["sweep", "quant=iq1_m", "policy.file=/no/rules.yaml"], ["/no/rules.yaml", "No such file"]),
        (["sweep", "quant=iq1_m", "policy.rules=[{name: a}]"], ["rule 1", "type"]),
        (["sweep", "quant=iq1_m", "policy.without=[ffn_down_end]"], ["policy.without=ffn_down_end", "ffn_down_ends"]),
        # what is no override
        (["sweep", "quant=iq1_m", "foo"], ["'foo'"]),
        (["sweep", "quant=iq1_m", "--bogus"], ["--bogus"]),
        (["sweep", "quant=iq1_m", "prompts.path=[1"], ["[1"]),
        (["sweep", "quant=iq1_m", "results.name=${nothing}"], ["nothing"]),
        (["sweep", "quant=iq1_m", "prompts.n_windows=interval(1,3)"], ["prompts.n_windows=interval(1,3)"]),
        # experiments
        (["sweep", "+experiment=attribution"], ["this experiment", "quant=iq1_m"]),
        (["sweep", "+experiment=attribution", "mode=standard"], ["this experiment", "quant=iq1_m"]),
        (["sweep", "+experiment=ladder_ultra_low", "quant=iq1_m"], ["quant="]),
        (["sweep", "+experiment=ladder"], ["+experiment=ladder is no experiment", "ladder_ultra_low"]),
        (["sweep", "experiment=attribution", "quant=iq1_m"], ["'experiment'"]),
        # what to compare
        (["compare"], ["two cases", "iq1_m-dynamicgate"]),
        (["compare", "iq1_m-standard"], ["two cases", "iq1_m-dynamicgate"]),
        (["compare", "iq1_m-standard", "results.name=a"], ["two cases"]),
        (["compare", "a", "b", "c"], ["two cases"]),
        (["compare", "a", "b", "result.dir=x"], ["'result.dir'", "results.dir"]),
        (["compare", "/no/a.json", "b"], ["/no/a.json"]),
        # nothing to quantize
        (["sweep"], ["sweep", "quant=iq1_m"]),
        (["plan"], ["plan", "quant=iq1_m"]),
        (["plan", "--json"], ["plan", "quant=iq1_m"]),
        (["sweep", "mode=standard", "model=smollm2_135m"], ["quant="]),
    ],
    ids=lambda value: (
        " ".join(value) if isinstance(value, list) and value[0] in ("sweep", "plan", "doctor", "compare") else ""
    ),
)
def test_refused_in_one_line(refused: Refused, arguments: list[str], words: list[str]) -> None:
    message = refused(*arguments)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("prompts.n_windows", 0, ["prompts.n_windows=0", "above 0"]),
        ("prompts.n_windows", -4, ["prompts.n_windows=-4", "above 0"]),
        ("prompts.window_tokens", 0, ["prompts.window_tokens=0", "above 0"]),
        ("prompts.window_tokens", 3, ["prompts.window_tokens=3", "at least 4"]),
        ("calibration.n_windows", 0, ["calibration.n_windows=0", "above 0"]),
        ("calibration.window_tokens", -5, ["calibration.window_tokens=-5", "above 0"]),
        ("runtime.threads", 0, ["runtime.threads=0", "above 0"]),
        ("measure.ubatch_tokens", 0, ["measure.ubatch_tokens=0", "above 0"]),
        ("measure.first_scored", 0, ["measure.first_scored=0", "1 to 2047"]),
        ("measure.first_scored", 2048, ["measure.first_scored=2048", "1 to 2047"]),
        ("prompts.format", "csv", ["prompts.format=csv", "parquet"]),
        ("calibration.format", "csv", ["calibration.format=csv", "parquet"]),
        ("quant.file_type", "iq1_x", ["quant.file_type=iq1_x", "Did you mean iq1_"]),
        ("results.name", "", ["results.name=''"]),
        ("results.name", ".", ["results.name='.'"]),
        ("results.name", "..", ["results.name='..'"]),
        ("results.name", "../up", ["results.name='../up'"]),
        ("results.name", "a/b", ["results.name='a/b'"]),
        ("results.name", "a\\b", ["results.name="]),
        ("results.name", ".hidden", ["results.name='.hidden'"]),
        ("results.name", "a b", ["results.name='a b'"]),
        ("results.name", "a\n", ["results.name="]),
    ],
)
def test_values_that_no_run_could_use(setting: str, value: Any, words: list[str]) -> None:
    config, (group, name) = Config(), setting.split(".")
    setattr(getattr(config, group), name, value)
    with pytest.raises(UserError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prompts.n_windows", 1),
        ("prompts.window_tokens", 4),
        ("measure.first_scored", 1),
        ("measure.first_scored", 2047),
        ("runtime.threads", 1),
        ("runtime.threads", None),
        ("prompts.format", "json"),
        ("quant.file_type", "q4_k_m"),
        ("results.name", "tiny-4x128_v1.2"),
    ],
)
def test_values_at_the_border_are_fine(setting: str, value: Any) -> None:
    config, (group, name) = Config(), setting.split(".")
    setattr(getattr(config, group), name, value)
    check(config)


def test_a_refused_sweep_leaves_no_results(refused: Refused, tmp_path: Path) -> None:
    refused("sweep", "quant=iq1_m", "prompts.n_windows=0")
    assert not (tmp_path / "results").exists()


def test_every_case_is_checked_before_anything_is_done(refused: Refused) -> None:
    assert "prompts.n_windows=-3" in refused("plan", "quant=iq1_m", "prompts.n_windows=-3,2")


@pytest.mark.parametrize(
    "overrides",
    [["quant=1"], ["quant=range(1,3)"], ["quant=iq1_m", "policy=null"]],
    ids=" ".join,
)
def test_a_group_needs_a_name(refused: Refused, overrides: list[str]) -> None:
    assert overrides[-1].split("=")[0] in refused("sweep", *overrides)


def test_a_setting_of_a_wheel_that_is_not_there(refused: Refused) -> None:
    assert "model.wheel" in refused("sweep", "quant=iq1_m", "model=file", "model.wheel.sha256=abc")


@pytest.mark.parametrize("override", ["+typo=1", "++prompts.n_window=9"])
def test_a_plus_does_not_hide_a_misspelt_setting(override: str) -> None:
    with pytest.raises(UserError):
        compose(["quant=iq1_m", override])


def test_a_list_in_brackets_is_no_way_to_lose_quants() -> None:
    with pytest.raises(UserError):
        compose(["quant=[iq1_m,iq2_s]"])


def test_a_group_given_twice_is_refused() -> None:
    with pytest.raises(UserError):
        compose(["quant=iq1_m", "quant=iq2_s"])


@pytest.mark.parametrize("name", ["IQ1_M", "Q4_K_M"])
def test_capitals_are_no_obstacle_to_the_nearest_name(refused: Refused, name: str) -> None:
    assert f"Did you mean {name.lower()}" in refused("sweep", f"quant={name}")


def test_the_override_at_fault_is_named(refused: Refused) -> None:
    message = refused("sweep", "quant=iq1_m", "mode=standard", "model.allow_quantized=perhaps")
    assert message.startswith("model.allow_quantized=perhaps")


def test_a_file_type_alone_is_asked_to_be_a_quant(refused: Refused) -> None:
    assert "quant=iq1_m" in refused("sweep", "quant.file_type=iq1_m")


@pytest.mark.parametrize("override", ["model.path=~/no.gguf", "model.path=/no/ü.gguf", "model.path=/no/a(1).gguf"])
def test_a_path_that_needs_quotes(override: str) -> None:
    try:
        (config,) = compose(["quant=iq1_m", override])
    except UserError as error:
        assert "quote" in str(error)
    else:
        assert config.model.path == override.split("=")[1]


# --- what a sweep and a plan are asked for


def test_a_sweep_has_both_modes_unless_told_otherwise(refused: Refused, prepared: list[Any]) -> None:
    assert refused("sweep", "quant=iq1_m,q4_0") == "stopped by the test"
    ((configs, with_reference),) = prepared
    both = [("iq1_m", "standard"), ("iq1_m", "dynamicgate"), ("q4_0", "standard"), ("q4_0", "dynamicgate")]
    assert (names(configs), with_reference) == (both, True)


def test_a_sweep_has_the_modes_it_is_told(refused: Refused, prepared: list[Any]) -> None:
    refused("sweep", "mode=standard", "quant=iq1_m")
    assert names(prepared[0][0]) == [("iq1_m", "standard")]


def test_a_plan_has_no_reference(refused: Refused, prepared: list[Any]) -> None:
    refused("plan", "quant=iq1_m,iq2_s", "mode=standard", "--json")
    ((configs, with_reference),) = prepared
    assert (names(configs), with_reference) == ([("iq1_m", "standard"), ("iq2_s", "standard")], False)


def test_cases_of_the_same_inputs_make_one_sweep(cli: Cli, folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Quant, mode and policy make cases; everything else makes a sweep of its own."""
    import harness.prepare

    groups: list[list[Config]] = []

    class Nothing:
        cases = ()

    def prepare(configs: Sequence[Config], *_: object, **__: object) -> Nothing:
        groups.append(list(configs))
        return Nothing()

    monkeypatch.setattr(harness.prepare, "prepare", prepare)
    arguments = ["quant=iq1_m,iq2_s", "prompts.n_windows=1,2", "policy=dynamicgate,none"]
    assert cli("plan", *arguments, *folders)[0] == 0
    assert [[(one.prompts.n_windows, one.quant.name, one.policy.name) for one in group] for group in groups] == [
        [(n, quant, policy) for quant in ("iq1_m", "iq2_s") for policy in ("dynamicgate", "none")] for n in (1, 2)
    ]


def test_a_stop_is_told_and_has_its_own_code(cli: Cli, monkeypatch: pytest.MonkeyPatch, folders: list[str]) -> None:
    import harness.prepare

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.prepare, "prepare", interrupted)
    code, out, err = cli("sweep", "quant=iq1_m", *folders)
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert "stopped" in err


def test_arguments_come_from_the_shell_when_none_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", "nonsense"])
    assert main() == 2
    assert "'nonsense'" in capsys.readouterr().err


# --- experiments


def cases(configs: Sequence[Config]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Quant, mode and the rules left out of each."""
    return [(config.quant.name, config.mode.name, tuple(config.policy.without)) for config in configs]


def test_the_ladder_is_14_cases() -> None:
    configs = configs_of_sweep(["+experiment=ladder_ultra_low"])
    gate = ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m"]
    expected = [(quant, "standard") for quant in (*gate, "iq3_xxs", "q2_k")]
    assert names(configs) == expected + [(quant, "dynamicgate") for quant in gate]
    assert len(configs) == 14
    assert len({results_name(config) for config in configs}) == 1


def test_attribution_is_7_cases_a_quant() -> None:
    rules = [rule["name"] for rule in yaml.safe_load((CONF / "policy" / "dynamicgate.yaml").read_text())["rules"]]
    assert len(rules) == 5
    configs = configs_of_sweep(["+experiment=attribution", "quant=iq1_m"])
    parts = [("iq1_m", "dynamicgate", (rule,)) for rule in rules]
    assert cases(configs) == [("iq1_m", "standard", ()), ("iq1_m", "dynamicgate", ()), *parts]
    assert len(configs) == 7
    for config in configs[2:]:
        name, kept = load_policy(config.policy)
        assert name == f"dynamicgate_without_{config.policy.without[0]}"
        assert len(kept) == 4
    assert len(configs_of_sweep(["+experiment=attribution", "quant=iq1_m,iq2_s"])) == 14


def test_an_experiment_takes_other_overrides_from_anywhere() -> None:
    for overrides in (["+experiment=ladder_ultra_low", "prompts.n_windows=9"], ["prompts.n_windows=9"]):
        order = overrides if len(overrides) == 2 else [*overrides, "+experiment=ladder_ultra_low"]
        assert {config.prompts.n_windows for config in configs_of_sweep(order)} == {9}
    assert len(configs_of_sweep(["+experiment=ladder_ultra_low", "prompts.n_windows=1,2"])) == 28


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_is_valid(name: str) -> None:
    lines = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())["sweep"]
    has_quants = any("quant=" in line for line in lines)
    configs = configs_of_sweep([f"+experiment={name}", *([] if has_quants else ["quant=iq2_xs"])])
    assert len(configs) > 1
    for config in configs:
        check(config)
        load_policy(config.policy)
        assert config.quant.file_type in FILE_TYPES
    assert len(set(cases(configs))) == len(configs), "no case twice"


def test_an_experiment_makes_one_sweep(refused: Refused, prepared: list[Any]) -> None:
    assert refused("sweep", "+experiment=attribution", "quant=iq1_m") == "stopped by the test"
    ((configs, with_reference),) = prepared
    assert (len(configs), with_reference) == (7, True)


def test_a_placebo_is_a_mode() -> None:
    (config,) = compose(["quant=iq1_m", "mode=placebo"])
    assert (config.mode.apply_policy, config.mode.placebo, config.mode.placebo_seed) == (True, True, None)
    assert compose(["quant=iq1_m", "mode=placebo", "mode.placebo_seed=3"])[0].mode.placebo_seed == 3


# --- compare


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Records of two cases and a failed one, below the results folder that `refused` and these tests give."""
    folder = tmp_path / "results" / "small"
    nll = np.random.default_rng(0).exponential(2.0, (4, 31))
    shared = {
        "schema_version": 1,
        "created_utc": "2026-01-02T03:04:05+00:00",
        "reference": {"id": "r", "name": "tiny"},
        "prompt_set": {"id": "p", "name": "wiki", "n_windows": 4, "window_tokens": 64},
        "calibration": {"id": "c"},
        "settings": {"first_scored": 33, "ubatch_tokens": 512, "threads": 2},
        "versions": {"metrics": 2, "llama_cpp_python": "0.3.36"},
        "variant": {"file_bytes": 1 << 20},
    }
    for quant, mode, status in (
        ("iq1_m", "standard", "ok"),
        ("iq1_m", "dynamicgate", "ok"),
        ("q4_0", "standard", "failed"),
    ):
        policy = None if mode == "standard" else mode
        case = {"key": f"{mode:0<64}", "quant": quant, "mode": mode, "policy": policy, "status": status}
        values = nll + (0.5 if policy is None else 0.1)
        side = {"nll": values, "kld": values / 10, "top": np.zeros(nll.shape, np.int32)} if status == "ok" else {}
        write_record(record_path(folder, quant, mode, case["key"]), {**shared, **case}, side)
    return folder


def test_compare(cli: Cli, folders: list[str], measured: Path) -> None:
    code, out, err = cli("compare", "iq1_m-dynamicgate", "iq1_m-standard", *folders)
    assert (code, err) == (0, "")
    assert out.startswith(
        "iq1_m-dynamicgate against iq1_m-standard\nwiki, 4 windows of 64 tokens, 124 scored, 4 blocks\n"
    )
    assert "-33.0%" in out, "exp(-0.4) - 1"
    assert "too few" in out
    assert cli("compare", "iq1_m-dynamicgate", *folders, "iq1_m-standard", "results.name=small") == (0, out, "")


def test_compare_takes_paths(cli: Cli, folders: list[str], measured: Path) -> None:
    paths = sorted(str(path) for path in (measured / "records").glob("iq1_m*.json"))
    code, out, err = cli("compare", *paths, *folders[:1])
    assert (code, err) == (0, "")
    assert out.startswith("iq1_m-dynamicgate against iq1_m-standard\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("iq1_m-standrad", ["'iq1_m-standrad'", "Did you mean iq1_m-standard"]),
        ("iq1_m-dynamicgat", ["'iq1_m-dynamicgat'", "Did you mean iq1_m-dynamicgate"]),
        ("zzz", ["'zzz'", "Known: iq1_m-dynamicgate, iq1_m-standard"]),
        ("q4_0-standard", ["no measured case 'q4_0-standard'"]),
    ],
)
def test_compare_with_a_wrong_name(refused: Refused, measured: Path, name: str, words: list[str]) -> None:
    for arguments in ((name, "iq1_m-standard"), ("iq1_m-standard", name)):
        message = refused("compare", *arguments)
        for word in words:
            assert word in message


def test_compare_with_a_failed_record(refused: Refused, measured: Path) -> None:
    (path,) = (measured / "records").glob("q4_0*.json")
    assert "q4_0-standard failed" in refused("compare", "iq1_m-standard", str(path))


def test_compare_where_nothing_was_measured(refused: Refused, tmp_path: Path) -> None:
    assert f"no measured case 'iq1_m-standard' below {tmp_path / 'results'}" in refused(
        "compare", "iq1_m-standard", "iq1_m-dynamicgate"
    )
    assert not (tmp_path / "results").exists()


# --- compose


def test_lists_make_every_combination() -> None:
    configs = compose(["quant=iq1_m,iq2_s", "mode=standard,dynamicgate"])
    assert names(configs) == [
        ("iq1_m", "standard"),
        ("iq1_m", "dynamicgate"),
        ("iq2_s", "standard"),
        ("iq2_s", "dynamicgate"),
    ]
    assert [config.quant.file_type for config in configs] == ["iq1_m", "iq1_m", "iq2_s", "iq2_s"]
    assert [config.mode.apply_policy for config in configs] == [False, True, False, True]


def test_any_setting_may_be_a_list() -> None:
    configs = compose(["prompts.n_windows=1,2", "quant=iq1_m", "runtime.threads=1,2"])
    assert [(one.prompts.n_windows, one.runtime.threads) for one in configs] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_configurations_are_plain_data_classes_and_independent() -> None:
    one, other = compose(["quant=iq1_m,iq2_s"])
    assert type(one) is Config
    assert type(one.prompts) is TextConfig
    one.prompts.n_windows = 77
    assert other.prompts.n_windows == 4


def test_defaults() -> None:
    (config,) = compose(["quant=iq1_m"])
    assert (config.model.name, config.prompts.name, config.calibration.name) == (
        "smollm2_135m",
        "wiki_sample",
        "c4_sample",
    )
    assert (config.mode.name, config.policy.name) == ("dynamicgate", "dynamicgate")
    assert (config.prompts.n_windows, config.prompts.window_tokens) == (4, 2048)
    assert config.model.wheel is not None
    assert results_name(config) == "smollm2_135m-wiki_sample-4x2048"


def test_overrides_reach_their_place_whatever_their_order() -> None:
    overrides = ["prompts.n_windows=9", "prompts=file", "prompts.path=/a/b.txt", "quant=q4_k_m", "results.name=mine"]
    for order in (overrides, overrides[::-1]):
        (config,) = compose(order)
        assert (config.prompts.n_windows, config.prompts.path, config.quant.name) == (9, "/a/b.txt", "q4_k_m")
        assert results_name(config) == "mine"


def test_quoted_values_are_not_split() -> None:
    (config,) = compose(["quant=iq1_m", "model.path='/a, b/c.gguf'", r"prompts.join='\n'"])
    assert config.model.path == "/a, b/c.gguf"
    assert results_name(config).startswith("c-")


@pytest.mark.parametrize("override", ["model.name=../../up", "model.name=a/b", "prompts.name=/tmp/x"])
def test_the_results_folder_is_one_folder(override: str) -> None:
    (config,) = compose(["quant=iq1_m", override])
    assert Path(results_name(config)).name == results_name(config)


# --- conf/


def test_groups_are_the_folders_of_conf_and_the_fields_of_the_schema() -> None:
    assert sorted(path.name for path in CONF.iterdir() if path.is_dir()) == sorted([*GROUPS, "experiment", "hydra"])
    assert {item.name for item in fields(Config)} == {*GROUPS, "results", "sweep"}
    defaults = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    assert [next(iter(one)) for one in defaults if isinstance(one, dict)] == list(GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=map("=".join, OPTIONS))
def test_every_option_composes_and_is_valid(group: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "types.txt").write_text("^output\\.weight$=q5_k\n")
    file = [f"policy.file={tmp_path / 'types.txt'}"] if option in ("like", "recipe") else []
    (config,) = compose([f"{group}={option}", *file, *([] if group == "quant" else ["quant=iq1_m"])])
    check(config)
    load_policy(config.policy)
    chosen = getattr(config, group)
    raw = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8"))
    for key, value in raw.items():
        if not isinstance(value, dict):
            assert getattr(chosen, key) == value
    wheel = getattr(chosen, "wheel", None)
    if wheel:
        assert len(bytes.fromhex(wheel.sha256)) == 32
        assert "==" in wheel.package
        assert ("{part" in wheel.package) == ("{part" in wheel.member) == (wheel.parts > 1)


def test_every_file_type_is_a_quant() -> None:
    from hydra.core.config_store import ConfigStore

    for file_type in ("f32", "iq1_m", "q2_0"):
        (config,) = compose([f"quant={file_type}"])
        check(config)
        assert (config.quant.name, config.quant.file_type) == (file_type, file_type)
    presets = {option for group, option in OPTIONS if group == "quant"}
    stored = {name.removesuffix(".yaml") for name in ConfigStore.instance().list("quant")}
    assert stored == set(FILE_TYPES) - presets, "a preset of that name takes its place"


def test_the_schema_s_own_defaults_are_valid() -> None:
    check(Config())
    assert load_policy(Config().policy) == ("none", ())


def test_combinations_are_what_hydra_composes_of_each() -> None:
    lists = {
        "quant": ("iq1_m", "bf16-q8_0", "q4_0"),
        "mode": ("standard", "dynamicgate", "placebo"),
        "policy": ("none", "dynamicgate_ladder"),
        "policy.file": ("a.yaml", "b.yaml"),
        "runtime.threads": ("1", "2"),
    }
    together = compose([f"{key}={','.join(values)}" for key, values in lists.items()])
    each = [[f"{key}={value}" for key, value in zip(lists, row, strict=True)] for row in product(*lists.values())]
    assert together == [one for overrides in each for one in compose(overrides)]
    assert len({repr(one) for one in together}) == len(each) == 72


def test_experiments_in_a_list_are_composed_whole() -> None:
    together = compose(["+experiment=attribution,ladder_ultra_low", "quant=iq1_m,iq2_s"])
    each = [["+experiment=attribution", "quant=iq1_m"], ["+experiment=attribution", "quant=iq2_s"]]
    each += [["+experiment=ladder_ultra_low", "quant=iq1_m"], ["+experiment=ladder_ultra_low", "quant=iq2_s"]]
    assert together == [one for overrides in each for one in compose(overrides)]
