"""Reports what is installed, what runs on this machine, and whether its results are right."""
