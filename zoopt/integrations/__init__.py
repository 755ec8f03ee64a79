"""Frameworks that own the training loop: one module each, which alone imports the framework."""
