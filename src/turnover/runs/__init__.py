"""Runs: folders with a trained classifier, its data and its results."""
