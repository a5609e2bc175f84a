"""Draw folders, modules, their imports and the way of one batch; ``make figures`` runs it.

All but the stops of the batch is read from the source. ``images/architecture.json`` holds what was
drawn, and ``tests/test_house.py`` compares it with the source.
"""

import ast
import json
import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

PACKAGE = Path(__file__).parents[1] / "lightning_koopman"
IMAGES = Path(__file__).parent / "images"
DRAWN = IMAGES / "architecture.json"
FOLDERS = [
    "network", "network.access", "network.axes", "network.flow", "network.capture", "network.runs",
    "koopman", "report", "measurement", "effects", "decisions", "callback", "checkpoints", "demo", "cli",
]  # fmt: skip

# One validation batch, from Lightning's hook to the log. Each stop is imported by one before it.
BATCH = {
    "callback.monitor": "called by Lightning's validation hooks",
    "measurement.measurement": "one report in the making",
    "network.capture.capture": "hooks see what each component takes and gives",
    "network.flow.provenance": "where the data of each state came from",
    "network.axes.rows": "one row per sample and state",
    "measurement.accumulator": "gathers the rows of all passes",
    "koopman.states": "wide states projected, skip links joined",
    "koopman.moments": "counts, means and products per fold",
}
END = {
    "koopman.credit": "credits and their standard errors",
    "koopman.chain": "one linear operator per component",
    "koopman.alignment": "output directions followed backward",
    "report.report": "the frozen report",
    "callback.loggers": "scalars and figures for every logger",
}
WAY = BATCH | END


def folder_of(module: str) -> str:
    """Return the folder that a module lies in."""
    return module.rpartition(".")[0] or module


def tint_of(folder: str) -> str:
    """Return the color of a folder, which folders in it share."""
    return TINTS[folder.split(".")[0]]


def short(module: str) -> str:
    """Return a module's name without its folder."""
    return module.split(".")[-1]


def read_architecture() -> dict[str, Any]:
    """Read all that the figure shows: folders, lines per module, imports between folders, the way."""
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    folders = {}
    for folder in FOLDERS:
        told = ast.get_docstring(ast.parse(files.get(f"{folder}.__init__") or files[folder])) or ""
        folders[folder] = told.split("\n\n")[0]
    files = {name: text for name, text in files.items() if short(name) != "__init__"}
    imports = {}
    for name, text in files.items():
        froms = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        modules = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        modules |= {str(node.module) for node in froms}
        imports[name] = {m.removeprefix(f"{PACKAGE.name}.") for m in modules} & set(files)
    stops = list(WAY)
    for place, stop in enumerate(stops):
        if stop not in files:
            raise ValueError(f"{Path(__file__).name}: no module {stop!r}; there are {list(files)}")
        if place and not any(stop in imports[before] for before in stops[:place]):
            raise ValueError(f"{Path(__file__).name}: no stop before {stop!r} imports it")
    pairs = [(folder_of(name), folder_of(other)) for name in imports for other in imports[name]]
    return {
        "folders": folders,
        "lines": {name: text.count("\n") for name, text in files.items()},
        "imports": {f"{a} > {b}": n for (a, b), n in sorted(Counter(pairs).items()) if a != b},
        "way": WAY,
    }


# Inches from the left: the arcs, the folders' names, the way, the other modules, the end.
NAMES, LANE, REST, END_OF_ROW = 1.25, 3.35, 9.3, 13.2
PER_LINE, HEIGHT, GAP = 0.0021, 0.42, 0.16
INSET = {"network.axes": 3.45, "koopman": 0.75}  # so that ways between others pass beside
RED, BLUE, INK, PALE = "#d1495b", "#2f5d9b", "#22313f", "#7d8995"
TINTS = {
    "network": "#4e79a7", "koopman": "#59a14f", "report": "#b6992d", "measurement": "#499894",
    "effects": "#b07aa1", "decisions": "#d37295", "callback": "#f28e2b", "checkpoints": "#9c755f",
    "demo": "#79706e", "cli": "#79706e",
}  # fmt: skip
Box = tuple[float, float, float, float]


def place_boxes(
    folders: dict[str, str], lines: dict[str, int]
) -> tuple[dict[str, Box], list[tuple[float, float]]]:
    """Compute x, y, width and height of each box, and each folder's top and bottom, downwards."""
    boxes: dict[str, Box] = {}
    rows = []
    top = 0.0
    for folder, story in folders.items():
        x, y = REST, top
        others = [name for name in lines if folder_of(name) == folder and name not in WAY]
        for name in sorted(others, key=lambda name: -lines[name]):
            width = max(PER_LINE * lines[name], 0.16 + 0.066 * len(short(name)))
            if x + width > END_OF_ROW:
                x, y = REST, y + 0.41
            boxes[name] = (x, y, width, 0.33)
            x += width + 0.1
        rows.append((top, max(y + 0.33, top + 0.33 + 0.125 * story.count("\n"))))
        top = rows[-1][1] + 0.4
    ends = {folder: LANE + INSET.get(folder, 0.0) for folder in FOLDERS}
    before = ""
    for name in WAY:
        folder = folder_of(name)
        width = max(PER_LINE * lines[name], 0.3 + 0.072 * len(short(name)))
        x = ends[folder]
        if name in END and folder_of(before) != folder:
            x = max(x, boxes[before][0] + (boxes[before][2] - width) / 2)
        above, below = rows[FOLDERS.index(folder)]
        boxes[name] = (x, (above + below - HEIGHT) / 2, width, HEIGHT)
        ends[folder], before = x + width + GAP, name
    return boxes, rows


