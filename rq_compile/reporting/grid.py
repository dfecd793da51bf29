"""A grid with layers as rows, experts as columns and few tones. One SVG path per tone keeps 64 layers of 256 experts small."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

# The number of cells that can have tooltips, and the number of columns that leave room for a number in a cell.
MOST_TIPS = 2048
NUMBERED_COLUMNS = 20
# The gap between large cells, as a fraction of a cell.
GAP = 0.05
LARGE_COLUMNS, LARGE_ROWS = 64, 32


@dataclass(frozen=True)
class Cell:
    """A cell of ``width`` columns, from ``column`` on, in row ``row``. ``tip``: the tooltip. ``number``: a short text in the
    cell."""

    row: int
    column: float
    width: float
    tone: str
    number: str
    tip: str
    notable: bool = False


@dataclass(frozen=True)
class Label:
    """A cell's number at its middle, in per cent of the grid's width and in rows."""

    x: float
    row: float
    tone: str
    text: str


@dataclass(frozen=True)
class Grid:
    """``paths``: tone -> SVG path data in coordinates of ``columns`` by ``rows``. ``tips``: tooltip -> the path of its cell."""

    columns: int
    rows: int
    paths: dict[str, str]
    tips: dict[str, str]
    labels: list[Label]
    row_names: list[str]
    column_names: list[tuple[float, str]]

    @property
    def row_height(self) -> int:
        """In pixels."""
        return 30 if self.rows <= 8 else 18 if self.rows <= LARGE_ROWS else 9

    @property
    def least_width(self) -> int:
        """In pixels. If there is less room, the grid scrolls in its frame."""
        return self.columns * (18 if self.labels else 4)


def grid(cells: Iterable[Cell], row_names: list[str], columns: int) -> Grid:
    """``row_names``: one name per row, of which only as many are kept as can be read."""
    known = list(cells)
    rows = len(row_names)
    paths, tips = defaultdict(list), {}
    numbered = columns <= NUMBERED_COLUMNS and rows <= LARGE_ROWS
    for cell in known:
        shape = outline(cell, GAP if columns <= LARGE_COLUMNS else 0.0, GAP if rows <= LARGE_ROWS else 0.0)
        paths[cell.tone].append(shape)
        if cell.notable or len(known) <= MOST_TIPS:
            tips[cell.tip] = shape
    return Grid(
        columns=columns,
        rows=rows,
        paths={tone: "".join(shapes) for tone, shapes in sorted(paths.items())},
        tips=tips,
        labels=[
            Label(100 * (cell.column + cell.width / 2) / columns, cell.row + 0.5, cell.tone, cell.number)
            for cell in known
            if numbered and cell.number
        ],
        row_names=[name if row % every(rows, LARGE_ROWS) == 0 else "" for row, name in enumerate(row_names)],
        column_names=[(100 * (column + 0.5) / columns, str(column)) for column in range(0, columns, every(columns, 16))],
    )


def outline(cell: Cell, gap: float, row_gap: float) -> str:
    gap = min(gap, cell.width / 4)
    x, y = cell.column + gap / 2, cell.row + row_gap / 2
    width, height = cell.width - gap, 1 - row_gap
    return f"M{short(x)} {short(y)}h{short(width)}v{short(height)}h{short(-width)}z"


def short(number: float) -> str:
    return f"{number:.3f}".rstrip("0").rstrip(".")


def every(count: int, most: int) -> int:
    """The smallest power of two n for which every n-th of ``count`` items gives at most ``most`` items."""
    step = 1
    while count > most * step:
        step *= 2
    return step
