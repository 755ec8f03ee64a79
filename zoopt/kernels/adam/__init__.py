"""Adam on stored moments: decode, update and encode in one pass."""
