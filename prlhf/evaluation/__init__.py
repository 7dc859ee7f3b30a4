"""Accuracy, win rates, judges and reports of a trained policy."""
