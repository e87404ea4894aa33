"""The fault table of everything but models and what happens in mid-run: texts, imatrix files, policies, settings,
networks, folders, old and new records, other builds of llama.cpp. All of it is told before any work."""

import hashlib
import json
import logging
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub.constants
import numpy as np
from fake_hub import NOBODY, Repo, serve
from faults import Fault, World, can_mount, docs_tables, mounted, not_root, require_refused, table
from test_sources import write_wheel

from harness.engine.collect import Activations
from harness.imatrix import write_imatrix

Make = Callable[[World], Sequence[str]]


def setting(*values: str) -> Make:
    """Settings alone."""
    return lambda _: values


# -- texts


def prompts(content: bytes | str, name: str = "text.txt", *more: str) -> Make:
    """A text as the prompts."""
    return lambda world: [f"prompts.path={world.write(name, content)}", *more]


TEXTS = [
    Fault(
        "prompts-missing",
        lambda world: [f"prompts.path={world.write('prompts.txt', 'the of').with_name('promts.txt')}"],
        says="prompts.path={folder}/promts.txt: no such file; in that folder: prompts.txt",
    ),
    Fault("prompts-empty", prompts(""), says="the text of prompts (text) is empty: give a text with words"),
    Fault(
        "prompts-of-blanks", prompts(" \n\t\r\n "), says="the text of prompts (text) is empty: give a text with words"
    ),
    Fault(
        "prompts-of-one-line",
        prompts("the of and in to a was is\n"),
        says=(
            "the text of prompts (text) is too short: 24 tokens are not enough for 2 windows of 128; use a longer"
            " text, or prompts.window_tokens=12 or less"
        ),
    ),
    Fault(
        "prompts-shorter-than-the-windows",
        lambda world: ["prompts.n_windows=200"],
        says=(
            "the text of prompts (prompts) is too short: 1963 tokens are not enough for 200 windows of 128; use "
            "prompts.n_windows=15"
        ),
    ),
    Fault(
        "prompts-binary",
        prompts(bytes(range(256)) * 20),
        says="prompts.path={folder}/text.txt cannot be read as text ({words}): check the file and prompts.format",
    ),
    Fault(
        "prompts-not-utf8",
        prompts("café ".encode("latin-1") * 500),
        says="prompts.path={folder}/text.txt cannot be read as text ({words}): check the file and prompts.format",
    ),
    Fault(
        "prompts-half-a-json",
        prompts('{"text": "the of"}\n{"te', "text.jsonl"),
        says=("prompts.path={folder}/text.jsonl cannot be read as text ({words}): check the file and prompts.format"),
    ),
    Fault(
        "prompts-without-the-column",
        prompts('{"words": "the of"}\n', "text.jsonl"),
        says="prompts.path={folder}/text.jsonl has no column 'text': it has words; set prompts.column",
    ),
    Fault(
        "prompts-a-folder",
        lambda world: [f"prompts.path={world.folder}"],
        says="prompts.path={folder} is a folder: give a file",
    ),
    Fault(
        "calibration-empty",
        lambda world: [f"calibration.path={world.write('text.txt', '')}"],
        says="the text of calibration (text) is empty: give a text with words",
    ),
    Fault(
        "calibration-is-the-prompts",
        lambda world: [f"calibration.path={world.texts[0]}"],
        says=(
            "100.0% of the prompts' 13-grams occur in the calibration text (prompts): the imatrix would have seen"
            " the test; choose another calibration=, or say calibration.allow_overlap=true"
        ),
    ),
]


# -- imatrix


def given_imatrix(*more: str, **changed: object) -> Make:
    """An imatrix for every matrix of the tiny model, with `changed` ones by role; None leaves them out."""

    def make(world: World) -> list[str]:
        widths = {"attn_q": 256, "attn_k": 256, "attn_v": 256, "attn_output": 256, "ffn_gate": 256, "ffn_up": 256}
        found = {}
        for i in range(4):
            for role, width in {**widths, "ffn_down": 512}.items():
                values = np.ones((1, width), np.float32)
                if role in changed:
                    values = changed[role]
                if values is not None:
                    found[f"blk.{i}.{role}.weight"] = Activations(values, np.ones(1, np.float32))
        path = world.folder / "imatrix.gguf"
        write_imatrix(path, found, dataset="x", n_windows=1, window_tokens=128)
        return [f"calibration.imatrix={path}", "quant=iq2_xs", "results.name=other", *more]

    return make


