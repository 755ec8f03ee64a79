"""Frameworks with their own training loop. Only its own module imports a framework."""
