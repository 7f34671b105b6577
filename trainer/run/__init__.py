"""A training run, from its first check to its last checkpoint.

In: a recipe, a run directory, a console. Out: trained versions, `metrics.jsonl`, traces,
checkpoints.

    rundir            paths of a run, claims on it, cleaning up for a resumed run
    preflight         load and check everything before a process starts -> `RunInputs`
    notices           notices and warnings for the user
    processes         start ranks, server and runner as one async context -> `Processes`
    run               the loop: evaluate, train, record, save, stop
    stop              Ctrl-C, a closed terminal: stop where no work is lost, or at once
    step              one training step: groups -> gradients -> new version -> metrics
    colocation        hand shared GPUs from the engine to the trainer, and back
    step_sums, episode_metrics        the numbers of a step
    evaluation, eval_metrics          episodes on `data.val`, between steps or in the background
    traces            write a step's episodes, and say what looks wrong in them
    checkpoints       when to save checkpoints, and which to keep
"""
