"""The CPU features of the build: what llama.cpp prints, what reports name of it, and the runtime for a card's CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest

from harness import checks, plan_checks
from harness.compose import compose
from harness.cpu import chosen_features, cpu_features, engine_facts, features_text, vector_level
from harness.doctor import doctor_text
from harness.errors import UserError
from harness.record import read_records
from harness.store import Cache

# As llama.cpp prints them: a build for AVX-512, one for AVX2, one for Arm with another backend in front.
AVX512 = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | AVX512 = 1 | REPACK = 1 |"
AVX2 = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | REPACK = 1 | "
ARM = "Metal : EMBED_LIBRARY = 1 | CPU : NEON = 1 | ARM_FMA = 1 | SVE = 0 | SVE_CNT = 16 |"


def test_features_are_those_that_are_on() -> None:
    assert cpu_features(AVX512) == ["SSE3", "SSSE3", "AVX", "AVX2", "F16C", "FMA", "AVX512", "REPACK"]
    assert cpu_features(ARM) == ["EMBED_LIBRARY", "NEON", "ARM_FMA"]
    assert cpu_features("") == []


@pytest.mark.parametrize(("info", "level"), [(AVX512, "AVX512"), (AVX2, "AVX2"), (ARM, "NEON"), ("", "no vector unit")])
def test_vector_level(info: str, level: str) -> None:
    assert vector_level(cpu_features(info)) == level


def test_chosen_features_keep_the_wanted_order_and_llamacpps_spelling() -> None:
    features = cpu_features(AVX2)
    assert chosen_features(features, None) == features
    assert chosen_features(features, ["fma", "AVX2", "FMA"]) == ["FMA", "AVX2"]
    assert chosen_features(features, []) == []


def test_unknown_feature_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"does not report AVX512\. Did you mean .*avx2"):
        chosen_features(cpu_features(AVX2), ["AVX2", "AVX512"])


def test_features_in_words() -> None:
    assert features_text({"system_info": AVX2, "cpu_features": ["AVX2", "FMA"]}) == "AVX2, FMA (5 more in use)"
    every = "SSE3, SSSE3, AVX, AVX2, F16C, FMA, REPACK"
    assert features_text({"system_info": AVX2, "cpu_features": cpu_features(AVX2)}) == every
    assert features_text({"system_info": AVX2}) == every, "a record from before the setting"
    assert features_text({"system_info": AVX2, "cpu_features": ["AVX512"]}) == every, "what it did not have"
    for made_up in ({}, {"system_info": 5}, {"system_info": "x", "cpu_features": 7}, {"cpu_features": ["AVX2"]}):
        assert features_text(made_up) is None


def test_card_cpu_has_6_threads_and_names_avx2() -> None:
    (config,) = compose(["runtime=card_cpu", "quant=iq1_m"])
    assert config.runtime.threads == 6
    assert config.runtime.cpu_features == ["AVX2"]
    (config,) = compose(["runtime=card_cpu", "quant=iq1_m", "runtime.cpu_features=[AVX2,FMA]"])
    assert config.runtime.cpu_features == ["AVX2", "FMA"]


def test_more_threads_than_cores_are_told() -> None:
    assert plan_checks.thread_findings(2, {"cores_logical": 2}) == []
    assert plan_checks.thread_findings(6, {"cores_logical": None}) == []
    (finding,) = plan_checks.thread_findings(6, {"cores_logical": 2})
    assert finding.kind == "too_many_threads" and finding.what == "6 threads ran on a machine of 2 logical cores"


def test_different_builds_are_told() -> None:
    here = {"dirty": False, "machine": "here", "cpu": "fast", "system_info": AVX2}
    assert checks.environment_findings([here, dict(here)]) == []
    assert [f.kind for f in checks.environment_findings([here, {**here, "system_info": AVX512}])] == ["builds_differ"]
    assert [f.kind for f in checks.environment_findings([here, {**here, "machine": "x", "system_info": AVX512}])] == [
        "machines_differ"
    ]


def test_doctor_names_the_build(tiny_overrides: list[str], tmp_path: Path) -> None:
    features = cpu_features(engine_facts(Cache(tmp_path / "cache"))["system_info"])
    local = ["model=file", "prompts=file", "calibration=none"]  # nothing to ask the package index for
    (config,) = compose(
        [*local, *tiny_overrides, "quant=reference", f"runtime.cpu_features=[{features[-1]},{features[0]}]"]
    )
    lines = doctor_text(config)[0].splitlines()
    (build,) = (line for line in lines if line.startswith("  build"))
    assert f"for {vector_level(features)}, in " in build and build.endswith("llama_cpp")
    assert f"  CPU features       {', '.join(features)}" in lines
    assert f"  named in reports   {features[-1]}, {features[0]}" in lines


def test_sweep_records_the_features_to_name_and_the_load_time(
    cli: Callable[..., tuple[int, str, str]], tiny_overrides: list[str], tmp_path: Path
) -> None:
    features = cpu_features(engine_facts(Cache(tmp_path / "cache"))["system_info"])
    case = ["quant=reference", "mode=standard", "calibration=none", *tiny_overrides, "prompts.n_windows=1"]
    code, _, err = cli("sweep", *case, "runtime.cpu_features=[AVX_512]")
    assert code == 2 and "runtime.cpu_features" in err and "AVX_512" in err
    assert not list((tmp_path / "results").rglob("*.json"))
    code, _, err = cli("sweep", *case, f"runtime.cpu_features=[{features[0].lower()}]")
    assert code == 0, err
    (record,) = read_records(tmp_path / "results" / "tiny")
    environment = record.data["environment"]
    assert environment["cpu_features"] == features[:1]
    assert cpu_features(environment["system_info"]) == features, "all of them are kept"
    assert record.data["timings"]["load_s"] > 0
    assert features_text(environment) == f"{features[0]} ({len(features) - 1} more in use)"
