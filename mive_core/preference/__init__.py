"""Blind comparisons by people: a page that shows two edits of a clip side by side, and what the votes on it say."""
