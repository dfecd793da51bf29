"""How far the rows of moe_layer.py reach its goals, each as a range over cells."""

from itertools import groupby, product
from math import inf

Row = dict
OURS = "rq.moe"
OTHER_PRODUCT = "llama.cpp"  # prefix of the variants that are not part of a stock runtime
CELL = ("shape", "format", "threads", "tokens", "routing")


def summary(rows: list[Row]) -> list[str]:
    """A sentence for each goal that has rows.

    - One token: the fraction of the read bandwidth, for the bytes that must be read.
    - 16 and 256 tokens at 8 and at 4 bits: the time of the best stock variant divided by ours, and llama.cpp's divided by ours.
    - 1024 tokens: the fraction of the peak.
    - Skewed routing: our time divided by that of even routing to the same experts. Mixed formats are excluded, since there skewed
      routing also moves work from one format to another.
    """
    cells = [list(cell) for _, cell in groupby(rows, lambda row: [row[key] for key in CELL])]
    uniform = [cell for cell in cells if cell[0]["routing"] == "uniform"]
    lines = [_line("1 token: fraction of the read bandwidth", _rooflines(uniform, 1), at_least=0.9)]
    for tokens, format in product((16, 256), ("int8", "int4")):
        same = [cell for cell in uniform if (cell[0]["tokens"], cell[0]["format"]) == (tokens, format)]
        head = f"{tokens} tokens, {format}: times as fast as"
        lines.append(_line(f"{head} the best stock variant", _speedups(same, stock=True), at_least=1.5))
        lines.append(_line(f"{head} {OTHER_PRODUCT}", _speedups(same, stock=False), at_least=1.5))
    lines.append(_line("1024 tokens: fraction of the peak", _rooflines(uniform, 1024), at_least=0.6))
    lines.append(_line("skewed over even routing of the same experts, time", _skews(cells), at_most=1.1))
    return [line for line in lines if line]


def _line(what: str, values: list[float], at_least: float = 0.0, at_most: float = inf) -> str:
    if not values:
        return ""
    goal = f"at least {at_least}" if at_least else f"at most {at_most}"
    reached = sum(at_least <= value <= at_most for value in values)
    return f"{what}: {min(values):.2f} to {max(values):.2f} ({goal}: {reached} of {len(values)} cells)"


def _ours(cell: list[Row]) -> Row:
    return next(row for row in cell if row["variant"] == OURS)


def _rooflines(cells: list[list[Row]], tokens: int) -> list[float]:
    return [_ours(cell)["roofline"] for cell in cells if cell[0]["tokens"] == tokens]


def _speedups(cells: list[list[Row]], stock: bool) -> list[float]:
    found = []
    for cell in cells:
        others = [row for row in cell if not row["variant"].startswith(OURS)]
        times = [row["ms"] for row in others if row["variant"].startswith(OTHER_PRODUCT) != stock]
        if times:
            found.append(min(times) / _ours(cell)["ms"])
    return found


def _skews(cells: list[list[Row]]) -> list[float]:
    times = {tuple(cell[0][key] for key in CELL): _ours(cell)["ms"] for cell in cells if cell[0]["format"] != "mixed"}
    return [
        time / times[(*same, "even")]
        for (*same, routing), time in times.items()
        if routing == "skewed" and (*same, "even") in times
    ]
