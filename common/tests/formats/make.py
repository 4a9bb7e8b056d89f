"""Writes the data files of these tests, and beside each the rows that `datasets` reads from it (expected/NAME.json).

Run it with `datasets` 5 and `pyarrow` installed, in any folder: python make.py
"""

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

HERE = Path(__file__).parent
datasets.disable_progress_bars()

MESSAGES = [
    [
        {"role": "user", "content": "Hä? 😀\nline two", "name": None},
        {"role": "assistant", "content": "", "name": "bot"},
    ],
    [],
    None,
    [{"role": "user", "content": None, "name": None}],
]


def columns():
    struct = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    utc = datetime.timezone.utc
    return {
        "messages": pa.array(MESSAGES, pa.list_(struct)),
        "text": pa.array(["plain", "", None, "None"], pa.string()),
        "large": pa.array(["a", None, "c" * 300, "d"], pa.large_string()),
        "old_text": pa.array([b"bytes", None, "ü".encode(), b""], pa.binary()),
        "integer": pa.array([1, -(2**63), None, 2**63 - 1], pa.int64()),
        "unsigned": pa.array([1, 2**64 - 1, None, 0], pa.uint64()),
        "small": pa.array([1, None, -128, 127], pa.int8()),
        "double": pa.array([0.1, -0.0, None, 1e300], pa.float64()),
        "single": pa.array([0.1, 2.5, None, -1.0], pa.float32()),
        "flag": pa.array([True, False, None, True], pa.bool_()),
        "struct": pa.array([{"a": {"b": [1, 2]}}, {"a": None}, None, {"a": {"b": None}}]),
        "nested": pa.array([[["a"], []], [], None, [None, ["b", None]]], pa.list_(pa.list_(pa.string()))),
        "day": pa.array([datetime.date(2024, 2, 29), None, datetime.date(1969, 12, 31), None], pa.date32()),
        "time": pa.array([datetime.datetime(2024, 2, 29, 1, 2, 3, 40000), None, datetime.datetime(1960, 1, 1), None], pa.timestamp("us")),
        "zoned": pa.array([datetime.datetime(2024, 2, 29, 1, 2, 3, tzinfo=utc), None, None, None], pa.timestamp("ms", tz="UTC")),
        "money": pa.array([decimal.Decimal("12.30"), None, decimal.Decimal("-0.05"), None], pa.decimal128(10, 2)),
        "nothing": pa.array([None] * 4, pa.null()),
    }