def imatrix_file(content: bytes, name: str = "imatrix.gguf") -> Make:
    """Any file as the imatrix."""
    return lambda world: [f"calibration.imatrix={world.write(name, content)}"]


def old_imatrix() -> bytes:
    """The .dat format of earlier releases: number of entries; of each its name, calls, values."""
    name = b"blk.0.attn_q.weight"
    return struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii256f", 1, 256, *[1.0] * 256)


def half_an_imatrix(world: World) -> list[str]:
    (path, *_) = (world.cache / "imatrix").glob("*.gguf")
    return list(imatrix_file(path.read_bytes()[:9000])(world))


IMATRICES = [
    Fault(
        "imatrix-missing",
        lambda world: [f"calibration.imatrix={world.folder / 'nothing.gguf'}"],
        says="no imatrix at {folder}/nothing.gguf: check calibration.imatrix",
    ),
    Fault(
        "imatrix-of-the-old-format",
        imatrix_file(old_imatrix(), "imatrix.dat"),
        says=(
            "{folder}/imatrix.dat is no GGUF imatrix: give one that llama-imatrix wrote; it also turns its old "
            "format into one, with llama-imatrix -m MODEL.gguf --in-file OLD.dat -o NEW.gguf"
        ),
    ),
    Fault(
        "imatrix-cut",
        half_an_imatrix,
        says=(
            "{folder}/imatrix.gguf is truncated: 9,000 bytes where its header promises 37,636: fetch it again (it"
            " should be a GGUF imatrix, as llama-imatrix writes)"
        ),
    ),
    Fault(
        "imatrix-is-the-model",
        lambda world: [f"calibration.imatrix={world.model}"],
        says="{model} holds no imatrix (no tensor ends with .in_sum2): give one that llama-imatrix wrote",
    ),
    Fault(
        "imatrix-of-another-model",
        given_imatrix(ffn_down=np.ones((1, 768), np.float32)),
        says=(
            "the imatrix {folder}/imatrix.gguf has 768 values for blk.0.ffn_down.weight, the model needs 512: it "
            "was made from another model"
        ),
    ),
    Fault(
        "imatrix-with-nan",
        given_imatrix(attn_v=np.full((1, 256), np.nan, np.float32)),
        says="{folder}/imatrix.gguf: the values of blk.0.attn_v.weight are not finite: make the imatrix again",
    ),
    Fault(
        "imatrix-lacks-tensors",
        given_imatrix(ffn_up=None),
        says=(
            "the imatrix {folder}/imatrix.gguf has no data for blk.0.ffn_up.weight and 3 more tensors that "
            "quant=iq2_xs needs it for: make it from this model"
        ),
    ),
]


# -- policies and settings


def policy(content: str | bytes) -> Make:
    """A file of rules."""
    return lambda world: [f"policy.file={world.write('rules.yaml', content)}", "mode=dynamicgate"]


