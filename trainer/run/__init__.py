"""A training run, from its first check to its last checkpoint.

In: a recipe, a run directory, a console. Out: trained versions, `metrics.jsonl`, traces,
checkpoints.

    rundir            paths of a run, who may use it, what a resumed run removes
    preflight         load and check everything before a process starts -> `RunInputs`
    notices           what the user should know that is not an error
    processes         start ranks, server and runner as one async context -> `Processes`
    run               the loop: evaluate, train, record, save, stop
    stop              Ctrl-C: stop where nothing is lost, or at once
    step              one training step: groups -> gradients -> new version -> metrics
    step_sums, episode_metrics        the numbers of a step
    evaluation, eval_metrics          episodes on `data.val`, between steps or in the background
    checkpoints       when to save, and what to keep
"""
