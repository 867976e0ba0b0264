"""Answers of a language model, asked once, stored in a JSON file and replayed from there without the model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from thrifty.errors import StoreError
from thrifty.fewshot.one_class.negatives import Negatives, clean, parse_answer
from thrifty.fewshot.one_class.wordnet import WordNet
from thrifty.fewshot.preprocess import InputError

SCHEMA = 1
# The paper's prompt was not available (specs/fewshot.md 3b); this one is ours and is an option everywhere.
PROMPT = (
    "List {count} other things that look like a {label} in a photo and could be mistaken for a {label}, "
    "but are not a {label}. Answer with a numbered list of {count} short names and nothing else."
)
EXAMPLES = (  # to be continued by a model that follows no instructions; its answer ends at the line's end
    "What each thing is easily confused with in a photo:\n"
    "violin: viola, cello, guitar, banjo, mandolin, ukulele, lute, harp, double bass, bow\n"
    "dolphin: porpoise, whale, shark, seal, tuna, swordfish, orca, sea lion, manatee, dugong\n"
    "office chair: armchair, stool, sofa, bench, rocking chair, wheelchair, desk, car seat, throne, couch\n"
    "{label}:"
)


class Source(Protocol):
    """Something that answers prompts. `settings` holds, as JSON, all that its answers depend on."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the answers depend on: model, decoding, seed."""

    def answer(self, prompts: Sequence[str]) -> list[str]:
        """Return one answer to each prompt."""


class AnswerFile:
    """A JSON file of answers by label: who was asked what, and every answer word for word.

    A file has one prompt and one source; opening it with others is refused, so that no answer is taken for another's.
    It is written to a temporary file and renamed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     AnswerFile(Path(folder) / "a.json", prompt="{label}?").add({"cat": "1. lynx"})
    ...     AnswerFile(Path(folder) / "a.json").answers
    {'cat': '1. lynx'}
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any] | None = None, prompt: str | None = None, count: int = 10
    ) -> None:
        self.path = Path(path)
        asked = {"prompt": prompt or PROMPT, "count": count, "source": dict(settings or {})}
        self.answers: dict[str, str] = {}
        self.asked: dict[str, Any] = asked
        if self.path.exists():
            stored = self._read()
            self.answers, self.asked = stored["answers"], stored["asked"]
            given = {"source": settings is not None, "prompt": prompt is not None}
            differ = [k for k, g in given.items() if g and self.asked[k] != json.loads(json.dumps(asked[k]))]
            if differ:
                raise StoreError(
                    f"{self.path} holds answers to another {' and '.join(differ)}: {[self.asked[k] for k in differ]} "
                    f"there, {[asked[k] for k in differ]} now; give another file name"
                )

    def add(self, answers: Mapping[str, str]) -> None:
        """Store more answers, and write the file."""
        self.answers.update(answers)
        content = {"schema": SCHEMA, "asked": self.asked, "answers": dict(sorted(self.answers.items()))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def missing(self, labels: Iterable[str]) -> list[str]:
        """Return the labels without an answer, in order, once each."""
        return [label for label in dict.fromkeys(labels) if label not in self.answers]

    def prompts(self, labels: Iterable[str]) -> list[str]:
        """Return what is asked about each label."""
        return [self.asked["prompt"].format(label=label, count=self.asked["count"]) for label in labels]

    def negatives(self, label: str, count: int = 10, wordnet: WordNet | None = None) -> Negatives:
        """Return the names parsed from the stored answer, filtered by `negatives.clean`."""
        if label not in self.answers:
            raise InputError(f"{self.path} has no answer for '{label}'; collect it first (one_class.collect)")
        who = str(self.asked["source"].get("model", self.path.name))
        return clean(label, parse_answer(self.answers[label]), count, wordnet=wordnet, source=who)

    def _read(self) -> dict[str, Any]:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            known = stored["schema"] == SCHEMA and all(isinstance(v, str) for v in stored["answers"].values())
            known = known and {"prompt", "count", "source"} <= set(stored["asked"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            raise StoreError(f"{self.path} is not a file of answers: {err!r}; give another file name") from err
        if not known:
            raise StoreError(f"{self.path} is not a file of answers of schema {SCHEMA}; give another file name")
        result: dict[str, Any] = stored
        return result


def collect(
    labels: Iterable[str], file: AnswerFile, source: Source | None = None, *, batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Return label -> answer, asking the source only for what the file does not hold yet.

    Written after every batch, so an interrupted collection goes on where it stopped. Without a source the file is
    replayed, and missing answers raise InputError, all named. progress: called with (done, all) of this call.
    """
    wanted = list(dict.fromkeys(labels))
    missing = file.missing(wanted)
    if missing and source is None:
        raise InputError(
            f"{file.path} has no answer for {len(missing)} label(s), such as {', '.join(missing[:5])}; "
            "give a source to ask"
        )
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        if source is not None:
            found = source.answer(file.prompts(part))
            file.add(dict(zip(part, found, strict=True)))
        if progress is not None:
            progress(start + len(part), len(missing))
    return {label: file.answers[label] for label in wanted}
