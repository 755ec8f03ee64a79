"""What every numba kernel needs: threads, intrinsics, conversions between dtypes."""
