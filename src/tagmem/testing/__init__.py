"""The simulator and its helpers: shipped, so that others can run tagmem on faults of their own."""
