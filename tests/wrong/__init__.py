"""A table of wrong inputs, by category: how each is made, and the words that must be said."""

from __future__ import annotations
