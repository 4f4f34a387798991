"""`tagmem up`, `tagmem down` and `tagmem demo`: all of tagmem on one machine, to be seen."""
