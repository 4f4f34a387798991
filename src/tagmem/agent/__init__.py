"""The host agent: answers offers, surfaces DAX devices, runs workloads, and proves release.

`loop` decides and `mailbox` speaks to an appliance, both without I/O; `devices`, `kernel`,
`workloads`, `proof` and `session` touch the world; `service` holds them together.
"""
