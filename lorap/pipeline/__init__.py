"""Compression of a whole model: the passes over its layers, in memory and from disk to disk.

One pass feeds each layer with the output of the compressed layers before it and compresses it
(``layers``); where the allocation or the scores ask for it, another pass over the uncompressed
model comes first (``measure``). ``in_memory`` and ``on_disk`` are the two ways in.
"""