SETTINGS = [
    Fault(
        "policy-missing",
        lambda world: [f"policy.file={world.folder / 'rules.yaml'}", "mode=dynamicgate"],
        says="policy.file={folder}/rules.yaml cannot be read (No such file or directory): check the path",
    ),
    Fault(
        "policy-malformed",
        policy("rules: [{name: a, type: q8_0}"),
        says="policy.file={folder}/rules.yaml is no YAML ({words}): mend the file",
    ),
    Fault(
        "policy-binary",
        policy(b"\xff\xfe\x00rules"),
        says="policy.file={folder}/rules.yaml is no YAML ({words}): mend the file",
    ),
    Fault(
        "policy-unknown-key",
        policy("rulez: []\nrules: []\n"),
        says="policy.file={folder}/rules.yaml: unknown key 'rulez'. Did you mean rules?",
    ),
    Fault(
        "policy-unknown-condition",
        policy("rules: [{name: a, type: q8_0, role: [attn_v]}]"),
        says="{folder}/rules.yaml, rule 1: unknown key 'role'. Did you mean roles?",
    ),
    Fault(
        "policy-unknown-type",
        policy("rules: [{name: a, type: q8_1}]"),
        says="{folder}/rules.yaml, rule 1 (a): 'q8_1' is no tensor type. Did you mean q8_0, q5_1, q4_1?",
    ),
    Fault(
        "policy-runs-code",
        policy("rules: !!python/object/apply:os.system [id]\n"),
        says="policy.file={folder}/rules.yaml is no YAML ({words}): mend the file",
    ),
    Fault(
        "policy-of-aliases",
        policy("a: &a [x, x]\nrules: *a\n"),
        says="policy.file={folder}/rules.yaml is no YAML ({words}): mend the file",
    ),
    Fault(
        "unknown-setting",
        setting("prompts.n_window=2"),
        says=(
            "there is no setting 'prompts.n_window'. Did you mean prompts.n_windows, prompts.window_tokens, "
            "prompts.join?"
        ),
    ),
    Fault(
        "unknown-option", setting("quant=q4_q"), says="quant=q4_q is no option of quant. Did you mean q4_k, q4_1, q4_0?"
    ),
    Fault(
        "no-number",
        setting("prompts.n_windows=many"),
        says=(
            "prompts.n_windows=many: Value 'many' of type 'str' could not be converted to Integer (see python -m "
            "harness sweep --help)"
        ),
    ),
    Fault("number-out-of-range", setting("prompts.n_windows=-1"), says="prompts.n_windows=-1: give a number above 0"),
    Fault("threads-beyond-ggml", setting("runtime.threads=4294967297"), "runtime.threads=4294967297: give at most 512"),
    Fault(
        "window-beyond-the-context",
        setting("prompts.window_tokens=513", "prompts.n_windows=1"),
        says="prompts.window_tokens=513: the model was trained for 512 tokens of context, give at most that",
    ),
    Fault(
        "results-of-another-test",
        setting("prompts.n_windows=1"),
        says=(
            "{folder}/results/tiny holds results with another prompt_set.id ({hex}..., now {hex}...): give this "
            "sweep a folder of its own with results.name=NAME"
        ),
    ),
]


# -- the package index


STALLED = b"(an answer that never comes)"
PAGE = b"<!doctype html><title>Sign in to this network</title>"
WHEEL = "harness_words-1.0-py3-none-any.whl"
WORDS = b"the of and in to a was is " * 100


class _Index(BaseHTTPRequestHandler):
    """Answers by path; 404 for all others. A header may promise more than comes."""

    answers: ClassVar[dict[str, bytes]]
    promised: ClassVar[int]

    def do_GET(self) -> None:
        """One answer."""
        body = self.answers.get(self.path.strip("/"))
        if body == STALLED:
            time.sleep(2)
            return
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Type", "text/html" if "simple" in self.path else "application/zip")
        self.send_header("Content-Length", str(len(body or b"") + (self.promised if self.path.endswith("whl") else 0)))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests look at stderr."""


@contextmanager
def package_index(world: World, answers: dict[str, bytes], promised: int) -> Iterator[None]:
    """A package index on 127.0.0.1, the only one that pip knows."""
    handler = type("Handler", (_Index,), {"answers": answers, "promised": promised})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        world.monkeypatch.delenv(name)
    pip = {"CONFIG_FILE": os.devnull, "RETRIES": "0", "TIMEOUT": "1", "NO_CACHE_DIR": "1"}
    for name, value in {**pip, "INDEX_URL": f"http://127.0.0.1:{server.server_address[1]}/simple"}.items():
        world.monkeypatch.setenv(f"PIP_{name}", value)
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wheel_of(world: World, content: bytes) -> bytes:
    """A wheel with that text."""
    return write_wheel(world.folder, "harness_words", "1.0", {"words/a.txt": content}).read_bytes()


def fetched(
    served: Callable[[World], bytes] | None, listed: bytes | None = f'<a href="/{WHEEL}">'.encode(), promised: int = 0
) -> Make:
    """The prompts come from a wheel; `listed` is the index' page of the package, `served` the file."""

    def make(world: World) -> list[str]:
        answers = {"simple/harness-words": listed} if listed else {}
        if served:
            answers[WHEEL] = served(world)
        world.stack.enter_context(package_index(world, answers, promised))
        wanted = hashlib.sha256(WORDS).hexdigest()
        settings = {"package": "'harness-words==1.0'", "member": "words/a.txt", "sha256": wanted}
        return ["prompts.path=null", *(f"prompts.wheel.{name}={value}" for name, value in settings.items())]

    return make


