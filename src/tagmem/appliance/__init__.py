"""The emulated memory appliance: a multi-headed dynamic capacity device with real bytes, as a
process.
"""
