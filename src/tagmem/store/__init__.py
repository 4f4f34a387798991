"""Durable rows, outbox and history: one contract, in a SQLite file or in memory."""
