"""Hosts whose caches lie: what software-coherent memory does to a program that forgets to say when
its stores are to be seen, on one machine and from a seed.

`caches` is the memory with its stale views, `luck` the judgement of who depended on them, `hosts`
the two as the `Memory` of `tagmem.shared`; `check` and what it is built of run a real program on
them, access by access (`tagmem check-coherence`).
"""
