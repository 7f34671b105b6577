"""The retrieval server: queries over HTTP, passages as JSON.

app        POST /retrieve, /health, /metrics: reads requests, refuses wrong ones
service    `Retrieval`: a request's queries through the caches, the batcher and the corpus
batching   `Batcher`: the queries of all requests that wait become one batch of the index
cache      `Lru`: repeated queries, and passages that are read often
metrics    what Prometheus reads
serving    the process: its port, its token, its end
"""
