"""Pretrained transformers for less: methods on Hugging Face causal language models, read through one table of families.

Needs the extra `llm`; transformers is imported when a checkpoint is loaded, not before.
"""

from __future__ import annotations

from thrifty.llm.families import FAMILIES, Family, Parts, parts_of

__all__ = ["FAMILIES", "Family", "Parts", "parts_of"]
