"""The simulator and its helpers: shipped, so that an integrator can run tagmem against faults of their own."""
