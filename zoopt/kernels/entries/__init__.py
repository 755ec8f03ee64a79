"""Some entries of each tensor, at int32 positions."""
