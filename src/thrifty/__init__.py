"""Neural networks that cost less: state a budget, get proven C for a microcontroller."""

__version__ = "0.1.0"
