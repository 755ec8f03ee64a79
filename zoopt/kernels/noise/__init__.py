"""Operations along directions of noise: perturb, apply_, momentum_, adam_window_, rows."""
