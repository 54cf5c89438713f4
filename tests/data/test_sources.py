import gzip
import json
import sys
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from sft_recipes.data import sources
from sft_recipes.data.parsers import ReadReport, SourceRow
from sft_recipes.errors import DataError

ROWS = [{"text": "a"}, {"text": "ü漢"}]


def read(path: Path | str) -> list[dict[str, object]]:
    rows = list(sources.iter_rows(str(path)))
    assert not [row for row in rows if isinstance(row, DataError)]
    return [dict(row.values) for row in rows if isinstance(row, SourceRow)]


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
        (
            "a.txt",
            "x",
            "unsupported file type (expected .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .xlsx, opt",
        ),
        ("a.jsonl", '{"a": 1, "b": 2, "a": 3}\n', ":1: duplicate key 'a' in an object. Remove all but one."),
        ("a.json", '[{"a": {"b": 1, "b": 2}}]', ": duplicate key 'b' in an object. Remove all but one."),
        (
            "a.jsonl",
            '{\n"a": 1\n}\n{\n"a": 2\n}\n',
            ":4:1: invalid JSON: extra data. Write one object per line (jq -c).",
        ),
        ("a.jsonl", '[\n{"a": 1},\n', ":3:1: invalid JSON: expecting value."),
        ("a.csv", "a;b\n1;2;3\n", ":2: number of fields differs from the header (expected 2)."),
        ("a.arrow", "ARROW1", "invalid Arrow file"),
        ("a.xlsx", "x", "invalid Excel file"),
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


def reported(path: Path | str) -> ReadReport:
    report = ReadReport()
    assert not [row for row in sources.iter_rows(str(path), report=report) if isinstance(row, DataError)]
    return report


def test_names_in_capitals_and_other_suffixes(tmp_path: Path) -> None:
    for name in ("a.JSONL", "a.ndjson", "a.Jsonl.GZ"):
        content = jsonl().encode()
        assert read(write(tmp_path / name, gzip.compress(content) if name.endswith("GZ") else content)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.csv", 'prompt;completion\n"x; y",z\n', "separated by semicolons"),
        ("a.csv", "prompt\tcompletion\nx; y\tz\n", "separated by tabs"),
        ("a.tsv", "prompt\tcompletion\nx; y\tz\n", "separated by tabs"),
        ("a.csv", 'prompt,"completion; long"\nx; y,z\n', None),
    ],
)
def test_separators(tmp_path: Path, name: str, content: str, note: str | None) -> None:
    file = write(tmp_path / name, content.replace('",z', '";z'))

    assert [list(row.values()) for row in read(file)] == [["x; y", "z"]]
    assert reported(file).notes == ([note] if note else [])


@pytest.mark.parametrize("indent", [2, None])
def test_one_json_list_in_a_file_of_lines(tmp_path: Path, indent: int | None) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps(ROWS, indent=indent))

    assert read(file) == ROWS
    assert [row.place for row in sources.iter_rows(str(file)) if isinstance(row, SourceRow)][1] == f"{file}:row 2"
    assert reported(file).notes == ["one JSON list instead of one object per line"]


def test_blank_rows_and_cells_without_a_value(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "instruction,input,output\nHello,,Good day\n,,\n \n\nnan,NaN,\nBye,nan,Farewell\n")
    report = reported(file)

    assert [row["input"] for row in read(file)] == ["", ""]
    assert (report.blank_rows, report.nan_cells) == (3, 3)
    places = [row.place for row in sources.iter_rows(str(file)) if isinstance(row, SourceRow)]
    assert places == [f"{file}:2", f"{file}:7"]


def test_excel(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (
        ["prompt", "completion", None],
        ["6 x 7?", 42, "beside"],
        [None, None, None],
        [None, "nan"],
        ["x", "y"],
    ):
        book.active.append(cells)
    book.create_sheet("Notes").append(["no data"])
    book.save(tmp_path / "a.xlsx")
    report = reported(tmp_path / "a.xlsx")

    assert read(tmp_path / "a.xlsx") == [{"prompt": "6 x 7?", "completion": "42"}, {"prompt": "x", "completion": "y"}]
    assert (report.blank_rows, report.nan_cells) == (2, 1)
    assert report.notes == ["only sheet 'Sheet' is read, not 'Notes'"]
    assert sources.count(str(tmp_path / "a.xlsx")) == 2
    places = [row.place for row in sources.iter_rows(str(tmp_path / "a.xlsx")) if isinstance(row, SourceRow)]
    assert places == [f"{tmp_path / 'a.xlsx'}:row 2", f"{tmp_path / 'a.xlsx'}:row 5"]


def test_excel_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)

    assert "Run pip install 'sft-recipes[excel]'." in problem(write(tmp_path / "a.xlsx", "PK"))


