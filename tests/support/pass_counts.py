"""What the passes change in the engine of every model type, as its manifest counts it.

``pass_counts.py REPORT...`` writes the table from reports of test_model_types.py (``pytest --junitxml``); ``make passes``
runs both. The rows of types that did not run stay as they are.

An upgrade of transformers or torch that exports a graph otherwise must not switch a fusion off unseen. If a number changes with
such an upgrade, look at the graph first: a pattern that is written otherwise needs another match.
"""

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
PROPERTY = "pass counts of "
Counts = dict[str, int]


def table() -> dict[str, Counts]:
    """``"model type, lowering"`` -> the counts, by what was counted."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def changes(rows: dict[str, Counts], record: Callable[[str, object], None]) -> list[str]:
    """How some rows differ from the table. They are recorded for the next one."""
    expected = table()
    for row, counts in rows.items():
        record(PROPERTY + row, json.dumps(counts))
    return [change for row, counts in rows.items() for change in differences(row, expected.get(row, {}), counts)]


def differences(row: str, expected: Counts, counts: Counts) -> list[str]:
    return [
        f"{row}: {name}: {expected.get(name, 'not')} in the table, {counts.get(name, 'not')} in the engine"
        for name in [*expected, *(name for name in counts if name not in expected)]
        if expected.get(name) != counts.get(name)
    ]


def write(reports: list[Path]) -> None:
    rows = table()
    for report in reports:
        for recorded in ET.parse(report).getroot().iter("property"):
            name = recorded.get("name") or ""
            if name.startswith(PROPERTY):
                rows[name.removeprefix(PROPERTY)] = json.loads(recorded.get("value") or "")
    lines = (f"{json.dumps(row)}: {json.dumps(counts)}" for row, counts in sorted(rows.items()))
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{TABLE}: {len(rows)} rows")


if __name__ == "__main__":
    write([Path(argument) for argument in sys.argv[1:]])
