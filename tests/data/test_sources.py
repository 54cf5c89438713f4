import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from sft_recipes.data import sources
from sft_recipes.data.sources import SourceRow
from sft_recipes.errors import DataError

ROWS = [{"text": "a"}, {"text": "ü漢"}]


def read(path: Path | str) -> list[dict[str, object]]:
    rows = list(sources.iter_rows(str(path)))
    assert not [row for row in rows if isinstance(row, DataError)]
    return [dict(row.values) for row in rows if isinstance(row, sources.SourceRow)]


def problem(path: Path | str) -> str:
    """Return the one problem of a file, raised or among its rows."""
    try:
        [error] = [row for row in sources.iter_rows(str(path)) if isinstance(row, DataError)]
    except DataError as raised:
        error = raised
    return str(error)


def write(file: Path, content: str | bytes) -> Path:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def jsonl(rows: list[dict[str, str]] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_the_four_kinds_of_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", jsonl())
    write(tmp_path / "a.json", json.dumps(ROWS))
    write(tmp_path / "a.csv", "text\na\nü漢\n")

    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert read(tmp_path / name) == ROWS, name


def test_gzipped(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl().encode()))

    assert read(tmp_path / "a.jsonl.gz") == ROWS


def test_csv_that_would_lose_rows(tmp_path: Path) -> None:
    """An unclosed quote, a duplicate column."""
    file = write(tmp_path / "a.csv", 'prompt,completion\nhi,yes\nfoo,"bar\nq,a\n')
    assert "invalid CSV" in problem(file)
    file = write(tmp_path / "b.csv", "prompt,prompt\nhi,yes\n")
    assert "b.csv:1: duplicate column in the header (got 'prompt', 'prompt')." in problem(file)


def test_json_beyond_measure(tmp_path: Path) -> None:
    for content in ("[" * 200_000, '{"text": ' + "1" * 5000 + "}"):
        assert "a.jsonl:1: JSON exceeds the parser's limits" in problem(write(tmp_path / "a.jsonl", content + "\n"))
        assert "a.json: JSON exceeds the parser's limits" in problem(write(tmp_path / "a.json", content))


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a[1].jsonl", jsonl())) == ROWS
    assert read(f"{tmp_path}/**") == ROWS


def test_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "\ufeff" + jsonl().replace("\n", "\n\n  \n"))
    write(tmp_path / "a.json", "\ufeff" + json.dumps(ROWS))
    write(tmp_path / "a.csv", "\ufefftext\na\nü漢\n")

    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.json") == read(tmp_path / "a.csv") == ROWS


def test_places_are_line_numbers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"a": 1}\n\nbroken\n[1]\n')

    rows = list(sources.iter_rows(str(file)))
    assert [str(row) if isinstance(row, DataError) else row.place for row in rows] == [
        f"{file}:1",
        f"{file}:3:1: invalid JSON: expecting value.",
        f"{file}:4: expected an object with columns (got [1]).",
    ]


def test_globs_and_directories_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}) + "\n")
    write(tmp_path / "notes.txt", "no data")

    assert read(f"{tmp_path}/*.jsonl") == read(tmp_path) == [{"text": "a"}, {"text": "b"}]


def test_built_in_data() -> None:
    assert len(read("builtin:tasks/heldout.jsonl")) == 200
    assert "Choose one of builtin:tasks/heldout.jsonl, builtin:tasks/train.jsonl." in problem("builtin:nothing")


def test_a_long_field_of_csv(tmp_path: Path) -> None:
    assert len(str(read(write(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n"))[0]["text"])) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", '{"a": "x\n', ":1:7: invalid JSON: unterminated string."),
        ("a.jsonl", b'{"a": "\xff"}\n', ":1: invalid UTF-8"),
        ("a.json", "{}", "expected a list of objects (got {"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "Rename a file with one object per line to .jsonl."),
        ("a.json", b'["\xff"]', "invalid UTF-8"),
        ("a.csv", "a,b\n1,2,3\n", ":2: number of fields differs from the header (expected 2)."),
        ("a.csv", "a,b\n1\n", ":2: number of fields differs from the header (expected 2)."),
        ("a.csv", b"a\n\xff\n", "invalid UTF-8"),
        ("a.parquet", "PAR1", "invalid Parquet file"),
        ("a.jsonl.gz", "not gzip", "cannot read the file"),
        ("a.txt", "x", "unsupported file type (expected .jsonl, .json, .csv, .parquet"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    file = write(tmp_path / name, content)

    assert problem(file).startswith(str(file))
    assert said in problem(file)


@pytest.mark.parametrize("path", ["none.jsonl", "a/b/c", "/no/such"])
def test_no_such_file(path: str) -> None:
    assert problem(path).startswith(f"{path}: file not found")


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    assert "no file matches this pattern" in problem(f"{tmp_path}/*.jsonl")


def test_a_directory_without_data(tmp_path: Path) -> None:
    assert "contains no data files" in problem(tmp_path)


def test_a_hub_id_without_the_hub() -> None:
    assert sources.files("nobody/nothing") is None
    assert problem("nobody/nothing").startswith(
        "nobody/nothing: no such local file, and it cannot be loaded from the Hub"
    )


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", jsonl())
    before = sources.fingerprint(str(file))

    assert sources.fingerprint(str(file)) == before
    write(file, jsonl() + " ")
    assert sources.fingerprint(str(file)) != before


def test_objects_of_a_table_have_the_keys_that_were_written(tmp_path: Path) -> None:
    """Arrow adds the keys of all rows, with nulls."""
    calls = [{"name": "now", "arguments": {"tz": "utc"}}, {"name": "weather", "arguments": {"city": "Zürich"}}]
    table = pa.Table.from_pylist([{"calls": [call], "note": None} for call in calls])
    pq.write_table(table, tmp_path / "a.parquet")

    assert [
        row.values["calls"] for row in sources.iter_rows(str(tmp_path / "a.parquet")) if isinstance(row, SourceRow)
    ] == [[call] for call in calls]


def test_a_damaged_archive(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b'{"a": "b"}\n' * 1000))
    packed[20] ^= 0xFF
    packed[25] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot read the file"):
        list(sources.iter_rows(str(tmp_path / "a.jsonl.gz")))


def test_rows_of_a_large_file_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b'{"text": "a line of text"}\n' * 400_000
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    monkeypatch.setattr(sources, "QUICK", 1 << 21)

    for name in ("a.jsonl", "a.jsonl.gz"):
        assert sources.count(str(tmp_path / name)) == pytest.approx(400_000, rel=0.15)
