"""Run groups of episodes and turn them into samples.

In: rows, an episode runner and the policy version. Out: `TrainSample`s with advantages.

    image_canary  before the first group: refuse a server that does not see images
    producer      admit groups as far ahead as `max_staleness` allows, run them, return them in
                  order
    error_log     show exceptions of user code once, and write all of them to logs/errors.jsonl
    group_file    write finished groups into a checkpoint and read them back
    samples       omit failed episodes, shape rewards, make samples, set advantages
    preparation   get logprobs and values from the ranks; whiten over the batch
"""