def draw_folders(axes: Axes, folders: dict[str, str], rows: list[tuple[float, float]]) -> None:
    """Draw each folder's band, its name, and the first sentence of its docstring."""
    for (folder, story), (top, bottom) in zip(folders.items(), rows, strict=True):
        tint = tint_of(folder)
        size = (END_OF_ROW - NAMES + 0.2, bottom - top + 0.26)
        band = FancyBboxPatch((NAMES - 0.1, top - 0.13), *size, boxstyle="round,pad=0,rounding_size=0.1")
        band.set(facecolor=tint, alpha=0.10, edgecolor="none", zorder=0)
        axes.add_patch(band)
        path = folder.replace(".", "/")
        name = f"{path}/" if (PACKAGE / path).is_dir() else f"{path}.py"
        axes.text(NAMES, top - 0.03, name, va="top", size=12, weight="bold", color=tint)
        axes.text(NAMES, top + 0.2, story, va="top", size=7.2, color=INK, linespacing=1.25)


def draw_imports(axes: Axes, imports: dict[str, int], rows: list[tuple[float, float]]) -> None:
    """Draw an arc from each folder to each that it imports from, wider for more imports."""
    for pair, count in imports.items():
        i, j = map(FOLDERS.index, pair.split(" > "))
        edge, reach = NAMES - 0.14, NAMES - 0.14 - min(1.4, 0.19 * abs(i - j))
        start, stop = rows[i][0] + 0.08, rows[j][1] - 0.08
        curve = Curve([(edge, start), (reach, start), (reach, stop), (edge, stop)], [1, 4, 4, 4])
        arrow = FancyArrowPatch(
            path=curve, arrowstyle="-|>", mutation_scale=8, color=tint_of(FOLDERS[j])
        )
        arrow.set(linewidth=0.5 + 0.13 * count, alpha=0.75, zorder=1)
        axes.add_patch(arrow)


def draw_boxes(axes: Axes, lines: dict[str, int], boxes: dict[str, Box]) -> None:
    """Draw each module, as wide as it is long, with its number on the way."""
    for name, (x, y, width, height) in boxes.items():
        color = RED if name in BATCH else BLUE if name in END else tint_of(folder_of(name))
        box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06")
        box.set(facecolor="white", edgecolor=color, linewidth=1.6 if name in WAY else 0.7, zorder=4)
        axes.add_patch(box)
        at = {"ha": "center", "va": "center", "zorder": 5}
        middle, size = x + width / 2, 9 if name in WAY else 7.4
        axes.text(middle, y + 0.41 * height, short(name), size=size, color=INK, **at)
        axes.text(middle, y + 0.79 * height, str(lines[name]), size=5.8, color=PALE, **at)
        if name in WAY:
            draw_number(axes, x + 0.02, y + 0.02, name)


def draw_number(axes: Axes, x: float, y: float, stop: str) -> None:
    """Draw a stop's number."""
    color = RED if stop in BATCH else BLUE
    axes.add_patch(Circle((x, y), 0.115, facecolor=color, edgecolor="white", linewidth=0.9, zorder=6))
    at = {"ha": "center", "va": "center", "zorder": 7}
    axes.text(x, y + 0.005, str(list(WAY).index(stop) + 1), size=7.2, weight="bold", color="white", **at)


def draw_way(axes: Axes, boxes: dict[str, Box]) -> None:
    """Draw an arrow from stop to stop, behind the boxes."""
    for before, after in pairwise(WAY):
        (x0, y0, w0, h), (x1, y1, w1, _) = boxes[before], boxes[after]
        if y0 == y1:
            curve = Curve([(x0 + w0, y0 + h / 2), (x1 - 0.02, y1 + h / 2)])
        else:
            down = y1 > y0
            start, stop = (x0 + 0.64 * w0, y0 + h * down), (x1 + 0.36 * w1, y1 + h * (not down))
            if after in END:
                start, stop = (x0 + w0 / 2, start[1]), (x1 + w1 / 2, stop[1])
            middle = (start[1] + stop[1]) / 2
            curve = Curve([start, (start[0], middle), (stop[0], middle), stop], [1, 4, 4, 4])
        arrow = FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=11)
        arrow.set(color=BLUE if after in END else RED, linewidth=1.7, zorder=3, capstyle="butt")
        axes.add_patch(arrow)


def draw(found: dict[str, Any]) -> Figure:
    """Draw all of it."""
    folders = {name: textwrap.fill(told, 33) for name, told in found["folders"].items()}
    boxes, rows = place_boxes(folders, found["lines"])
    legend = rows[-1][1] + 0.62
    width, height = END_OF_ROW + 0.25, legend + 1.5
    figure = Figure(figsize=(width, height + 0.55))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, -0.55))
    axes.axis("off")
    draw_folders(axes, folders, rows)
    draw_imports(axes, found["imports"], rows)
    draw_way(axes, boxes)
    draw_boxes(axes, found["lines"], boxes)
    for x, said, color in [
        (0.3, "imports", PALE),
        (NAMES, "folders", INK),
        (LANE, "the way of one validation batch", RED),
        (LANE + 3.0, "and of the epoch's end", BLUE),
        (REST, "other modules", PALE),
    ]:
        axes.text(x, -0.35, said, va="center", size=10.5, weight="bold", color=color)
    for place, (stop, caption) in enumerate(WAY.items()):
        x, y = 0.35 + width / 3 * (place // 5), legend + 0.28 * (place % 5)
        draw_number(axes, x, y, stop)
        said = axes.text(x + 0.2, y, short(stop), size=8.4, weight="bold", va="center", color=INK)
        beside = {"xycoords": said, "xy": (1, 0.5), "xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(caption, size=8.4, va="center", color=INK, **beside)
    return figure


def main() -> None:
    """Draw, and keep what was drawn."""
    found = read_architecture()
    draw(found).savefig(IMAGES / "architecture.png", dpi=120, facecolor="white")
    DRAWN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
