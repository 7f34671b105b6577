"""Supervised fine-tuning with the ranks, packing and checkpoints of reinforcement learning.

`rows` reads rows of many shapes and brings conversations into the one form that chat templates
know. `tokenizing` turns a row into token ids and a loss mask, with the ids that a rollout of the
same conversation would have. `stage` holds the tokenized rows of one stage and chooses the batch of
each step. `run` trains the stages in order, evaluates, saves, and writes the model.
"""
