"""Parameters and optimizers on several processes."""
