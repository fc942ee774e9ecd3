"""The training recipe of the bundled test model: text -> documents with facts -> model -> GGUF.

Needs torch, tokenizers, numpy and gguf, none of which is imported before a module needs it.
Run `python -m models.recipe.train --help` in the root of the repository.
"""

from __future__ import annotations


class RecipeError(ValueError):
    """A mistake in what the recipe was given, told in a sentence with the way out."""
