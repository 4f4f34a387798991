"""The proof that a release stands on, by the name that the agent knows it by.

It lives in `io.holders`, so that the guest agent proves a release inside a guest in the same way.
"""

from tagmem.io.holders import Proof, Prover, Target

__all__ = ["Proof", "Prover", "Target"]
