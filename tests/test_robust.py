"""What happens on real machines: damaged caches, two sweeps at once, hostile settings."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from harness.errors import EngineError, UserError
from harness.isolate import deaf_to_ctrl_c, run_in_child
from harness.record import read_records

Cli = Callable[..., tuple[int, str, str]]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_cache_files_are_made_again(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """Every file of the cache is damaged in turn; a new case is measured as if nothing had happened."""
    keep = "runtime.keep_variants=true"
    assert cli("sweep", "quant=iq2_xs", "mode=standard", keep, *tiny_overrides)[0] == 0
    truth = read_records(tmp_path / "results" / "tiny")[1].per_token()["nll"]
    kinds = {"imatrix", "variants", "probabilities", "windows", "headers", "mixtures", "tensors", "tensor_sha256"}
    for path in sorted((tmp_path / "cache").rglob("*")):
        if path.is_file() and path.parent.parent.name != "logs" and not path.name.endswith(".lock"):
            kinds -= {path.parent.name, path.parent.parent.name}
            damage(path)
    assert not kinds, "all of them were damaged"
    for path in (tmp_path / "results" / "tiny" / "records").glob("iq2_xs*"):
        path.unlink()
    code, _, err = cli("sweep", "quant=iq2_xs", "mode=standard", keep, *tiny_overrides)
    assert code == 0, err
    records = {record.data["quant"]: record for record in read_records(tmp_path / "results" / "tiny")}
    assert (records["iq2_xs"].per_token()["nll"] == truth).all()


def test_half_a_window_is_scored_again(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    assert cli("sweep", "quant=q8_0", "mode=standard", *tiny_overrides)[0] == 0
    record = next(r for r in read_records(tmp_path / "results" / "tiny") if r.data["quant"] == "q8_0")
    truth = record.per_token()["nll"]
    scores = tmp_path / "cache" / "scores" / record.data["key"]
    scores.mkdir(parents=True)
    for i, content in enumerate((b"", record.path.with_suffix(".npz").read_bytes()[:500])):
        (scores / f"window_{i:05d}.npz").write_bytes(content)
    for path in (record.path, record.path.with_suffix(".npz")):
        path.unlink()
    assert cli("sweep", "quant=q8_0", "mode=standard", *tiny_overrides)[0] == 0
    assert (record.per_token()["nll"] == truth).all()


@pytest.mark.parametrize("shared", [False, True])
def test_two_sweeps_at_once_make_each_thing_once(tiny_overrides: list[str], tmp_path: Path, shared: bool) -> None:
    """With locks of the system, and with the leases of a cache that several machines share."""
    command = [sys.executable, "-m", "harness", "sweep", "quant=iq2_xs,q4_0", *tiny_overrides]
    command += ["measure.speed=true", "measure.generate_tokens=2", "measure.layers=true"]
    command += [f"runtime.shared_cache={str(shared).lower()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    sweeps = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [sweep.communicate(timeout=300) for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], said
    text = "".join(out for out, _ in said)
    for case in ("reference: scoring", "iq2_xs standard: scoring", "iq2_xs dynamicgate: scoring"):
        assert text.count(case) == 1, case
    runs = pd.read_csv(tmp_path / "results" / "tiny" / "runs.csv")
    assert len(runs) == 5 and (runs.status == "ok").all()
    records = [record.data for record in read_records(tmp_path / "results" / "tiny")]
    made = [record for record in records if record["quantizing"] and not record.get("same_as")]
    pieces = {(name, t["type"]) for record in made for name, t in record["variant"]["tensors"].items()}
    quantized = sum(record["quantizing"]["n_tensors_quantized"] for record in made)
    assert quantized == len([one for one in pieces if one[1] not in ("f32", "q8_0")]), "each tensor and type once"
    assert len(list((tmp_path / "results" / "tiny" / "speed").iterdir())) == 1, "timed once"
    assert len(list((tmp_path / "results" / "tiny" / "layers").iterdir())) == 3, "and every file compared"
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.lease"))


def test_a_finished_sweep_removes_what_a_kill_left(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    """As of a picture that was being written when the sweep was killed, after its last record."""
    import harness.store

    assert cli("sweep", "quant=q8_0", "mode=standard", *tiny_overrides)[0] == 0
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / "results" / "tiny", tmp_path / "cache" / "sha256"]
    for folder in left:
        (folder / f".x.png.{harness.store._machine()}-{dead.pid}-abc.tmp").write_text("half")
    assert cli("sweep", "quant=q8_0", "mode=standard", *tiny_overrides)[0] == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failure_never_replaces_a_good_record(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The case is finished by somebody else while this sweep waits for its lock."""
    import harness.run

    assert cli("sweep", "quant=q8_0", "mode=standard", *tiny_overrides)[0] == 0
    path = next((tmp_path / "results" / "tiny" / "records").glob("q8_0*.json"))
    good, side = path.read_bytes(), path.with_suffix(".npz").read_bytes()
    path.unlink()

    def somebody_else(*args: object) -> None:
        path.write_bytes(good)
        path.with_suffix(".npz").write_bytes(side)

    monkeypatch.setattr(harness.run, "ensure_probabilities", somebody_else)
    monkeypatch.setattr(harness.run, "score_case", None)
    code, _, err = cli("sweep", "quant=q8_0", "mode=standard", *tiny_overrides)
    assert code == 0, err
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.wheel.package=/tmp/evil", "name==version"),
        ("'model.wheel.package=git+https://example.org/x.git'", "name==version"),
        ("model.wheel.package=name", "name==version"),
        ("model.wheel.sha256=../../etc", "64 hex"),
        ("quant.name=../x", "plain name"),
        (f"quant.name={'x' * 101}", "plain name"),
        ("mode.name=a/b", "plain name"),
        ("policy.name=..", "plain name"),
        ("calibration.window_tokens=8", "at least 16"),
        ("measure.speed_rounds=2", "3 to 31"),
        ("measure.layer_windows=3", "there are 2 windows"),
    ],
)
def test_hostile_and_useless_settings_are_refused(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path, setting: str, said: str
) -> None:
    name = setting.strip("'").partition("=")[0]
    overrides = [one for one in tiny_overrides if not one.startswith(f"{name}=")]
    base = ["model=smollm2_135m"] if "wheel" in name else []
    code, _, err = cli("sweep", "quant=iq2_xs", "mode=standard", *base, *overrides, setting.strip("'"))
    assert code == 2
    assert said in err and name.split(".")[0] in err and len(err.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_two_policies_of_one_name_are_refused(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    files = []
    for i, type_name in enumerate(("q8_0", "q6_k")):
        (tmp_path / str(i)).mkdir()
        files.append(tmp_path / str(i) / "mine.yaml")
        files[-1].write_text(f"rules: [{{name: all, type: {type_name}}}]")
    policies = f"policy.file={files[0]},{files[1]}"
    code, _, err = cli("sweep", "quant=q4_0", "mode=dynamicgate", policies, *tiny_overrides)
    assert code == 2 and "its own name" in err and len(err.splitlines()) == 1


def test_two_records_of_one_name_want_a_path(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for type_name in ("q8_0", "q6_k"):
        file.write_text(f"rules: [{{name: all, type: {type_name}}}]")
        assert cli("sweep", "quant=q4_0", "mode=dynamicgate", f"policy.file={file}", *tiny_overrides)[0] == 0
    where = [one for one in tiny_overrides if one.startswith("results.")]
    code, _, err = cli("compare", "q4_0-dynamicgate+mine", "reference", *where)
    assert code == 2 and "give the path" in err
    paths = sorted((tmp_path / "results" / "tiny" / "records").glob("q4_0*.json"))
    code, out, err = cli("compare", *map(str, paths), *where)
    assert code == 0, err
    assert "q4_0-dynamicgate+mine against q4_0-dynamicgate+mine" in out


def test_a_calibration_that_cannot_be_collected_is_one_line(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness.artefacts

    monkeypatch.setattr(harness.artefacts, "make_imatrix", _fail)
    code, _, err = cli("sweep", "quant=iq2_xs", *tiny_overrides)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ") and "deliberate" in err and "Traceback" not in err


def _fail(*args: object, **kwargs: object) -> None:
    from harness.errors import EngineError

    raise EngineError("deliberate")


def test_an_unknown_overlap_is_a_finding(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    short = [one for one in tiny_overrides if "prompts.window_tokens" not in one]
    assert cli("sweep", "quant=q8_0", "mode=standard", *short, "prompts.window_tokens=12")[0] == 0
    record = next(r for r in read_records(tmp_path / "results" / "tiny") if r.data["quant"] == "q8_0")
    assert record.data["calibration"]["overlap_share"] is None
    assert "overlap_unknown" in {finding["kind"] for finding in record.data["findings"]}


def test_windows_of_another_shape_are_another_test(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    """The same tokens, cut into other windows: neither imatrix nor figures of the first cut are believed."""
    shaped = [one for one in tiny_overrides if not one.startswith(("prompts.n", "prompts.w", "calibration.n"))]
    shaped = [one for one in shaped if not one.startswith("calibration.w")]
    cuts = [(2, 128), (4, 64)]
    for i, (n, tokens) in enumerate(cuts):
        sizes = [f"{group}.{key}" for group in ("prompts", "calibration") for key in (f"n_windows={n}",)]
        sizes += [f"{group}.window_tokens={tokens}" for group in ("prompts", "calibration")]
        assert cli("sweep", "quant=iq2_xs", "mode=standard", *shaped, *sizes, f"results.name=cut{i}")[0] == 0
    keys = [{r.data["key"] for r in read_records(tmp_path / "results" / f"cut{i}")} for i in range(2)]
    assert not keys[0] & keys[1]
    assert len(list((tmp_path / "cache" / "imatrix").glob("*.gguf"))) == 2
    code, _, err = cli("sweep", "quant=iq2_xs", "mode=standard", *shaped, *sizes, "results.name=cut0")
    assert code == 2 and "prompt_set" in err


def test_an_alignment_that_the_quantizer_ignores_is_refused(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, tmp_path: Path
) -> None:
    import gguf

    reader = gguf.GGUFReader(tiny_gguf)
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    overrides = [one for one in tiny_overrides if not one.startswith("model.path")]
    code, _, err = cli("sweep", "quant=q8_0", *overrides, f"model.path={path}")
    assert code == 2 and "general.alignment=64" in err and len(err.splitlines()) == 1


def test_the_kind_of_attention_moves_numbers_and_is_kept_apart(
    cli: Cli, tiny_overrides: list[str], tmp_path: Path
) -> None:
    sweep = ["sweep", "quant=q8_0", "mode=standard", *tiny_overrides, "calibration.enabled=false"]
    assert cli(*sweep)[0] == 0
    settings = read_records(tmp_path / "results" / "tiny")[0].data["settings"]
    assert settings == {"first_scored": 65, "ubatch_tokens": 128, "flash_attention": True, "threads": 2}
    code, _, err = cli(*sweep, "measure.flash_attention=false")
    assert code == 2 and "settings.flash_attention" in err
    code, _, err = cli(*sweep, "measure.flash_attention=false", "results.allow_different=[prompt_set.id]")
    assert code == 2 and "measure another thing" in err
    code, _, err = cli(*sweep, "measure.flash_attention=false", "results.name=other")
    assert code == 0, err
    one, other = (read_records(tmp_path / "results" / name)[0].per_token()["nll"] for name in ("tiny", "other"))
    assert (one != other).any() and abs(one - other).max() < 0.05
    asked_for = "results.allow_different=[settings.flash_attention]"
    code, out, err = cli("sweep", "quant=q4_0", *sweep[2:], "measure.flash_attention=false", asked_for)
    assert code == 0, err
    assert "! mixed" in out and "settings.flash_attention" in out


def test_tensors_without_imatrix_data_are_a_finding() -> None:
    from harness import plan_checks
    from tests.test_plan import down, everything, plan

    made = plan(down(0), everything("q4_0"))
    assert plan_checks.coverage_findings(made, {"blk.0.ffn_down.weight"}) == []
    (finding,) = plan_checks.coverage_findings(made, set())
    assert finding.kind == "imatrix_gaps" and "1 of 1" in finding.what


def test_nothing_is_written_beside_the_users_model(
    cli: Cli, tiny_overrides: list[str], tiny_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    model = tmp_path / "models" / "mine.gguf"
    model.write_bytes(tiny_gguf.read_bytes())
    overrides = [one for one in tiny_overrides if not one.startswith("model.path")]
    assert cli("sweep", "quant=q8_0", "mode=standard", *overrides, f"model.path={model}")[0] == 0
    assert list(model.parent.iterdir()) == [model]


def test_a_rules_name_cannot_leave_the_results(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    name = "a/../../../../escaped"
    file = tmp_path / "mine.yaml"
    file.write_text(f"rules: [{{name: '{name}', type: q8_0}}, {{name: b, type: q6_k}}]")
    cases = ["mode=dynamicgate", f"policy.file={file}", f"policy.without=['{name}']"]
    code, _, err = cli("sweep", "quant=q4_0", *cases, *tiny_overrides)
    assert code == 0, err
    records = read_records(tmp_path / "results" / "tiny")
    assert [r.path.parent for r in records] == [tmp_path / "results" / "tiny" / "records"] * 2
    assert not list(tmp_path.glob("escaped*"))


def test_llama_cpp_is_loaded_in_children_only(tiny_overrides: list[str]) -> None:
    """Of a whole sweep, from reading the model's header to the report: the parent never has it in its memory."""
    code = "import sys; from harness.cli import main; assert not main(sys.argv[1:]); print(sorted(sys.modules))"
    arguments = ["sweep", "quant=q8_0", "mode=standard", "calibration.enabled=false", *tiny_overrides]
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = found.stdout.splitlines()[-1]
    assert "'harness.run'" in loaded and "llama_cpp" not in loaded and "'harness.engine" not in loaded


@pytest.mark.parametrize("error", [UserError, EngineError])
def test_a_strangers_characters_in_an_error_do_not_reach_the_terminal(error: type[Exception]) -> None:
    assert str(error("a\nb\x1b[2J \udcff é")) == "a?b?[2J ? é"


def test_nor_do_those_of_a_log() -> None:
    assert EngineError("it failed", ["error loading model \x1b[2J"]).with_log == "it failed (error loading model ?[2J)"


def blocked_signals() -> set[int]:
    """In a child: what does not reach it, as it was before its first line of Python."""
    return set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))


def test_a_child_takes_no_ctrl_c_from_its_first_moment(tmp_path: Path) -> None:
    """Else its interpreter would print a traceback when it is stopped while it loads."""
    before = blocked_signals()
    assert signal.SIGINT not in before
    assert signal.SIGINT in run_in_child(blocked_signals, log_path=tmp_path / "log")
    assert blocked_signals() == before
    reached_the_end = False
    with pytest.raises(KeyboardInterrupt), deaf_to_ctrl_c():
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        reached_the_end = True
    assert reached_the_end, "it waits, and is not lost"
