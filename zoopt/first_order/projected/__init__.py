"""The parts of projected optimizers: projector x rule x codec."""
