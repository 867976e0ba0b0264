"""The memory of a search: every result in a file as soon as it is known, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thrifty.errors import StoreError
from thrifty.search.space import Point, Probe, Trial

SCHEMA = 1
LOG = "search.jsonl"


@dataclass
class State:
    """Results by point; with a folder, also in `search.jsonl` there: one request line, then one line a result."""

    folder: Path | None = None
    trials: dict[Point, Trial] = field(default_factory=dict)
    probes: dict[Point, Probe] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # single values, such as the scores on the test split
    resumed: int = 0  # results that were read, not made

    @staticmethod
    def open(folder: str | Path | None, request: Mapping[str, str]) -> State:
        """Start a search in a folder, or go on with the one that is there.

        request: what identifies the search, by name. Raises StoreError when the folder holds another search
        (it names what differs), an unreadable line, or cannot be written.
        """
        if folder is None:
            return State()
        state = State(Path(folder))
        path = state.log
        try:
            if path.exists():
                state._read(path, request)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_first(path, {"kind": "request", "schema": SCHEMA, "request": dict(request)})
        except OSError as err:
            raise StoreError(f"the search cannot keep its state in {folder}: {err.strerror or err}") from err
        return state

    @property
    def log(self) -> Path:
        """The file of results."""
        if self.folder is None:
            raise StoreError("this search has no folder")
        return self.folder / LOG

    def add_trial(self, trial: Trial) -> Trial:
        """Remember a trial."""
        self.trials[trial.point] = trial
        self._append({"kind": "trial", **trial.to_dict()})
        return trial

    def add_probe(self, probe: Probe) -> Probe:
        """Remember a probe."""
        self.probes[probe.point] = probe
        self._append({"kind": "probe", **probe.to_dict()})
        return probe

    def add_fact(self, name: str, value: Any) -> None:
        """Remember a single JSON value."""
        self.facts[name] = value
        self._append({"kind": "fact", "name": name, "value": value})

    def model_folder(self, recipe: str) -> Path | None:
        """Return where the trained model of a recipe (TOML text) belongs; None without a folder."""
        if self.folder is None:
            return None
        return self.folder / "models" / hashlib.sha256(recipe.encode()).hexdigest()[:16]

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()
        size = None
        try:
            with open(self.log, "ab") as file:
                size = file.tell()
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.log, size)
            raise StoreError(
                f"{self.log} cannot be written: {err.strerror or err}. What was finished before is kept; "
                "free some space and run the same search again"
            ) from err

    def _read(self, path: Path, request: Mapping[str, str]) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # killed in the middle of a line
            os.truncate(path, len(whole))
        lines = whole.decode("utf-8", errors="replace").splitlines()
        if not lines:
            _write_first(path, {"kind": "request", "schema": SCHEMA, "request": dict(request)})
            return
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    _same_request(path, entry, request)
                else:
                    self._take(entry)
            except (ValueError, KeyError, TypeError, AttributeError) as err:
                raise StoreError(
                    f"line {number} of {path} cannot be read ({err}); delete that line, or search in another folder"
                ) from err
        self.resumed = len(self.trials) + len(self.probes)

    def _take(self, entry: Mapping[str, Any]) -> None:
        kind = entry["kind"]
        if kind == "trial":
            trial = Trial.from_dict(entry)
            self.trials[trial.point] = trial
        elif kind == "probe":
            probe = Probe.from_dict(entry)
            self.probes[probe.point] = probe
        elif kind == "fact":
            self.facts[entry["name"]] = entry["value"]
        else:
            raise ValueError(f"unknown kind {kind!r}")


def _write_first(path: Path, entry: Mapping[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write((json.dumps(entry) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _same_request(path: Path, entry: Mapping[str, Any], request: Mapping[str, str]) -> None:
    if entry["kind"] != "request" or entry["schema"] != SCHEMA:
        raise StoreError(f"{path} was written by another version of the search; search in another folder")
    old = entry["request"]
    names = sorted(set(old) | set(request))
    changed = [
        f"{n}: {old.get(n, 'nothing')} there, {request.get(n, 'nothing')} now"
        for n in names
        if old.get(n) != request.get(n)
    ]
    if changed:
        listed = "\n".join(f"  - {c}" for c in changed)
        raise StoreError(
            f"{path} belongs to another search; search in another folder, or delete it. What differs:\n{listed}"
        )
