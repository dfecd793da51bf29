"""Write the table of docs/families.md: ``families_table.py DOCUMENT REPORT...``, from pytest's reports of test_model_types.py.

A report is what ``pytest --junitxml`` writes. The table says of every model type what its tests found, and the line above it with
which versions and when.
"""

import importlib.metadata
import re
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

BEGIN, END = "<!-- written by `make families` -->\n", "<!-- end -->\n"
# Column -> the test that fills it, with the property that it records or what it means when it passes.
COLUMNS = {
    "logits": ("test_a_plan_that_changes_nothing_changes_no_logit_and_no_token", "difference"),
    "int8, int4, replicas": ("test_replicated_and_quantized", "difference"),
    "calibration": ("test_calibrated_in_memory_and_layer_by_layer", "agrees"),
}


def main(document: Path, reports: list[Path]) -> None:
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    days = set()
    for report in reports:
        for suite in ET.parse(report).getroot().iter("testsuite"):
            days.add((suite.get("timestamp") or "")[:10])
            for case in suite.iter("testcase"):
                name, _, model_type = (case.get("name") or "").rstrip("]").partition("[")
                found[model_type][name] = _outcome(case)
    rows = {
        model_type: [tests[test] if tests[test] != "passed" else text for test, text in COLUMNS.values()]
        for model_type, tests in sorted(found.items())
        if all(test in tests for test, _ in COLUMNS.values())
    }
    failed = [model_type for model_type, cells in rows.items() if "failed" in cells]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "onnxruntime"))
    lines = [
        f"{len(rows) - len(failed)} of {len(rows)} model types passed, {max(days)}, with {versions}.",
        "",
        f"| model type | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
        *(f"| `{model_type}` | {' | '.join(cells)} |" for model_type, cells in rows.items()),
    ]
    text = document.read_text()
    document.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}", text, flags=re.S))
    print(f"{document}: {lines[0]}" + (f" Failed: {', '.join(failed)}." if failed else ""))
    sys.exit(bool(failed))


def _outcome(case: ET.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    recorded = {element.get("name"): element.get("value") or "" for element in case.iter("property")}
    return recorded.get("difference", "passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
