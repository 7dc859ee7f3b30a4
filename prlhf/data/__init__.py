"""Preference data: rows, readers of raw formats, preparation, tokens, batches."""
