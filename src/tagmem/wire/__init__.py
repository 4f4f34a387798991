"""Bytes to frozen values and back: CXL and MCTP structures, byte-exact, with no I/O, no clock and
no domain rules.
"""
