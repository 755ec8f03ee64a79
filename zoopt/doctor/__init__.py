"""What is installed, what runs here, and whether it computes what it should."""