def index_down(world: World) -> Sequence[str]:
    settings = fetched(None)(world)
    world.monkeypatch.setenv("PIP_INDEX_URL", f"{NOBODY}/simple")
    return settings


WHEELS = [
    Fault(
        "wheel-gone-from-the-index",
        fetched(None, None),
        says=(
            "pip cannot fetch harness-words==1.0 ({words}): check the connection to the package index, or give a "
            "local file with model.path / prompts.path / calibration.path"
        ),
    ),
    Fault(
        "wheel-listed-but-gone",
        fetched(None),
        says=(
            "pip cannot fetch harness-words==1.0 ({words}): check the connection to the package index, or give a "
            "local file with model.path / prompts.path / calibration.path"
        ),
    ),
    Fault(
        "index-down",
        index_down,
        says=(
            "pip cannot fetch harness-words==1.0 ({words}): check the connection to the package index, or give a "
            "local file with model.path / prompts.path / calibration.path"
        ),
    ),
    Fault(
        "index-does-not-answer",
        fetched(None, STALLED),
        says=(
            "pip cannot fetch harness-words==1.0 ({words}): check the connection to the package index, or give a "
            "local file with model.path / prompts.path / calibration.path"
        ),
    ),
    Fault(
        "wheel-stalls",
        fetched(lambda _: STALLED),
        says=(
            "pip cannot fetch harness-words==1.0 ({words}): check the connection to the package index, or give a "
            "local file with model.path / prompts.path / calibration.path"
        ),
    ),
    Fault(
        "wheel-cut-midway",
        fetched(lambda world: wheel_of(world, WORDS)[:500], promised=500),
        says=(
            "pip cannot fetch harness-words==1.0 ({words}): check the connection to the package index, or give a "
            "local file with model.path / prompts.path / calibration.path"
        ),
    ),
    Fault(
        "wheel-is-a-page",
        fetched(lambda _: PAGE),
        says=(
            "pip cannot fetch harness-words==1.0 ({words}): check the connection to the package index, or give a "
            "local file with model.path / prompts.path / calibration.path"
        ),
    ),
    Fault(
        "wheel-of-another-sha256",
        fetched(lambda world: wheel_of(world, WORDS + b"the")),
        says=(
            "harness-words==1.0: words/a.txt has sha256 {hex}, expected {hex}: the package index served another "
            "file, it was not used"
        ),
    ),
]


# -- the hub


def hub(at: str | None = None, **trouble: Any) -> Make:
    """The model comes from a hub on 127.0.0.1 (or at that address); the hub's cache is empty."""

    def make(world: World) -> list[str]:
        served = world.stack.enter_context(serve())
        served.repos["someone/tiny"] = Repo({"main": {"tiny.gguf": world.model.read_bytes()}}, **trouble)
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            world.monkeypatch.delenv(name)
        url_of_files = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        constants = {
            "ENDPOINT": at or served.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": (at or served.url) + url_of_files[url_of_files.index("/{repo_id}") :],
            "HF_HUB_CACHE": f"{world.folder}/hub",
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.2,
            "HF_HUB_ETAG_TIMEOUT": 0.2,
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in constants.items():
            world.monkeypatch.setattr(huggingface_hub.constants, name, value)
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})  # between its retries
        for module in ("utils._http", "file_download"):
            world.monkeypatch.setattr(f"huggingface_hub.{module}.time", impatient)
        world.monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [logging.NullHandler()])
        return ["model.path=null", "model.hub.repo_id=someone/tiny", "model.hub.filename=tiny.gguf"]

    return make


