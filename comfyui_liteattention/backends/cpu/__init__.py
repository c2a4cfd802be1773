"""The CPU: a numba kernel that really skips."""
