"""Recovery with a teacher: which steps of a recipe it teaches, and what it bought."""

from __future__ import annotations

from dataclasses import dataclass

from thrifty.compress.train import Train
from thrifty.objectives.teaching import Teaching
from thrifty.recipe import Recipe, Technique
from thrifty.report import Report, Table


def trains(recipe: Recipe) -> bool:
    """Whether any step of a recipe trains."""
    return any(map(_trains, recipe))


def _trains(step: Technique) -> bool:
    return bool(getattr(step, "recover_epochs", 0) or getattr(step, "epochs", 0))


def parted(recipe: Recipe, teaching: Teaching | None) -> tuple[Recipe, Recipe]:
    """Return the steps of a recipe before the teacher comes, and those that it teaches.

    The trainings at the start make the float model, which teaches the rest; another teacher teaches them too.
    """
    if teaching is None:
        return recipe, Recipe()
    if teaching.teacher is not None:
        return Recipe(), recipe
    first = next((i for i, step in enumerate(recipe) if not isinstance(step, Train)), len(recipe))
    return Recipe(recipe.steps[:first]), Recipe(recipe.steps[first:])


def taught_in(recipe: Recipe, teaching: Teaching | None) -> bool:
    """Whether a teacher has something to teach in a recipe."""
    return trains(parted(recipe, teaching)[1])


@dataclass(frozen=True)
class Lesson:
    """One recipe, trained with a teacher and without it: validation scores."""

    teaching: str  # who taught what
    taught: float
    alone: float | None  # None: not compared

    @property
    def kept(self) -> bool:
        """Whether what was taught is kept; with equal scores it is."""
        return self.alone is None or self.taught >= self.alone

    def tell(self, report: Report) -> None:
        """Write a table and a sentence into a report."""
        if self.alone is None:
            report.notes.append(f"teacher ({self.teaching}): not compared with training without it")
            return
        title = "What the teacher bought: the same recipe, with it and without it"
        rows = [
            (self.teaching, self.taught, "kept" if self.kept else ""),
            ("no teacher", self.alone, "" if self.kept else "kept"),
        ]
        report.tables.append(Table(title, ("trained with", "validation score", ""), rows))
        report.notes.append(
            f"teacher ({self.teaching}): {self.taught - self.alone:+.4f} {report.metric} on validation; the model "
            f"trained {'with' if self.kept else 'without'} it is kept"
        )