def test_arrow_files_and_what_save_to_disk_writes(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    assert read(tmp_path / "a.arrow") == ROWS
    assert sources.count(str(tmp_path / "a.arrow")) == 2

    train, test = (datasets.Dataset.from_list(rows) for rows in (ROWS, [{"text": "c"}]))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"of map, not of the rows")
    assert read(tmp_path / "one") == read(tmp_path / "both") == ROWS
    assert reported(tmp_path / "both").notes == ["only data-00000-of-00001.arrow read, not test"]
    held_out = sources.iter_rows(str(tmp_path / "both"), splits=sources.HELD_OUT)
    assert [row.values for row in held_out if isinstance(row, SourceRow)] == [{"text": "c"}]
    with pytest.raises(DataError, match=r"both: the dataset has no split 'dev' \(available: 'train', 'test'\)"):
        list(sources.iter_rows(str(tmp_path / "both"), splits=("dev",)))


def test_nested_types_of_parquet(tmp_path: Path) -> None:
    call = pa.array([[("place", "Oslo")]], pa.map_(pa.string(), pa.string()))
    columns = {"call": call, "json": pa.array(['{"x": 1}'], pa.json_()), "kind": pa.array(["a"]).dictionary_encode()}
    pq.write_table(pa.table({**columns, "input": pa.array([float("nan")])}), tmp_path / "a.parquet")

    assert read(tmp_path / "a.parquet") == [{"call": {"place": "Oslo"}, "json": '{"x": 1}', "kind": "a", "input": None}]


def test_null_keys_that_tables_cannot_keep_are_counted(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": None}]} for _ in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "plain.parquet")
    calls = [{"arguments": {"unit": None, "place": "Oslo"}}, {"arguments": {"unit": "C"}}, {"arguments": {"unit": "K"}}]
    pq.write_table(pa.Table.from_pylist([{"calls": [call, call]} for call in calls]), tmp_path / "calls.parquet")

    assert reported(tmp_path / "plain.parquet").null_keys == 0
    assert reported(tmp_path / "calls.parquet").null_keys == 3
    assert read(tmp_path / "calls.parquet")[0] == {"calls": [{"arguments": {"place": "Oslo"}}] * 2}


def test_a_directory_with_files_of_several_splits(tmp_path: Path) -> None:
    for name in ("train-00001", "test", "extra", "my_validation"):
        write(tmp_path / f"{name}.jsonl", jsonl([{"text": name}]))
    write(tmp_path / "._train-00001.jsonl", b"\x00\x05\x16\x07")  # macOS keeps attributes in such files

    assert read(tmp_path) == [{"text": "train-00001"}]
    assert reported(tmp_path).notes == ["only train-00001.jsonl read, not extra.jsonl, my_validation.jsonl, test.jsonl"]
    for splits, name in ((sources.HELD_OUT, "my_validation"), (("test",), "test")):
        assert [
            row.values for row in sources.iter_rows(str(tmp_path), splits=splits) if isinstance(row, SourceRow)
        ] == [{"text": name}]
    with pytest.raises(DataError, match="no file in this directory is named after the split 'dev'"):
        list(sources.iter_rows(str(tmp_path), splits=("dev",)))
    (tmp_path / "train-00001.jsonl").unlink()
    assert read(tmp_path) == [{"text": "extra"}]
    with pytest.raises(DataError, match="'split' applies only to Hub datasets and directories"):
        list(sources.iter_rows(str(tmp_path / "test.jsonl"), splits=("test",)))


@pytest.mark.parametrize("system", ["memory", "file"])
def test_remote_files(tmp_path: Path, system: str) -> None:
    files = fsspec.filesystem(system)
    folder = "/sft-rows" if system == "memory" else str(tmp_path)
    files.makedirs(f"{folder}/more")
    files.pipe(f"{folder}/train.jsonl", jsonl().encode())
    files.pipe(f"{folder}/more/a.jsonl.gz", gzip.compress(jsonl().encode()))
    files.pipe(f"{folder}/test.jsonl", b'{"text": "c"}\n')
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows")
    files.pipe(f"{folder}/more/a.parquet", (tmp_path / "rows").read_bytes())
    url = f"{system}://{folder}"

    for path in (url, f"{url}/train.jsonl", f"{url}/tr*.jsonl", f"{url}/more/a.jsonl.gz", f"{url}/more/a.parquet"):
        assert read(path) == ROWS, path
        assert sources.count(path) == 2
    assert "only train.jsonl read, not test.jsonl" in reported(url).notes
    [row, _] = sources.iter_rows(f"{url}/train.jsonl")
    assert isinstance(row, SourceRow)
    assert row.place == f"{system}://{folder}/train.jsonl:1"
    assert sources.fingerprint(f"{url}/train.jsonl") == sources.fingerprint(str(write(tmp_path / "x.jsonl", jsonl())))
    before = sources.state(f"{url}/train.jsonl")
    files.pipe(f"{folder}/train.jsonl", b'{"text": "d"}\n{"text": "e"}\n ')
    assert sources.state(f"{url}/train.jsonl") != before
    assert problem(f"{url}/none.jsonl") == f"{url}/none.jsonl: file not found."


def test_file_systems_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)

    for url, extra in (("s3://rows/a.jsonl", "s3"), ("gs://rows/a.jsonl", "gcs")):
        assert problem(url).startswith(f"{url}: {url[:2]}:// requires a package that is not installed.")
        assert f"Run pip install 'sft-recipes[{extra}]'." in problem(url)
    assert "nothing://a: cannot be read (ValueError: Protocol not known: nothing" in problem("nothing://a")
