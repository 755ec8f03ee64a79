"""The machinery of zeroth-order steps: probes, perturbations, directions, updates."""
