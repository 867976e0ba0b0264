"""Pictures of groups of layers: the matrix of CKA and the tree it was cut from; a page and standalone SVG files."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from thrifty.compress.layer_groups.grouping import Groups
from thrifty.report import Report, Table
from thrifty.report.svg import Axis, element, label, line, path, picture, titled

HUES = 6  # --hue0 .. --hue5 of page.css
STYLE = (
    "svg{font:11.5px system-ui,sans-serif;background:#fff}text{fill:#1c2127}.tick{fill:#5a6370}.end{text-anchor:end}"
    ".middle{text-anchor:middle}.branch{stroke:#5a6370;fill:none;stroke-width:1.5}.grid{stroke:#eaedf0}"
    ".cut{stroke:#b3261e;stroke-dasharray:5 3}.cka{fill:#2563b8}.cka-frame{fill:none;stroke:#dfe3e8}"
    ".cka-value{font-size:10px}.on-dark{fill:#fff}"
)
PAGE_STYLE = (
    ".branch{stroke:var(--soft);fill:none;stroke-width:1.5}.cut{stroke:var(--red);stroke-dasharray:5 3}"
    "svg .cka{fill:var(--blue)}.cka-frame{fill:none;stroke:var(--rule)}svg .cka-value{font-size:10px}"
    "svg .on-dark{fill:var(--paper)}"
)


def layer_name(index: int) -> str:
    """Return the name of a representation.

    >>> layer_name(0), layer_name(3)
    ('input', 'layer 3')
    """
    return "layer " + str(index) if index else "input"


def cka_matrix(groups: Groups, name: str = "cka") -> str:
    """Return the matrix of CKA: the darker, the more alike; the coloured bars show the groups."""
    size = len(groups.similarity)
    step = max(18.0, min(46.0, 460.0 / size))
    left, top = 86.0, 46.0
    low = float(groups.similarity.min())
    parts = []
    for row in range(size):
        parts.append(label(left - 16, top + (row + 0.5) * step + 4, layer_name(row), class_="tick end"))
        parts.append(label(left + (row + 0.5) * step, top - 14, str(row), class_="tick middle"))
        hue = _hue(groups, row)
        parts.append(element("rect", x=left - 12, y=top + row * step, width=8, height=step, style=hue))
        parts.append(element("rect", x=left + row * step, y=top - 11, width=step, height=8, style=hue))
        for column in range(size):
            parts.append(_cell(groups, row, column, left, top, step, low))
    end = left + size * step
    parts.append(element("rect", x=left, y=top, width=end - left, height=size * step, class_="cka-frame"))
    parts += _scale(low, left, top + size * step + 16)
    words = f"Linear CKA between {size} representations on {groups.frames} frames."
    return picture(name, "Similarity of the layers", words, (end + 12, top + size * step + 52), parts)


def tree(groups: Groups, name: str = "tree") -> str:
    """Return the tree of merges; the dashed line is where it was cut."""
    size = len(groups.similarity)
    order = _leaves(groups)
    row, left, top, width = 24.0, 92.0, 14.0, 420.0
    highest = max((m.height for m in groups.merges), default=1.0) or 1.0
    x = Axis(0.0, highest * 1.08, left, left + width)
    y = {leaf: top + (i + 0.5) * row for i, leaf in enumerate(order)}
    at = dict.fromkeys(range(size), 0.0)
    bottom = top + size * row + 4
    parts = []
    for value, words in x.ticks(5):
        parts += [line(x.at(value), top, x.at(value), bottom, "grid")]
        parts += [label(x.at(value), bottom + 15, words, class_="tick middle")]
    parts.append(label(left + width / 2, bottom + 33, "distance 1 − CKA at which groups merge", class_="tick middle"))
    for leaf in order:
        parts.append(element("rect", x=left - 16, y=y[leaf] - row / 2, width=8, height=row, style=_hue(groups, leaf)))
        parts.append(label(left - 22, y[leaf] + 4, layer_name(leaf), class_="tick end"))
    for number, merge in enumerate(groups.merges):
        a, b = merge.left, merge.right
        points = [(x.at(at[a]), y[a]), (x.at(merge.height), y[a]), (x.at(merge.height), y[b]), (x.at(at[b]), y[b])]
        parts.append(titled(path(points, class_="branch"), f"{merge.size} representations at {merge.height:.4f}"))
        y[size + number], at[size + number] = (y[a] + y[b]) / 2, merge.height
    if (cut := _cut(groups)) is not None:
        parts.append(line(x.at(cut), top, x.at(cut), bottom, "cut"))
    words = f"{groups.linkage} linkage, cut into {len(groups.groups)} groups."
    return picture(name, "Tree of the layers", words, (left + width + 14, bottom + 42), parts)


def standalone(drawing: str) -> str:
    """Return a picture as an SVG file of its own, on white."""
    head, _, rest = drawing.partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{head}><style>{STYLE}{_hue_style()}</style>{rest}\n"


def groups_table(groups: Groups) -> Table:
    """Return the groups as a table."""
    rows = []
    for number, members in enumerate(groups.groups):
        inside = groups.inside(number)
        names = ", ".join(layer_name(i) for i in members)
        rows.append((f"group {number + 1}", names, len(members), None if inside is None else f"{inside:.4f}"))
    note = f"Linear CKA on {groups.frames} frames; {groups.linkage} linkage" + (
        ", neighbours only." if groups.contiguous else "."
    )
    return Table("Groups", ("group", "representations", "members", "least CKA inside"), rows, note)


def page(groups: Groups, title: str) -> str:
    """Return one HTML file that needs nothing else."""
    style = files("thrifty.report").joinpath("page.css").read_text(encoding="utf-8") + PAGE_STYLE + _hue_style()
    table = groups_table(groups)
    made = Report(title)
    environment = " · ".join(f"{k} {made.environment[k]}" for k in ("thrifty", "torch") if k in made.environment)
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(c)}</td>' for c in row)}</tr>" for row in table.rows)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>\n{style}</style>\n'
        f"</head>\n<body>\n<main>\n<p class=made>{escape(environment)}</p><h1>{escape(title)}</h1>\n"
        f"<p class=verdict>{len(groups.groups)} groups of {len(groups.similarity)} representations</p>\n"
        f'<section><h2>Groups</h2><div class=scroll><table><tr>{head}</tr>{body}</table></div>'
        f"<p class=note>{escape(table.note)}</p></section>\n"
        f"<section><h2>Similarity of the layers</h2>{cka_matrix(groups)}"
        "<p class=note>Linear CKA of every two representations: 1 when one is the other rotated, scaled and shifted. "
        "The input is what enters layer 1; a layer's number stands for its raw output.</p></section>\n"
        f"<section><h2>Tree</h2>{tree(groups)}</section>\n</main>\n</body>\n</html>\n"
    )


def _cell(groups: Groups, row: int, column: int, left: float, top: float, step: float, low: float) -> str:
    value = float(groups.similarity[row, column])
    shade = (value - low) / (1 - low) if low < 1 else 1.0
    x, y = left + column * step, top + row * step
    box = element("rect", x=x, y=y, width=step, height=step, class_="cka", fill_opacity=round(0.04 + 0.96 * shade, 3))
    if step >= 26:
        kind = "cka-value middle on-dark" if shade > 0.55 else "cka-value middle"
        box += label(x + step / 2, y + step / 2 + 3.5, f"{value:.2f}".lstrip("0") if value < 1 else "1", class_=kind)
    return titled(box, f"{layer_name(row)} and {layer_name(column)}: {value:.4f}")


def _scale(low: float, left: float, top: float) -> list[str]:
    parts, steps = [], 24
    for i in range(steps):
        shade = round(0.04 + 0.96 * i / (steps - 1), 3)
        parts.append(element("rect", x=left + 6.0 * i, y=top, width=6.2, height=9, class_="cka", fill_opacity=shade))
    parts.append(label(left, top + 23, f"{low:.2f}", class_="tick"))
    parts.append(label(left + 6.0 * steps, top + 23, "1", class_="tick end"))
    return parts


def _leaves(groups: Groups) -> list[int]:
    """Return the representations from top to bottom so that no branches cross, earlier layers first."""
    size = len(groups.similarity)
    below: dict[int, list[int]] = {i: [i] for i in range(size)}
    for number, merge in enumerate(groups.merges):
        pair = sorted((below[merge.left], below[merge.right]), key=min)
        below[size + number] = pair[0] + pair[1]
    return below[size + len(groups.merges) - 1] if groups.merges else [0]


def _cut(groups: Groups) -> float | None:
    """Return a distance between the last merge that was made and the first that was not."""
    done = len(groups.similarity) - len(groups.groups)
    if done >= len(groups.merges):
        return None
    before = groups.merges[done - 1].height if done else 0.0
    return (before + groups.merges[done].height) / 2


def _hue(groups: Groups, index: int) -> str:
    number = next(i for i, members in enumerate(groups.groups) if index in members)
    return f"fill:var(--group{number % HUES})"


def _hue_style() -> str:
    colours: Sequence[str] = ("#5b8fd0", "#d58a4c", "#58a17a", "#9a7cc4", "#cf6679", "#4fa3a8")
    return "svg{" + "".join(f"--group{i}:{c};" for i, c in enumerate(colours)) + "}"


def _text(value: object) -> str:
    return "–" if value is None else escape(str(value))
