"""Descent along estimates that are more than a sum of directions: shaped, averaged, signed."""