def hub_with(*settings: str) -> Make:
    """A sound hub, asked for something else."""
    return lambda world: [*hub()(world), *settings]


HUBS = [
    Fault(
        "hub-down",
        hub(NOBODY),
        says=("someone/tiny/tiny.gguf at main is not in the hub's cache and the hub cannot be reached: go online once"),
    ),
    Fault(
        "hub-does-not-answer",
        hub(stall_s=0.5),
        says="the hub does not give someone/tiny/tiny.gguf at main ({words}): check the connection and try again",
    ),
    Fault(
        "hub-cuts-every-download",
        hub(cut=1000),
        says="the hub does not give someone/tiny/tiny.gguf at main ({words}): check the connection and try again",
    ),
    Fault(
        "hub-gives-a-page",
        hub(page=PAGE),
        says=("someone/tiny/tiny.gguf at main is not in the hub's cache and the hub cannot be reached: go online once"),
    ),
    Fault(
        "hub-gives-another-size",
        hub(other=b"GGUF"),
        says="the hub does not give someone/tiny/tiny.gguf at main ({words}): check the connection and try again",
    ),
    Fault(
        "hub-wants-a-token",
        hub(token="hf_nobody"),
        says=(
            "the hub does not give someone/tiny/tiny.gguf at main ({words}): check model.hub.*, and HF_TOKEN if gated"
        ),
    ),
    Fault(
        "hub-lacks-the-file",
        hub_with("model.hub.filename=other.gguf"),
        says=(
            "the hub does not give someone/tiny/other.gguf at main ({words}): check model.hub.*, and HF_TOKEN if "
            "gated; it has tiny.gguf"
        ),
    ),
    Fault(
        "hub-lacks-the-repository",
        hub_with("model.hub.repo_id=someone/other"),
        says=(
            "the hub does not give someone/other/tiny.gguf at main ({words}): check model.hub.*, and HF_TOKEN if gated"
        ),
    ),
    Fault(
        "hub-gives-another-sha256",
        hub_with(f"model.hub.sha256={'0' * 64}"),
        says="someone/tiny/tiny.gguf at main has sha256 {hex}, expected {hex}: check model.hub.revision",
    ),
]


# -- files and folders


def in_place_of(name: str, *settings: str) -> Make:
    """A file where a folder must be."""

    def make(world: World) -> Sequence[str]:
        path = world.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no folder")
        return settings

    return make


def read_only(world: World) -> Sequence[str]:
    folder = world.folder / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    return [f"results.dir={folder}"]


def read_only_disk(world: World) -> Sequence[str]:
    return [f"results.dir={mounted(world, 'disk', 'ro')}"]


def no_room(world: World) -> Sequence[str]:
    world.monkeypatch.setattr("harness.reference.free_bytes", lambda _: 1000)
    return []


def small_disk(world: World) -> Sequence[str]:
    return [f"runtime.cache_dir={mounted(world, 'disk', 'size=300k')}"]


