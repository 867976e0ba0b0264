"""What every position decodes to at every depth, as a table that one can read: a self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from thrifty.errors import DataError
from thrifty.llm.families import parts_of
from thrifty.llm.streams import stream_states

STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#1a1a1a;background:#fff}
h1{font-size:1.4em}p{max-width:60em}p span{padding:0 .3em}
table{border-collapse:separate;border-spacing:1px;font:12px/1.3 ui-monospace,monospace}
td,th{padding:2px 6px;text-align:center;white-space:pre;max-width:9em;overflow:hidden;text-overflow:ellipsis}
td{background:#f8f8f8}th{background:#e9e9e9}tr:first-child th{position:sticky;top:0;z-index:1}
tr th:first-child{position:sticky;left:0;text-align:right}
.in{background:#fde0c8}.out{background:#c3dcf5}.both{background:#e2d6ee}.same{background:#d5ecd5}"""


@dataclass(frozen=True)
class Trace:
    """The likeliest token of the lens for every depth and position of one text."""

    tokens: tuple[str, ...]  # (t,) the text
    decoded: tuple[tuple[str, ...], ...]  # (K + 1, t)
    matches: tuple[tuple[str, ...], ...]  # (K + 1, t): "in", "out", "both", "same" as the final prediction, or ""

    def to_html(self, title: str = "Decoding trajectory") -> str:
        """Return one page without scripts and links; the deepest row is on top."""
        head = "".join(f"<th>{_shown(t)}</th>" for t in self.tokens)
        rows = []
        for depth in range(len(self.decoded) - 1, -1, -1):
            cells = "".join(
                f'<td class="{kind}">{_shown(word)}</td>' if kind else f"<td>{_shown(word)}</td>"
                for word, kind in zip(self.decoded[depth], self.matches[depth], strict=True)
            )
            rows.append(f"<tr><th>{depth}</th>{cells}</tr>")
        words = (
            "<p>Columns: the tokens of the text. Each cell: the likeliest token that the lens reads there at that "
            'depth (0: what enters the first block). Colours: <span class="in">the token of the column itself</span> '
            '<span class="out">the next token of the text</span> <span class="both">both</span> '
            '<span class="same">neither, but what the model finally predicts</span></p>'
        )
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
            f"<h1>{escape(title)}</h1>{words}<table><tr><th>depth</th>{head}</tr>{''.join(rows)}</table></html>\n"
        )


def trace(model: nn.Module, ids: Tensor, tokenizer: Any) -> Trace:
    """Return what each position of a text decodes to at each depth.

    ids: (t,), t >= 2. tokenizer: anything with decode([id]) -> text. The last position has no next token.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 1 or len(ids) < 2:
        got = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"type {type(ids).__name__}"
        raise DataError(f"ids has {got}; a trace needs one text of at least two tokens, a tensor (t,)")
    parts = parts_of(model)
    states, logits = stream_states(parts, {"input_ids": ids[None]})
    final = logits[0].argmax(-1).tolist()
    here, after = ids.tolist(), [*ids[1:].tolist(), None]
    decoded, matches = [], []
    for state in states:
        with torch.inference_mode():
            best = parts.logits(state)[0].argmax(-1).tolist()
        decoded.append(tuple(tokenizer.decode([i]) for i in best))
        matches.append(tuple(_kind(*found) for found in zip(best, here, after, final, strict=True)))
    return Trace(tuple(tokenizer.decode([i]) for i in here), tuple(decoded), tuple(matches))


def _kind(found: int, here: int, after: int | None, final: int) -> str:
    if found == here:
        return "both" if found == after else "in"
    return "out" if found == after else "same" if found == final else ""


def _shown(word: str) -> str:
    """Return a token for HTML with its blanks visible; what cannot be seen is a dot."""
    word = word.replace(" ", "\u2423").replace("\n", "\u23ce").replace("\t", "\u21e5")
    return escape("".join(c if c.isprintable() else "\u00b7" for c in word) or "\u2205")
