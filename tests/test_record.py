"""Records: written and read back, damaged ones, which of two wins, and what may stand in one table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.errors import UserError
from harness.record import (
    COMPARABLE,
    SCHEMA_VERSION,
    Record,
    all_records,
    environment,
    field,
    find_record,
    first_difference,
    is_done,
    mode_label,
    physical_cores,
    read_record,
    read_records,
    record_path,
    utc_now,
    write_record,
)
from harness.store import sha256_file

NLL = np.random.default_rng(0).exponential(2.0, (2, 7))
SIDE = {"nll": NLL, "top": np.arange(14, dtype=np.int32).reshape(2, 7), "kld": NLL / 10}
KEY = "a" * 64


def data(**changes: Any) -> dict[str, Any]:
    """What a record of a measured case holds, as far as this module looks at it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "key": KEY,
        "quant": "iq1_m",
        "mode": "standard",
        "policy": None,
        "created_utc": "2026-01-02T03:04:05.678901+00:00",
        "status": "ok",
        "reference": {"id": "ref"},
        "prompt_set": {"id": "prompts", "n_windows": 2, "window_tokens": 8},
        "calibration": {"id": "calibration"},
        "settings": {"first_scored": 65, "ubatch_tokens": 512, "flash_attention": True, "threads": 2},
        "versions": {"metrics": 1, "llama_cpp_python": "0.3.36"},
        **changes,
    }


def put(folder: Path, *, nll: np.ndarray | None = NLL, **changes: Any) -> Path:
    """Write a record below a sweep's folder."""
    record = data(**changes)
    path = record_path(folder, record["quant"], record["mode"], record["key"])
    write_record(path, record, {} if nll is None else {**SIDE, "nll": nll})
    return path


def test_a_record_survives_writing_and_reading(tmp_path: Path) -> None:
    path = put(tmp_path, note="Δ")
    record = read_record(path)
    assert path == tmp_path / "records" / "iq1_m-standard-aaaaaaaaaaaa.json"
    assert {name: record.data[name] for name in data()} == data()
    assert record.data["note"] == "Δ"
    assert (record.ok, record.label, record.path) == (True, ("iq1_m", "standard", None), path)
    values = record.per_token()
    assert {name: array.dtype for name, array in values.items()} == {
        "nll": np.float64,
        "top": np.int32,
        "kld": np.float64,
    }
    for name, array in SIDE.items():
        np.testing.assert_array_equal(values[name], array)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.with_suffix(s).name for s in (".json", ".npz")]


def test_writing_does_not_change_the_data_given(tmp_path: Path) -> None:
    record = data()
    write_record(tmp_path / "a.json", record, {"nll": NLL})
    assert record == data()


def test_a_failed_case_has_no_side_file(tmp_path: Path) -> None:
    path = put(tmp_path, nll=None, status="failed", error="boom")
    record = read_record(path)
    assert not record.ok
    assert not path.with_suffix(".npz").exists()
    assert not is_done(path, KEY)