def newer_record(world: World) -> Sequence[str]:
    """Of q8_0, as a later release may write it."""
    (path,) = (world.results / "records").glob("q8_0*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    return []


FILES = [
    Fault(
        "model-of-another-sha256",
        setting(f"model.sha256={'0' * 64}"),
        says="model.path={model} has sha256 {hex}, expected {hex}: fetch the file again",
    ),
    Fault(
        "results-a-file",
        in_place_of("file", "results.dir={folder}/file"),
        says=(
            "results.dir={folder}/file: {folder}/file/tiny/records cannot be written (Not a directory): give "
            "another folder"
        ),
    ),
    Fault(
        "records-a-file",
        in_place_of("results/new/records", "results.name=new"),
        says=(
            "results.dir={folder}/results: {folder}/results/new/records cannot be written (Not a directory): give"
            " another folder"
        ),
    ),
    Fault(
        "results-read-only",
        read_only,
        says="results.dir={folder}/locked: {folder}/locked/tiny/records cannot be written (Permission denied): "
        "give another folder",
        marks=[not_root],
    ),
    Fault(
        "results-on-a-read-only-disk",
        read_only_disk,
        says=(
            "results.dir={folder}/disk: {folder}/disk/tiny/records cannot be written (Read-only file system): "
            "give another folder"
        ),
        marks=[can_mount],
    ),
    Fault(
        "cache-a-file",
        in_place_of("file", "runtime.cache_dir={folder}/file"),
        says="runtime.cache_dir={folder}/file cannot be written (File exists): give another folder",
    ),
    Fault(
        "no-room-for-the-plan",
        no_room,
        says=(
            "{folder}/cache has {number} MB free, and {number} MB are needed for the quantized variants and the "
            "reference's probabilities: make room or set runtime.cache_dir to a larger disk"
        ),
    ),
    Fault(
        "cache-on-a-small-disk",
        small_disk,
        says=(
            "{folder}/disk has {number} MB free, and {number} MB are needed for the quantized variants and the "
            "reference's probabilities: make room or set runtime.cache_dir to a larger disk"
        ),
        marks=[can_mount],
    ),
    Fault(
        "record-of-a-newer-version",
        newer_record,
        says=(
            "{folder}/results/tiny/records/q8_0-standard-{hex}.json has record version 2, this harness reads 1: "
            "use the harness that wrote it, or another folder with results.name=NAME"
        ),
    ),
]


# -- llama-cpp-python


def version(found: str | None) -> Make:
    """Another release is installed, or none."""

    def answer(_: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    def make(world: World) -> Sequence[str]:
        world.monkeypatch.setattr("harness.prepare.version", answer)
        return []

    return make


def package(code: str, library: str | None = None) -> Make:
    """A package llama_cpp of that code in place of the real one, for the children that load it."""

    def make(world: World) -> Sequence[str]:
        folder = world.folder / "site" / "llama_cpp"
        (folder / "lib").mkdir(parents=True)
        (folder / "__init__.py").write_text(code)
        if library:
            shutil.copy(library, folder / "lib" / "libggml-base.so")
        world.monkeypatch.syspath_prepend(folder.parent)  # children get it too
        return ["prompts.n_windows=1", "results.name=other"]  # not in the cache

    return make


ENGINES = [
    Fault(
        "llama-cpp-python-not-installed",
        version(None),
        says="llama-cpp-python is not installed, the harness needs 0.3.36: pip install llama-cpp-python==0.3.36",
    ),
    Fault(
        "llama-cpp-python-of-another-version",
        version("0.3.37"),
        says="llama-cpp-python is 0.3.37, the harness needs 0.3.36: pip install llama-cpp-python==0.3.36",
    ),
    Fault(
        "llama.cpp-does-not-load",
        package("raise RuntimeError('Failed to load shared library')"),
        says=(
            "the text of prompts (prompts) cannot be made tokens of (RuntimeError: Failed to load shared library): "
            "see {folder}/cache/logs/tokenize-prompts.log"
        ),
    ),
    Fault(
        "llama.cpp-without-its-library",
        package(""),
        says=(
            "the text of prompts (prompts) cannot be made tokens of (AttributeError: module 'llama_cpp' has no "
            "attribute 'llama_model_default_params'): see {folder}/cache/logs/tokenize-prompts.log"
        ),
    ),
    Fault(
        "llama.cpp-lacks-a-function",
        package("", find_spec("numpy.random.bit_generator").origin),
        says=(
            "the text of prompts (prompts) cannot be made tokens of (AttributeError: module 'llama_cpp' has no "
            "attribute 'llama_model_default_params'): see {folder}/cache/logs/tokenize-prompts.log"
        ),
    ),
]


FAULTS = [*TEXTS, *IMATRICES, *SETTINGS, *WHEELS, *HUBS, *FILES, *ENGINES]


@table(FAULTS)
def test_trouble_is_told_before_any_work(fault: Fault, world: World) -> None:
    require_refused(fault, world)


def test_the_table_in_the_docs_is_this_one() -> None:
    """To write it anew: PYTHONPATH=. python tests/faults.py"""
    text = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    for part in docs_tables():
        assert part in text
