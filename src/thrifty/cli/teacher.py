"""The teacher that the flags of the command line name."""

from __future__ import annotations

import argparse
from pathlib import Path

from thrifty.cli.inputs import read_model, refuse_shapes
from thrifty.cli.show import remark
from thrifty.errors import KnobError
from thrifty.objectives import Teaching
from thrifty.task import Task


def refuse_teacher(args: argparse.Namespace) -> None:
    """Raise KnobError, before any work, for flags of a teacher that do not go together; it lists them all."""
    own = {"--teacher-weights": args.teacher_weights, "--teacher-args": args.teacher_args}
    how = {
        "--objective": args.objective,
        "--objective-knobs": args.objective_knobs,
        "--objective-weight": args.objective_weight is not None,
    }
    off = getattr(args, "no_teacher", None)
    bad = []
    if args.teacher is None and (alone := [flag for flag, given in own.items() if given]):
        bad.append(f"{' and '.join(alone)} need{'s' if len(alone) == 1 else ''} --teacher MODEL")
    if off is None and args.teacher is None and (alone := [flag for flag, given in how.items() if given]):
        bad.append(f"{' and '.join(alone)} need{'s' if len(alone) == 1 else ''} --teacher MODEL")
    if off and (both := [flag for flag, given in {"--teacher": args.teacher, **how}.items() if given]):
        bad.append(f"--no-teacher and {' and '.join(both)} exclude each other")
    if bad:
        raise KnobError("; ".join(bad))


def read_teaching(args: argparse.Namespace, task: Task) -> Teaching | None:
    """Return who teaches and what, or None for nobody. Raises what `read_model` raises, of the teacher."""
    if getattr(args, "no_teacher", False):
        return None
    teacher = None
    if args.teacher is not None:
        named = argparse.Namespace(
            verb="teacher", model=args.teacher, model_args=args.teacher_args, weights=args.teacher_weights, factory=None
        )
        saved = Path(args.teacher).is_dir()
        try:
            teacher, _ = read_model(named, task)
        except KnobError as err:
            if saved and "--factory" in str(err):
                words = f"write --teacher file.py:Name --teacher-weights {args.teacher}"
                raise KnobError(f"{args.teacher} holds no code; {words}") from err
            raise
        refuse_shapes(teacher, task.example)
        if args.teacher_weights is None and not saved:
            remark("no --teacher-weights: the teacher is used as its factory makes it")
    return Teaching(
        teacher=teacher,
        objective=args.objective or Teaching.objective,
        weight=args.objective_weight,
        knobs=dict(args.objective_knobs),
        compare=not getattr(args, "no_teacher_check", False),
    )
