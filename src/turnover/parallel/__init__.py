"""Many computations, by this process or by Ray."""
