"""Models and texts from the Hugging Face hub, against a hub on 127.0.0.1. The command line runs in a process of its
own, because huggingface_hub reads its settings from the environment once, when it is imported."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import gguf
import pytest
from fake_hub import NOBODY, FakeHub, Repo, commit_of, serve, wikitext
from tiny_model import random_text, write_tiny_llama

from harness.engine.model import tokenize
from harness.errors import UserError
from harness.hub import chosen_gguf
from harness.prompts import cut_windows
from harness.record import read_records

ROOT = Path(__file__).parent.parent
TOKEN = "hf_test_token_of_nobody"
FILE = "tiny-f16.gguf"
MODEL = ["model=file", "model.hub.repo_id=someone/tiny", f"model.hub.filename={FILE}"]

Result = subprocess.CompletedProcess[str]
Run = Callable[..., Result]


@pytest.fixture
def hub(tiny_gguf: Path) -> Iterator[FakeHub]:
    """A hub with the tiny model."""
    with serve() as running:
        running.repos["someone/tiny"] = Repo({"main": {FILE: tiny_gguf.read_bytes()}})
        yield running


@pytest.fixture
def run(hub: FakeHub, tiny_overrides: list[str], tmp_path: Path) -> Run:
    """Run the command line on the hub's tiny model. `cache`: the harness's own cache; the hub's is always the same."""
    fixed = [one for one in tiny_overrides if not one.startswith(("model.path=", "runtime.cache_dir="))]

    def start(verb: str, *overrides: str, cache: str = "cache", **environment: str) -> Result:
        command = [sys.executable, "-m", "harness", verb, "quant=q8_0", "mode=standard", *MODEL, *fixed]
        command += ["calibration=none", "runtime.threads=1", f"runtime.cache_dir={tmp_path / cache}", *overrides]
        env = hub.environment(str(tmp_path / "hf"), **environment)
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)

    return start


def done(result: Result) -> Result:
    """It ended well."""
    assert result.returncode == 0, result.stderr
    return result


def refused(result: Result, tmp_path: Path) -> str:
    """The one error line of a run that stopped before any work."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert not list(tmp_path.glob("cache*/variants/*"))
    assert not list((tmp_path / "results").rglob("*.json"))
    return lines[0]


def together(*runs: Callable[[], Result]) -> list[Result]:
    """Their results; two at a time, because each is a process that imports much."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: one(), runs))


# -- what works


def test_model_of_the_hub_is_swept_and_then_found_in_the_hubs_cache(
    run: Run, hub: FakeHub, tiny_gguf: Path, tmp_path: Path
) -> None:
    result = done(run("sweep"))
    assert "fetching tiny-f16.gguf of someone/tiny from the hub" in result.stderr
    records = {r.data["quant"]: r.data for r in read_records(tmp_path / "results" / "tiny")}
    assert set(records) == {"reference", "q8_0"}
    assert {record["status"] for record in records.values()} == {"ok"}
    sha256 = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert records["q8_0"]["reference"]["source_sha256"] == sha256
    assert records["q8_0"]["reference"]["name"] == "tiny"
    assert {request.authorization for request in hub.requests} == {None}
    assert len(hub.asked("GET", FILE)) == 1

    # The hub's cache is shared by every program of the machine: another cache of the harness changes nothing.
    hub.requests.clear()
    done(run("plan", cache="cache-2", HF_HUB_OFFLINE="1"))
    assert hub.requests == []
    done(run("plan", cache="cache-2"))
    assert len(hub.asked("HEAD", FILE)) == 1 and not hub.asked("GET", FILE), "asked for news, not fetched again"
    done(run("plan", cache="cache-2", HF_ENDPOINT=NOBODY))  # the hub is down


