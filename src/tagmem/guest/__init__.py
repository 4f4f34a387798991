"""The guest agent: finds tagged memory inside a VM, names it, runs commands on it, proves release.

Standard library only, so that it runs on the bare python3 of an initramfs and of any distribution;
imports only `base`, `wire.guest`, `io.holders` and `client`.
"""
