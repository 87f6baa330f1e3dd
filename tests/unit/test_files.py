"""Files as streams: every format gives the same requests, recorded records keep their bytes."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dylora_stream.core.errors import DyloraError
from dylora_stream.ops.files import (
    FileFormat,
    FileRecord,
    ReadOptions,
    count_rows,
    paced,
    read_records,
    timed,
)
from dylora_stream.testing import ManualClock

ROWS = [
    {"input": "héllo", "output": "a", "choices": ["a", "b"]},
    {"input": "two, with a comma", "tenant": "acme"},
]


def write(folder: Path, kind: str) -> Path:
    """ROWS as a file of this kind."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS, schema=pa.schema({
            "input": pa.string(), "output": pa.string(), "choices": pa.list_(pa.string()), "tenant": pa.string(),
        })), path)  # fmt: skip
    else:
        path.write_text(
            'input,output,choices,tenant\nhéllo,a,"[""a"", ""b""]",\n"two, with a comma",,,acme\n',
            encoding="utf-8",
        )
    return path


def read(path: Path, **options: object) -> list[FileRecord]:
    """All records of a file."""
    return list(read_records(path, ReadOptions(**options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_requests(kind: str, tmp_path: Path) -> None:
    """JSONL, CSV and Parquet are three spellings of one stream, and are counted without being parsed."""
    path = write(tmp_path, kind)
    records = read(path)
    assert [json.loads(record.value or b"") for record in records] == ROWS
    assert {record.headers for record in records} == {(("content-type", b"application/json"),)}
    assert count_rows(path, ReadOptions()) == 2


def test_any_other_file_is_lines_of_text(tmp_path: Path) -> None:
    """A log file needs no conversion; empty lines are no records, invalid UTF-8 is the daemon's to refuse."""
    path = tmp_path / "server.log"
    path.write_bytes(b"first\r\n\n{not json}\n\xff\n")
    assert [record.value for record in read(path)] == [b"first", b"{not json}", b"\xff"]


def test_recorded_records_keep_their_bytes(tmp_path: Path) -> None:
    """Key, headers, time and even a null value come back as they were."""
    path = tmp_path / "recorded.jsonl"
    rows = [
        {"value_base64": "/w==", "key": "k", "headers": [["h", "1"], ["h", "2"]], "timestamp_ms": 1000},
        {"value": None, "key": "k", "headers": {"h": "1"}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == [
        FileRecord(value=b"\xff", key=b"k", headers=(("h", b"1"), ("h", b"2")), timestamp_ms=1000),
        FileRecord(value=None, key=b"k", headers=(("h", b"1"),)),
    ]


def test_order_key_and_limit_are_the_callers(tmp_path: Path) -> None:
    """A seed fixes the shuffled order; the limit counts after it; a field becomes the key."""
    path = tmp_path / "many.jsonl"
    path.write_text(
        "".join(json.dumps({"input": str(number), "user": number % 3}) + "\n" for number in range(30))
    )
    shuffled = read(path, shuffle_seed=1)
    assert shuffled == read(path, shuffle_seed=1)
    assert shuffled != read(path)
    assert sorted(record.value or b"" for record in shuffled) == sorted(
        record.value or b"" for record in read(path)
    )
    assert read(path, shuffle_seed=1, limit=4) == shuffled[:4]
    assert count_rows(path, ReadOptions(limit=4)) == 4
    assert [record.key for record in read(path, key_field="user", limit=4)] == [b"0", b"1", b"2", b"0"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"input": "x"}\nnot json\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl:1 has neither `input` nor `value`; its fields are text"),
        ("a.jsonl", '{"value_base64": "*"}\n', "is not a record"),
        ("a.jsonl", '{"input": "\\ud800"}\n', r"a\.jsonl:1 holds what is no text"),
        ("a.jsonl", '{"value": "\\ud800"}\n', "is not a record"),
        ("a.jsonl", '{"value": "x", "headers": {"\\ud800": "1"}}\n', "is not a record"),
        ("a.jsonl", '{"value": "x", "timestamp_ms": -1}\n', "timestamp_ms is -1"),
        ("a.jsonl", '{"value": "x", "timestamp_ms": Infinity}\n', "is not a record"),
        ("a.jsonl", '{"value": null}\n', r"a\.jsonl:1 has neither key nor value"),
        ("a.jsonl", '{"input": ' + "[" * 100_000 + "\n", r"a\.jsonl:1 is not JSON"),
        ("a.csv", 'input,choices\nx,"[""\\ud800""]"\n', r"a\.csv:2 holds what is no text"),
        ("a.csv", "input,choices\nx,yes|no\n", r"a\.csv:2: `choices` must be JSON"),
        ("a.parquet", "no", "cannot be read as parquet"),
    ],
)
def test_what_cannot_be_read_names_file_and_line(name: str, text: str, said: str, tmp_path: Path) -> None:
    """The reading stops where the file is not what it claims to be."""
    (tmp_path / name).write_text(text)
    with pytest.raises(DyloraError, match=said):
        read(tmp_path / name)


def test_a_missing_key_field_is_an_error(tmp_path: Path) -> None:
    """Sending some records without a key would reorder them silently."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "x"}\n')
    with pytest.raises(DyloraError, match="no field 'user'"):
        read(path, key_field="user")
    assert read(path, format=FileFormat.LINES)[0].value == b'{"input": "x"}'


def times(records: Sequence[FileRecord], clock: ManualClock, **pace: float) -> list[float]:
    """Seconds after the start at which each record is given out."""
    start = clock.monotonic_s()
    if "rate" in pace:
        return [clock.monotonic_s() - start for _ in paced(records, pace["rate"], clock, clock.advance)]
    return [clock.monotonic_s() - start for _ in timed(records, pace["speed"], clock, clock.advance)]


def test_a_rate_spaces_records_from_the_first_on() -> None:
    """Four a second, without drift."""
    records = [FileRecord(value=b"x")] * 4
    assert times(records, ManualClock(), rate=4) == pytest.approx([0, 0.25, 0.5, 0.75])


def test_recorded_gaps_are_kept_at_any_speed() -> None:
    """Twice as fast halves the gaps; a record without a time follows at once."""
    stamps = [5000, 6000, None, 9000]
    records = [FileRecord(value=b"x", timestamp_ms=stamp) for stamp in stamps]
    assert times(records, ManualClock(), speed=2) == pytest.approx([0, 0.5, 0.5, 2.0])


def test_a_row_with_an_input_is_a_request_whatever_else_it_has(tmp_path: Path) -> None:
    """A column that is called `value` is no recorded record's; nor does a byte order mark spoil the first row."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"input": "how much?", "value": 3}\n')
    (record,) = read_records(file, ReadOptions())
    assert json.loads(record.value or b"") == {"input": "how much?", "value": 3}
