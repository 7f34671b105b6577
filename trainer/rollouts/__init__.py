"""Groups on their way to samples.

In: rows, an episode runner and the policy version. Out: `TrainSample`s with advantages, ready for the ranks.

    producer      admit groups as far ahead as `max_staleness` allows, run their episodes, return them in order
    group_file    write finished groups into a checkpoint and read them back
    samples       leave out failed episodes, shape rewards, make samples, set advantages
    preparation   ask the ranks for reference and proximal logprobs and values; whiten over the batch
"""
