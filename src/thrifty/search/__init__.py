"""Search: which recipe makes a model fit a budget at the least loss."""

from thrifty.search.ending import Result
from thrifty.search.optimizer import optimize
from thrifty.search.space import Point, Trial, pareto

__all__ = ["Point", "Result", "Trial", "optimize", "pareto"]
