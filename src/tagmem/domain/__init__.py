"""The rules: pure, total, deterministic. Knows no bytes, no sockets, no clock."""
