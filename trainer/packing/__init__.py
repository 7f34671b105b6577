"""Packing: assign samples to ranks, and pack them into micro-batches without padding.

In: samples of one call (`trainer.types.Sample`). Out: each rank's share, and rows for the model's
forward. numpy only.

1. `units`: group samples by prompt (`plan_units`), divide the units over ranks by their work
   (`split_over_ranks`, in the main process), and fill micro-batches (`micro_batches`, in a rank).
2. `layout`: lay out the units of one micro-batch as a single row in which shared prompts appear
   once (`pack`).
"""
