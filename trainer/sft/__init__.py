"""Supervised fine-tuning with the ranks, packing and checkpoints of reinforcement learning.

`rows` reads rows of many shapes and brings conversations into the one form that chat templates
know. `tokenizing` turns a row into token ids and a loss mask, with the ids that a rollout of the
same conversation would have. `stage` holds the tokenized rows of one stage and says which of them a
step trains on. `run` trains the stages one after the other, evaluates, saves, and writes the model.
"""
