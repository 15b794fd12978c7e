"""Put a run where the repository shows it: `python -m benchmarks.publish RUN [DIR]`, or `make publish RUN=...`.

DIR, docs/benchmarks/full or docs/benchmarks/quick by default, has then the page, made anew by this code, the tables as
Markdown, a row for each round, and everything compressed, which `meshctl bench compare` and `plan` read as it is.
"""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import report
from benchmarks.harness.compare import load
from benchmarks.harness.results import PACKED, Results, ResultsError
from benchmarks.report import markdown
from benchmarks.run import ROWS, write_rows

TABLES: Final = "tables.md"
_DOCS: Final = Path(__file__).parent.parent / "docs" / "benchmarks"


def publish(results: Results, directory: Path) -> list[Path]:
    """Four files; the same results give the same ones. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    packed, rows, tables = directory / PACKED, directory / ROWS, directory / TABLES
    packed.write_bytes(lzma.compress(json.dumps(results.to_json(), separators=(",", ":")).encode()))
    write_rows(results, rows)
    tables.write_text(markdown.document(results), encoding="utf-8")
    return [packed, rows, tables, report.write(results, directory, PACKED)]


def main(arguments: Sequence[str]) -> int:
    """Exit status 2 when the run cannot be read."""
    if len(arguments) not in (1, 2):
        print("usage: python -m benchmarks.publish RUN [DIR]: RUN is the directory of a run", file=sys.stderr)
        return 2
    try:
        results = load(Path(arguments[0]))
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    directory = Path(arguments[1]) if len(arguments) > 1 else _DOCS / ("quick" if results.quick else "full")
    for file in publish(results, directory):
        print(f"{file.stat().st_size / 1e6:6.2f} MB  {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
