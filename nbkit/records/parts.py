"""A part of a study: finished units and their rows in one Parquet file, whose name holds the checksum of its content.

    write_part(folder, {"unit 0": [{"perplexity": 3.9}]}, schema)
    rows_by_unit, schema = read_part(folder / "part-TIME-CHECKSUM.parquet")
"""

import hashlib
import io
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nbkit.errors import ResultsError
from nbkit.records.files import write_atomically

PARTS = "part-*.parquet"
# One that an earlier version wrote has a random number of eight digits where the checksum is.
NAME = re.compile(r"part-.*?-(?:[0-9a-f]{8}|([0-9a-f]{64}))\.parquet")


def write_part(folder: Path, units: Mapping[str, Sequence[Mapping]], schema: pa.Schema) -> None:
    """A new part in `folder`, which is made too; it is there whole or not at all, and OSError says why not."""
    rows = [{"unit": unit, "row": i, **row} for unit, of_unit in units.items() for i, row in enumerate(of_unit)]
    schema = pa.schema([("unit", pa.string()), ("row", pa.int64()), *schema])
    folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), content)
    checksum = hashlib.sha256(content.getbuffer()).hexdigest()
    write_atomically(
        folder / f"part-{time.time_ns():020d}-{checksum}.parquet", lambda file: file.write(content.getbuffer())
    )


def read_part(path: Path) -> tuple[dict[str, list[dict]], pa.Schema]:
    """The rows of each unit, in order, and their schema.

    ResultsError where a single bit is not what was written; FileNotFoundError where there is no such file any more.
    """
    try:
        content = path.read_bytes()
        name = NAME.fullmatch(path.name)
        if name is None or name[1] not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError("its content is not that of the checksum in its name")
        table = pq.read_table(pa.BufferReader(content))
        rows = table.drop_columns(["unit", "row"])
        units = table.column("unit").to_pylist()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ResultsError(f"{path} is damaged ({error}): delete it to have its rows computed again") from error
    by_unit: dict[str, list[dict]] = {}
    for unit, row in zip(units, rows.to_pylist(), strict=True):
        by_unit.setdefault(unit, []).append(row)
    return by_unit, rows.schema
