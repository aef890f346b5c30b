"""The embedded model: its data, its training recipe, its measurements and its loader."""