def plain(value):
    """A value as JSON has it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return value


def expect(name, kind, **options):
    cache = HERE / "cache"
    rows = datasets.load_dataset(kind, data_files=str(HERE / name), split="train", cache_dir=str(cache), **options)
    write_expected(name, [plain(row) for row in rows])
    shutil.rmtree(cache)


def write_expected(name, rows):
    (HERE / "expected").mkdir(exist_ok=True)
    with open(HERE / "expected" / f"{name}.json", "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=0, allow_nan=False)


def parquet():
    table = pa.table(columns())
    kinds = {"snappy": {}, "gzip": {}, "zstd": {}, "lz4": {}, "none": {}}
    for kind in kinds:
        name = f"rows-{kind}.parquet"
        # Two row groups, and pages of versions 1 and 2.
        version = "2.0" if kind in ("zstd", "lz4") else "1.0"
        pq.write_table(table, HERE / name, compression=kind, row_group_size=3, data_page_version=version)
        expect(name, "parquet")
    delta = pa.table({"text": [f"prefix {number}" for number in range(50)], "number": list(range(50))})
    pq.write_table(
        delta, HERE / "rows-delta.parquet", use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY", "number": "DELTA_BINARY_PACKED"},
    )
    expect("rows-delta.parquet", "parquet")
    saved = datasets.Dataset.from_list([{"messages": MESSAGES[0], "label": "a"}, {"messages": [], "label": None}])
    saved.to_parquet(HERE / "saved.parquet")
    expect("saved.parquet", "parquet")
    maps = pa.table({"map": pa.array([[("a", 1), ("b", None)], [], None], pa.map_(pa.string(), pa.int64()))})
    pq.write_table(maps, HERE / "map.parquet")
    # `datasets` has no maps: what pyarrow reads.
    write_expected("map.parquet", [{"map": None if row is None else dict(row)} for row in maps["map"].to_pylist()])
    odd = pa.table({"number": [1.5, float("nan"), float("-inf")], "image": [b"\xff\xd8", b"\xff", b"\xfe"]})
    pq.write_table(odd, HERE / "odd.parquet")


def arrow():
    table = pa.table(columns())
    with pa.OSFile(str(HERE / "stream.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    expect("stream.arrow", "arrow")
    categories = pa.table({"kind": pa.array(["a", "b", None, "a"]).dictionary_encode(), "n": [1, 2, 3, 4]})
    for compression in ("lz4", "zstd", "uncompressed"):
        name = f"file-{compression}.arrow"
        pyarrow.feather.write_feather(categories, HERE / name, compression=compression)
    write_expected("file-uncompressed.arrow", categories.to_pylist())
    saved = datasets.Dataset.from_list([{"tools": {"a": 1}}, {"tools": {"a": "x"}}], features=datasets.Features({"tools": datasets.Json()}))
    saved.save_to_disk(HERE / "saved")
    shutil.copy(HERE / "saved" / "data-00000-of-00001.arrow", HERE / "saved.arrow")
    shutil.rmtree(HERE / "saved")
    write_expected("saved.arrow", [row for row in saved])


def text_formats():
    rows = [
        {"prompt": "one, two", "completion": 'she said "hi"', "note": "x"},
        {"prompt": "line\nbreak", "completion": "ünï ", "note": None},
        {"prompt": " space ", "completion": "c", "note": "y"},
    ]
    pandas.DataFrame(rows).to_csv(HERE / "table.csv", index=False)
    expect("table.csv", "csv")
    pandas.DataFrame(rows).to_csv(HERE / "table.tsv", index=False, sep="\t")
    expect("table.tsv", "csv", sep="\t")
    pandas.DataFrame(rows).to_csv(HERE / "index.csv", lineterminator="\r\n", encoding="utf-8-sig", quoting=1)
    expect("index.csv", "csv", features=datasets.Features({
        name: datasets.Value("string") for name in ("Unnamed: 0", "prompt", "completion", "note")}))
    (HERE / "lines.txt").write_bytes("first\r\n\r\n second \nümlaut\n\nlast".encode())
    expect("lines.txt", "text")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with tarfile.open(HERE / "lines.tar.gz", "w:gz") as tar:
        for name, data in (("set/b.jsonl", lines), ("set/a.jsonl", lines), ("set/README.md", b"# about")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("set/" + "long" * 40 + ".jsonl")
        info.size = len(lines)
        tar.addfile(info, io.BytesIO(lines))
    with zipfile.ZipFile(HERE / "lines.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._data.jsonl", b"\0\5")
        archive.writestr(".DS_Store", b"\0")
        archive.writestr("data.jsonl", lines)
    (HERE / "lines.jsonl.xz").write_bytes(lzma.compress(lines) + lzma.compress(lines))
    # Two frames, and one between them that is to be skipped.
    frame = pa.Codec("zstd").compress(lines, asbytes=True)
    (HERE / "lines.jsonl.zst").write_bytes(frame + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + frame)
    (HERE / "lines.jsonl.bz2").write_bytes(bz2.compress(lines) + bz2.compress(lines))
    (HERE / "lines.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0) + gzip.compress(lines, mtime=0) + bytes(512))
    for name in ("xz", "zst", "bz2", "gz"):
        write_expected(f"lines.jsonl.{name}", rows + rows)
    write_expected("lines.zip", rows)
    write_expected("lines.tar.gz", rows + rows + rows)
    (HERE / "utf16.jsonl").write_bytes(lines.decode().encode("utf-16"))
    write_expected("utf16.jsonl", rows)


if __name__ == "__main__":
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    parquet()
    arrow()
    text_formats()
