"""Trained models in use: answers from Python, and exports to other programs."""