def test_offline_without_cache_is_refused(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    line = refused(run("plan", HF_HUB_OFFLINE="1"), tmp_path)
    assert "someone/tiny" in line and FILE in line and "online" in line
    assert hub.requests == []


def test_revision_is_asked_for(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", n_layers=2)
    hub.repos["someone/tiny"].revisions["v2"] = {FILE: other.read_bytes()}
    (plan,) = json.loads(done(run("plan", "--json", "model.hub.revision=v2")).stdout)
    layers = {tensor["name"].split(".")[1] for tensor in plan["tensors"] if tensor["name"].startswith("blk.")}
    assert layers == {"0", "1"}, "the other revision has 2 layers"
    assert {request.path for request in hub.requests} == {f"someone/tiny/resolve/v2/{FILE}"}
    hub.requests.clear()
    commit = commit_of("v2")
    right = hashlib.sha256(other.read_bytes()).hexdigest()
    done(run("plan", f"model.hub.revision={commit}", f"model.hub.sha256={right}"))
    assert not hub.requests, "a commit that is in the cache never changes"
    line = refused(run("plan", "model.hub.revision=v3"), tmp_path)
    assert "v3" in line and "404" in line


def test_token_of_the_environment_opens_a_gated_model(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["someone/tiny"].token = TOKEN
    line = refused(run("plan"), tmp_path)
    assert "someone/tiny" in line and "401" in line and "HF_TOKEN" in line
    line = refused(run("plan", HF_TOKEN="hf_wrong"), tmp_path)
    assert "HF_TOKEN" in line and "hf_wrong" not in line
    hub.requests.clear()
    result = done(run("plan", HF_TOKEN=TOKEN))
    assert {request.authorization for request in hub.requests} == {f"Bearer {TOKEN}"}
    assert TOKEN not in result.stdout + result.stderr
    written = [path for path in (*tmp_path.glob("cache*/**/*"), *(tmp_path / "results").rglob("*")) if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()], "a token is never written"


def test_split_model_is_fetched_in_all_its_parts(
    run: Run, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=15))
        write_tiny_llama(folder / "tiny.gguf")
    parts = sorted(folder.iterdir())
    files = {f"F16/{part.name}": part.read_bytes() for part in parts}
    hub.repos["someone/split"] = Repo({"main": files.copy()})
    first = ["model.hub.repo_id=someone/split", f"model.hub.filename=F16/{parts[0].name}"]
    done(run("plan", *first))
    assert len(parts) == 3
    assert [len(hub.asked("GET", name)) for name in files] == [1, 1, 1]

    del files[f"F16/{parts[2].name}"]
    hub.repos["someone/lost"] = Repo({"main": files})
    line = refused(run("plan", *first, "model.hub.repo_id=someone/lost"), tmp_path)
    assert f"lacks F16/{parts[2].name}:" in line


def test_pattern_means_one_model_and_all_of_its_parts(
    run: Run, hub: FakeHub, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=15))
        write_tiny_llama(folder / "tiny-bf16.gguf")
    files = {f"BF16/{part.name}": part.read_bytes() for part in sorted(folder.iterdir())}
    others = {"mmproj-tiny-bf16.gguf": b"a projector", "tiny-Q4_K.gguf": b"another", "README.md": b"a bf16.gguf"}
    hub.repos["someone/tiny"] = Repo({"main": {**others, **files}})
    pattern = "model.hub.filename=*bf16*.gguf"
    result = done(run("plan", pattern))
    assert "fetching BF16/tiny-bf16-00001-of-00003.gguf of someone/tiny" in result.stderr
    assert [len(hub.asked("GET", name)) for name in files] == [1, 1, 1]
    assert not any(hub.asked("GET", name) for name in others)

    hub.requests.clear()
    done(run("plan", pattern, cache="cache-2", HF_HUB_OFFLINE="1"))  # found in the hub's cache
    assert hub.requests == []
    line = refused(run("plan", "model.hub.filename=*Q4*", cache="cache-3", HF_HUB_OFFLINE="1"), tmp_path)
    assert "*Q4*" in line and "tiny-bf16-00001-of-00003.gguf" in line

    del hub.repos["someone/tiny"].revisions["main"]["BF16/tiny-bf16-00003-of-00003.gguf"]
    hub.requests.clear()
    line = refused(run("plan", pattern, cache="cache-4", HF_HOME=str(tmp_path / "hf-2")), tmp_path)
    assert "lacks BF16/tiny-bf16-00003-of-00003.gguf:" in line
    assert not [one for one in hub.requests if "/resolve/" in one.path], "told before anything is fetched"


def test_data_set_of_the_hub_is_the_prompts(run: Run, hub: FakeHub, tiny_gguf: Path, tmp_path: Path) -> None:
    """prompts=wikitext2: the card, its configuration, a parquet file; then the same without a network."""
    rows = [f"{line}\n" for line in random_text(600, seed=1).split(" the ")]
    hub.repos["datasets/Salesforce/wikitext"] = wikitext({"test": rows, "train": [random_text(300, seed=2)]})
    overrides = ["prompts=wikitext2", "prompts.path=null"]
    done(run("sweep", *overrides, "results.name=hub"))
    assert hub.asked("GET", "wikitext-2-raw-v1/test-00000-of-00001.parquet")
    text = "".join(rows)
    (record,) = (r.data for r in read_records(tmp_path / "results" / "hub") if r.data["quant"] == "q8_0")
    assert record["prompt_set"]["name"] == "wikitext2"
    assert record["prompt_set"]["text_sha256"] == hashlib.sha256(text.encode()).hexdigest(), "joined with nothing"
    tokens, bos = tokenize(tiny_gguf, text)[:2]
    id_by_hand = hashlib.sha256(cut_windows(tokens, 2, 128, bos).astype("<i4").tobytes()).hexdigest()
    assert record["prompt_set"]["id"] == id_by_hand

    hub.requests.clear()
    done(run("plan", *overrides, cache="cache-2", HF_HUB_OFFLINE="1"))
    assert hub.requests == []


# -- what is refused


def test_what_the_hub_does_not_have_is_refused(run: Run, tmp_path: Path) -> None:
    cases = {
        "model.hub.filename=a-00002-of-00003.gguf": ["first part", "a-00001-of-00003.gguf"],
        "model.hub.repo_id=a/b/c": ["a/b/c", "model.hub"],
        "model.hub.filename=null": ["someone/tiny", "model.hub.filename", FILE],
    }
    results = together(*(partial(run, "plan", override, cache=f"cache-{i}") for i, override in enumerate(cases)))
    for result, (override, parts) in zip(results, cases.items(), strict=True):
        line = refused(result, tmp_path)
        for part in parts:
            assert part in line, override


FILES = ["README.md", "a-BF16.gguf", "a-Q8_0.gguf", "F16/a-F16-00001-of-00002.gguf", "F16/a-F16-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("pattern", "model"),
    [
        ("*BF16*", "a-BF16.gguf"),
        ("a-[BQ]*16.gguf", "a-BF16.gguf"),
        ("*-F16*.gguf", "F16/a-F16-00001-of-00002.gguf"),
        ("*/*", "F16/a-F16-00001-of-00002.gguf"),
        ("*-00002-of-*", "F16/a-F16-00001-of-00002.gguf"),
        ("?-Q8_0.gguf", "a-Q8_0.gguf"),
    ],
)
def test_pattern_matches(pattern: str, model: str) -> None:
    assert chosen_gguf([*FILES, "mmproj-BF16.gguf"], pattern, "someone/a", "model.hub") == model


@pytest.mark.parametrize(
    ("files", "pattern", "words"),
    [
        (FILES, "*bf16*", ["model.hub.filename=*bf16*", "matches no", "a-BF16.gguf, a-Q8_0.gguf"]),
        (FILES, "*F16*", ["matches 2 models", "a-BF16.gguf", "F16/a-F16-00001-of-00002.gguf"]),
        (FILES, "", ["model.hub.filename=", "a-Q8_0.gguf"]),
        (["mmproj-BF16.gguf"], "*BF16*", ["someone/a", "no GGUF file"]),
        ([], "*", ["no GGUF file"]),
        ([f"{i:03}.gguf" for i in range(300)], "*", ["matches 300 models", "004.gguf and 295 more"]),
        (["x\x1b[2Jy.gguf", "z.gguf"], "*", ["x?[2Jy.gguf"]),
        (["model-00001-of-00002.safetensors", "config.json"], "*.gguf", ["hf download someone/a", "harness convert a"]),
    ],
)
def test_pattern_that_means_none_or_several_is_refused(files: list[str], pattern: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        chosen_gguf(files, pattern, "someone/a", "model.hub")
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()


def test_repository_of_safetensors_names_the_command(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["someone/tiny"] = Repo({"main": {"model.safetensors": b"weights", "config.json": b"{}"}})
    command = "python -m harness convert tiny out=tiny-bf16.gguf"
    pattern, name = together(
        partial(run, "plan", "model.hub.filename=*bf16*.gguf"), partial(run, "plan", cache="cache-2")
    )
    for result in (pattern, name):
        line = refused(result, tmp_path)
        assert command in line and "hf download someone/tiny --local-dir tiny" in line
    assert not hub.asked("GET", "model.safetensors")


def test_pages_instead_of_a_model_are_refused(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    page = b"<!doctype html><title>Sign in to this network</title>"
    hub.repos["someone/tiny"].revisions["page"] = {FILE: page}
    assert "no GGUF file" in refused(run("plan", "model.hub.revision=page"), tmp_path)


def test_data_set_that_is_not_there_is_refused(run: Run, hub: FakeHub, tiny_gguf: Path, tmp_path: Path) -> None:
    wiki = ["prompts=wikitext2", "prompts.path=null"]
    hub.repos["datasets/someone/columns"] = wikitext({"test": ["the of"], "train": ["and"]})
    absent, offline, column = together(
        partial(run, "plan", *wiki, cache="cache-1"),
        partial(run, "plan", *wiki, f"model.path={tiny_gguf}", cache="cache-2", HF_HUB_OFFLINE="1"),
        partial(run, "plan", *wiki, "prompts.hub.repo_id=someone/columns", "prompts.column=nothing", cache="cache-3"),
    )
    assert "Salesforce/wikitext" in refused(absent, tmp_path)
    assert "Salesforce/wikitext" in refused(offline, tmp_path)
    line = refused(column, tmp_path)
    assert "nothing" in line and "someone/columns" in line


# -- connections that break


def test_download_that_is_cut_off_goes_on(run: Run, hub: FakeHub, tiny_gguf: Path) -> None:
    hub.repos["someone/tiny"].cut = 1
    right = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    done(run("plan", f"model.hub.sha256={right}"))
    assert hub.repos["someone/tiny"].cut == 0
    assert len(hub.asked("GET", FILE)) == 2


def test_download_that_never_ends_well_is_refused_and_not_believed(
    run: Run, hub: FakeHub, tiny_gguf: Path, tmp_path: Path
) -> None:
    hub.repos["someone/tiny"].cut = 1000
    line = refused(run("sweep"), tmp_path)
    assert "someone/tiny" in line and FILE in line
    assert not list((tmp_path / "hf" / "hub").glob("models--*/snapshots/*/*"))
    line = refused(run("plan", HF_HUB_OFFLINE="1"), tmp_path)
    assert "not in the hub's cache" in line, "the half that came is not taken for the model"
    hub.repos["someone/tiny"].cut = 0
    right = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    done(run("plan", f"model.hub.sha256={right}"))
