"""Compares the methods of zoopt.selection on the demo's model and sentences."""
