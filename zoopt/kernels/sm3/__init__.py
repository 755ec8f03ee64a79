"""SM3: one accumulator for each row and column of a tensor."""