def test_a_record_without_values_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The side file comes first: whoever is stopped in between has no record that vouches for nothing."""
    import harness.record

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness.record, "write_json", stopped)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path)
    assert [p.suffix for p in (tmp_path / "records").iterdir()] == [".npz"]
    assert read_records(tmp_path) == []


# --- damaged records

DAMAGED = [
    pytest.param(b"", id="empty"),
    pytest.param(b'{"schema_version": 1, "key', id="cut off"),
    pytest.param(b"\xff\xfe\x00", id="no text"),
    pytest.param(b"{}", id="no version"),
    pytest.param(b"[]", id="a list"),
    pytest.param(b"7", id="a number"),
    pytest.param(b'"schema_version"', id="a string"),
    pytest.param(b"null", id="null"),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = put(tmp_path)
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_record(path)
    assert all_records(tmp_path)[1] == [str(caught.value)]
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_records(tmp_path) == []
    assert not is_done(path, KEY)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", r'"\udcff"', r'{"\ud800": 1}'])
def test_values_that_cannot_be_written_again_are_refused(tmp_path: Path, value: str) -> None:
    path = put(tmp_path, nll=None)
    read_record(path)
    path.write_text(path.read_text().rstrip().removesuffix("}") + f', "more": {value}}}')
    with pytest.raises(UserError, match="is no whole record"):
        read_record(path)


@pytest.mark.parametrize("version", [0, "1", None])
def test_another_version_is_refused_with_both_numbers(tmp_path: Path, version: Any) -> None:
    path = put(tmp_path, schema_version=version)
    with pytest.raises(UserError) as caught:
        read_record(path)
    for word in (str(path), str(version), str(SCHEMA_VERSION)):
        assert word in str(caught.value)
    assert not is_done(path, KEY)


@pytest.mark.parametrize("name", ["status", "created_utc", "quant", "mode"])
def test_a_record_that_lacks_a_field_is_refused(tmp_path: Path, name: str) -> None:
    path = put(tmp_path)
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=name):
        read_record(path)
    assert read_records(tmp_path) == []


@pytest.mark.parametrize("name", ["status", "key", "side_file_sha256"])
def test_a_record_that_lacks_a_field_is_not_done(tmp_path: Path, name: str) -> None:
    path = put(tmp_path)
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))
    assert not is_done(path, KEY)


# --- is_done


def test_a_whole_record_of_this_case_is_done(tmp_path: Path) -> None:
    path = put(tmp_path)
    assert is_done(path, KEY)
    assert not is_done(path, "a" * 12 + "b" * 52), "the same file name, another case"
    assert not is_done(tmp_path / "records" / "no.json", KEY)


def test_a_changed_side_file_is_not_done(tmp_path: Path) -> None:
    path = put(tmp_path)
    side = path.with_suffix(".npz")
    content = bytearray(side.read_bytes())
    content[-1] ^= 1
    side.write_bytes(content)
    assert not is_done(path, KEY)
    with pytest.raises(UserError, match=side.name):
        read_record(path).per_token()


def test_a_side_file_of_other_values_is_not_done(tmp_path: Path) -> None:
    path = put(tmp_path)
    with path.with_suffix(".npz").open("wb") as file:
        np.savez(file, nll=NLL + 1)
    assert not is_done(path, KEY)


@pytest.mark.parametrize(
    "values",
    [
        {"nll": NLL},
        {"nll": NLL, "top": np.zeros(3, np.int32)},
        {"nll": NLL.astype(str), "top": NLL},
        {"nll": NLL, "top": NLL, "kld": np.full(NLL.shape, np.nan)},
        {"nll": NLL, "top": NLL, "kld": np.zeros((1, 1))},
        {"nll": NLL[0], "top": NLL[0]},
    ],
    ids=["no top", "other shape", "text", "nan", "other kld", "one window"],
)
def test_a_side_file_that_is_vouched_for_may_still_be_odd(tmp_path: Path, values: dict[str, np.ndarray]) -> None:
    path = put(tmp_path)
    write_record(path, json.loads(path.read_text()), values)
    with pytest.raises(UserError, match="holds no per-token values"):
        read_record(path).per_token()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole.replace(b"PK\1\2-\3-\0\0", b"PK\1\2-\3\xd2\0\0"),  # of a zip version to come
        lambda whole: whole.replace(b"PK\1\2-\3-\0\0", b"PK\1\2-\3-\0\1"),  # encrypted
        lambda whole: whole.replace(b"<f8", b"|O8"),  # pickled objects
        lambda whole: whole.replace(b"(2, ", b"(2(("),
        lambda whole: b"\x93NUMPY" + whole,
        lambda _: b"",
    ],
)
def test_a_side_file_that_is_vouched_for_may_be_no_npz(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = put(tmp_path)
    side = path.with_suffix(".npz")
    assert damage(side.read_bytes()) != side.read_bytes()
    side.write_bytes(damage(side.read_bytes()))
    path.write_text(json.dumps({**json.loads(path.read_text()), "side_file_sha256": sha256_file(side)}))
    with pytest.raises(UserError, match="holds no per-token values"):
        read_record(path).per_token()


def test_what_unpacks_to_more_than_it_takes_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path)
    side = path.with_suffix(".npz")
    np.savez_compressed(side, **{**SIDE, "more": np.zeros(1_000_000)})
    assert side.stat().st_size < 10_000
    path.write_text(json.dumps({**json.loads(path.read_text()), "side_file_sha256": sha256_file(side)}))
    with pytest.raises(UserError, match="holds no per-token values"):
        read_record(path).per_token()


def test_a_huge_record_is_not_read(tmp_path: Path) -> None:
    path = put(tmp_path)
    with path.open("rb+") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="more than 64 MiB"):
        read_record(path)


def test_a_missing_side_file_is_not_done(tmp_path: Path) -> None:
    path = put(tmp_path)
    path.with_suffix(".npz").unlink()
    assert not is_done(path, KEY)
    with pytest.raises(UserError, match=path.with_suffix(".npz").name):
        read_record(path).per_token()


def test_a_failure_is_not_done_even_where_an_earlier_success_left_its_values(tmp_path: Path) -> None:
    path = put(tmp_path)
    assert put(tmp_path, nll=None, status="failed") == path
    assert path.with_suffix(".npz").is_file()
    assert is_done(path, KEY) is False


def test_a_record_without_tokens_is_not_done(tmp_path: Path) -> None:
    assert not is_done(put(tmp_path, nll=np.empty((0, 0))), KEY)


# --- all records of a sweep


def test_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path) == []
    assert read_records(tmp_path / "never made") == []


def test_records_come_oldest_first(tmp_path: Path) -> None:
    for quant, when in [("iq1_m", "10:00:02"), ("iq2_s", "10:00:00"), ("q4_0", "10:00:01")]:
        put(tmp_path, quant=quant, created_utc=f"2026-01-01T{when}+00:00")
    assert [record.data["quant"] for record in read_records(tmp_path)] == ["iq2_s", "q4_0", "iq1_m"]


@pytest.mark.parametrize("newer", ["a", "b"])
def test_the_newest_of_one_label_wins(tmp_path: Path, newer: str) -> None:
    for letter in "ab":
        year = 2026 if letter == newer else 2025
        put(tmp_path, key=letter * 64, created_utc=f"{year}-06-01T00:00:00+00:00")
    (record,) = read_records(tmp_path)
    assert record.data["key"] == newer * 64


def test_a_newer_failure_hides_the_older_success(tmp_path: Path) -> None:
    put(tmp_path, key="a" * 64, created_utc="2025-01-01T00:00:00+00:00")
    put(tmp_path, key="b" * 64, created_utc="2026-01-01T00:00:00+00:00", nll=None, status="failed")
    (record,) = read_records(tmp_path)
    assert not record.ok


def test_mode_policy_and_quant_make_the_label(tmp_path: Path) -> None:
    labels = [
        ("iq1_m", "standard", None),
        ("iq1_m", "dynamicgate", "dynamicgate"),
        ("iq1_m", "dynamicgate", "mine"),
        ("iq1_s", "dynamicgate", "mine"),
    ]
    for i, (quant, mode, policy) in enumerate(labels):
        put(tmp_path, quant=quant, mode=mode, policy=policy, key=str(i) * 64)
    assert {record.label for record in read_records(tmp_path)} == set(labels)


# --- names


@pytest.mark.parametrize(
    ("quant", "mode", "policy", "name"),
    [
        ("reference", "reference", None, "reference"),
        ("iq1_m", "standard", None, "iq1_m-standard"),
        ("iq1_m", "dynamicgate", "dynamicgate", "iq1_m-dynamicgate"),
        ("iq1_m", "dynamicgate", "mine", "iq1_m-dynamicgate+mine"),
        ("iq2_s", "placebo", "dynamicgate", "iq2_s-placebo+dynamicgate"),
    ],
)
def test_name(quant: str, mode: str, policy: str | None, name: str) -> None:
    assert Record(data(quant=quant, mode=mode, policy=policy), Path("a.json")).name == name
    assert name in (mode, f"{quant}-{mode_label(mode, policy)}")


def test_a_case_is_found_by_its_name(tmp_path: Path) -> None:
    path = put(tmp_path / "one")
    put(tmp_path / "one", mode="dynamicgate", policy="dynamicgate", key="b" * 64)
    put(tmp_path / "two", quant="iq2_s", key="c" * 64)
    found = find_record(tmp_path, "iq1_m-standard")
    assert (found.path, found.name) == (path, "iq1_m-standard")
    assert find_record(tmp_path, "iq2_s-standard", "two").path.parent.parent.name == "two"
    assert find_record(Path("elsewhere"), str(path)).name == "iq1_m-standard", "the path of a record is a name too"


def test_a_name_in_two_sweeps_asks_which(tmp_path: Path) -> None:
    for sweep in ("one", "two"):
        put(tmp_path / sweep)
    with pytest.raises(UserError, match=r"one, two.*results\.name=") as caught:
        find_record(tmp_path, "iq1_m-standard")
    assert "\n" not in str(caught.value)
    assert find_record(tmp_path, "iq1_m-standard", "two").path.parent.parent.name == "two"


def test_a_name_that_is_not_there_tells_the_nearest(tmp_path: Path) -> None:
    put(tmp_path / "one")
    put(tmp_path / "one", mode="dynamicgate", policy="dynamicgate", key="b" * 64, nll=None, status="failed")
    with pytest.raises(UserError, match=r"Did you mean iq1_m-standard\?"):
        find_record(tmp_path, "iq1_m-standrad")
    with pytest.raises(UserError, match="no measured case 'iq1_m-dynamicgate'"):
        find_record(tmp_path, "iq1_m-dynamicgate")
    with pytest.raises(UserError, match="no measured case"):
        find_record(tmp_path, "iq1_m-standard", "another")
    with pytest.raises(UserError, match=r"no record at /no/where\.json"):
        find_record(tmp_path, "/no/where.json")


# --- what may stand in one table


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """A record with one field of another value."""
    group, name = dotted.split(".")
    return data(**{group: {**data()[group], name: value}})


def test_like_records_do_not_differ() -> None:
    assert first_difference([]) is None
    assert first_difference([data()]) is None
    assert first_difference([data(), data(quant="q4_0", key="b" * 64, mode="dynamicgate"), data()]) is None


@pytest.mark.parametrize("name", COMPARABLE)
def test_a_difference_names_the_field_and_both_values(name: str) -> None:
    one = field(data(), name) or "probabilities"  # what older records, which do not say it, were made with
    assert first_difference([data(), data(), changed(name, "other")]) == (name, one, "other")
    assert first_difference([changed(name, "other"), data()]) == (name, "other", one)


def test_everything_that_moves_a_number_is_compared() -> None:
    assert set(COMPARABLE) == {
        "reference.id",
        "prompt_set.id",
        "prompt_set.n_windows",
        "prompt_set.window_tokens",
        "calibration.id",
        "settings.first_scored",
        "settings.ubatch_tokens",
        "settings.flash_attention",
        "settings.threads",
        "settings.kld_reference",
        "versions.metrics",
        "versions.llama_cpp_python",
    }


def test_the_first_of_several_differences_is_named() -> None:
    other = changed("settings.threads", 8) | {"prompt_set": {"id": "other", "n_windows": 2, "window_tokens": 8}}
    assert first_difference([data(), other]) == ("prompt_set.id", "prompts", "other")


def test_the_reference_has_no_calibration_and_does_not_differ_for_that() -> None:
    reference = data(mode="reference", quant="reference", calibration=None)
    assert first_difference([reference, data(), data()]) is None
    assert first_difference([data(), reference]) is None
    assert first_difference([reference, reference]) is None
    other = changed("calibration.id", "other")
    assert first_difference([reference, data(), other]) == ("calibration.id", "calibration", "other")
    assert first_difference([data(), reference, other]) == ("calibration.id", "calibration", "other")


def test_a_missing_field_differs_from_a_value() -> None:
    assert first_difference([data(), data(settings={})]) == ("settings.first_scored", 65, None)
    assert first_difference([data(prompt_set=None), data()]) == ("prompt_set.id", None, "prompts")


def test_a_variant_without_imatrix_differs_from_one_with() -> None:
    assert first_difference([data(calibration=None), data()]) == ("calibration.id", None, "calibration")


def test_first_difference_takes_any_iterable() -> None:
    assert first_difference(iter([data(), changed("settings.threads", 8)])) == ("settings.threads", 2, 8)


def test_field() -> None:
    nested = {"a": {"b": {"c": 0}}, "x": None}
    assert field(nested, "a.b.c") == 0
    assert field(nested, "a.b") == {"c": 0}
    assert field(nested, "a.z.c") is None
    assert field(nested, "x.y") is None
    assert field(nested, "a.b.c.d") is None


# --- the machine


def test_environment_is_plain_json_and_says_where() -> None:
    found = environment({"llama_cpp_python": "0.3.36", "system_info": "AVX2 = 1"})
    assert json.loads(json.dumps(found)) == found
    assert found["system_info"] == "AVX2 = 1"
    for name in ("harness", "python", "platform", "cpu", "cores_logical", "memory_bytes"):
        assert found[name], name


def test_time_and_cores_have_their_form() -> None:
    now = utc_now()
    assert len(now) == len("2026-01-02T03:04:05.678901+00:00")
    assert now.endswith("+00:00")
    assert physical_cores() >= 1


def test_a_record_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Record(data(), Path("a.json")).path = Path("b.json")  # type: ignore[misc]
