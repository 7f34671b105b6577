"""Indexes of a corpus, and how they are built.

A corpus comes in as a JSON-lines file; a folder goes out that `agentloop search serve` opens.

    base       `Index`: queries to passage numbers and scores
    building   read the corpus in parts, each kept on disk: a build that was killed goes on there
    arrays     numpy's files, on disks that may be full
    bm25       words: bm25s's own files, made in bounded memory
    dense      vectors of an encoder, in faiss
    folder     the finished folder: its manifest, checksums, and opening it
"""
