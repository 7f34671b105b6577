"""`agentloop serve`, and the same options behind `python -m rollout_server`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from agentloop.errors import ConfigError
from rollout_server.settings import ServerSettings, token_from_environment

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def register(app: typer.Typer) -> None:
    """Add the server's commands to the `agentloop` program."""
    app.command("serve")(serve)


def serve(
    model: Annotated[str, typer.Option(help="folder with config.json and safetensors, or a hub id")],
    engine: Annotated[str, typer.Option(help="torch: embedded; sglang; or a registered name")] = "torch",
    replicas: Annotated[int, typer.Option(help="engines; more than one run as child processes")] = 1,
    replica_url: Annotated[
        list[str] | None, typer.Option(help="route to a server that runs already; repeat for more")
    ] = None,
    host: Annotated[str, typer.Option(help="address to bind; any but loopback needs --token-env")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one; it is logged and in --ready-file")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    max_running: Annotated[int, typer.Option(help="requests that decode at once; others wait")] = 64,
    max_kv_tokens: Annotated[int | None, typer.Option(help="KV cache in tokens; default: from --max-running")] = None,
    context_length: Annotated[int | None, typer.Option(help="longest sequence; default: the model's own")] = None,
    threads: Annotated[int, typer.Option(help="intra-op threads of a replica; leave cores to the others")] = 1,
    python: Annotated[str | None, typer.Option(help="interpreter of the engine's own environment, for sglang")] = None,
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="passed on to SGLang, as --engine-arg=--mem-fraction-static=0.7")
    ] = None,
    gpus_per_replica: Annotated[int, typer.Option(help="tensor parallelism of one SGLang replica")] = 1,
    max_queue: Annotated[
        int | None, typer.Option(help="requests that may wait; beyond, 503 with Retry-After. Default: no limit")
    ] = None,
    stream_tokens: Annotated[
        int, typer.Option(help="tokens of an answer that are lost at most when its replica dies; 0: all")
    ] = 64,
    weights_root: Annotated[
        list[Path] | None, typer.Option(help="folder that /update_weights_from_disk may read; repeat for more")
    ] = None,
    weight_version: Annotated[str, typer.Option(help="what the weights at the start are called")] = "0",
    weights: Annotated[Path | None, typer.Option(help="published weights to start from, not the model's own")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="written when it serves: {url, pid}")] = None,
    token_env: Annotated[str | None, typer.Option(help="environment variable that holds the bearer token")] = None,
    admin_token_env: Annotated[
        str | None, typer.Option(help="variable with a token of its own for pause, update, abort and the like")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="replicas' logs; default: a temporary folder")] = None,
    probe_timeout: Annotated[
        float, typer.Option(help="seconds without a sampled token after which a replica is taken for hung")
    ] = 20.0,
    start_timeout: Annotated[float, typer.Option(help="seconds that a replica may take to start")] = 300.0,
    drain: Annotated[float, typer.Option(help="seconds that requests may take to end after SIGTERM")] = 10.0,
    incremental_streaming_output: Annotated[
        bool, typer.Option(help="events of a stream hold new tokens only, as with SGLang's flag of this name")
    ] = False,
    deterministic: Annotated[
        str,
        typer.Option(
            help="on: answers do not depend, to the bit, on what else is served; auto: where the engine can; off"
        ),
    ] = "off",
    parent_pid: Annotated[int | None, typer.Option(help="end when this process is gone")] = None,
    seed: Annotated[int, typer.Option(help="of requests that bring no sampling_seed")] = 0,
) -> None:
    """Serve a model: tokens in, tokens out, in SGLang's HTTP dialect.

    Try it:

        agentloop serve --model recipes/quickstart/model --port 30000

        curl localhost:30000/generate -d '{"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 8}}'

    A trainer changes the weights with /pause_generation, /update_weights_from_disk (folders under --weights-root only)
    and /continue_generation; requests that run meanwhile are finished, and tell which version sampled which token.
    State: /health, /server_info, /metrics. The schema: /openapi.json.
    """
    try:
        settings = ServerSettings(
            model=model, engine=engine, host=host, port=port, device=device, dtype=dtype, max_running=max_running,
            max_kv_tokens=max_kv_tokens, context_length=context_length, threads=threads,
            weights_roots=tuple(weights_root or ()), weight_version=weight_version, weights=weights,
            ready_file=ready_file, token=token_from_environment("token-env", token_env), parent_pid=parent_pid,
            seed=seed, replicas=replicas, replica_urls=tuple(replica_url or ()), python=python,
            engine_args=tuple(engine_arg or ()), gpus_per_replica=gpus_per_replica, max_queue=max_queue,
            stream_tokens=stream_tokens, admin_token=token_from_environment("admin-token-env", admin_token_env),
            log_dir=log_dir, probe_timeout_s=probe_timeout, start_timeout_s=start_timeout, drain_s=drain,
            incremental_streaming_output=incremental_streaming_output, deterministic=deterministic,
        )  # fmt: skip
    except ValidationError as exc:
        first = exc.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name}: {first['msg']}", "see agentloop serve --help") from None
    # Before torch is imported: its thread pools are sized once.
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from rollout_server.launch import serve as launch

    raise typer.Exit(launch(settings))
