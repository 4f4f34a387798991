"""Adapters to the operating system: what they hide is errno, descriptors and the clock."""
