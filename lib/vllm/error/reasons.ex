defmodule VLLM.Error.Reasons do
  @moduledoc false
  # Every reason that a %VLLM.Error{} can have, with the meaning that its docs
  # show. The Python side names the same ones in vllm_bridge/errors.py; a test
  # compares the two.

  @reasons [
    # What the caller gave
    invalid_option:
      "an option's name or value is wrong; `details` has the option and the nearest name",
    invalid_prompt: "a prompt is empty or of the wrong kind",
    prompt_too_long: "the prompt does not fit into `max_model_len`",
    unsupported: "this engine, model or device cannot do what was asked",
    # Models
    not_allowed: "the model is none of those that `allowed_models` allows",
    model_not_found: "there is no such folder, or no such model on the hub",
    not_a_model: "the folder is there and is not a model (no readable `config.json`)",
    model_gated: "the model's owner must grant access; a token is needed",
    hub_unreachable: "the model is not in the cache and the hub does not answer",
    hub_unauthorized: "the hub refuses the token, or the token may not read the model",
    rate_limited:
      "the hub was asked too often; try again in `details[\"retry_after_ms\"]` milliseconds",
    download_corrupt: "what the hub sent is not the file that it told of; it was removed",
    disk_full: "files do not fit on the disk, or into the quota",
    cache_not_writable:
      "the folder of downloaded models, or that of what is made here, cannot be written to",
    in_use: "an engine serves the model; stop it before the model is deleted",
    unsupported_model: "the installed vLLM does not know this architecture",
    unsupported_quantization: "this quantization does not run here, or is not the checkpoint's",
    invalid_checkpoint: "the model's files are damaged or contradict its config",
    out_of_memory: "the model or its KV cache does not fit into the memory",
    # The worker and its surroundings
    python_not_found: "no Python interpreter, or no virtual environment; run `mix vllm.setup`",
    vllm_not_installed: "the Python that was found has no vLLM; run `mix vllm.setup`",
    quantize_not_installed:
      "there is no environment that quantizes, or not all of it; run " <>
        "`mix vllm.setup --with quantize`",
    vllm_version: "the installed vLLM is not one that this version works with",
    load_failed: "vLLM could not start the engine for another reason; see `details`",
    load_timeout: "the engine was not ready within `load_timeout`",
    engine_dead: "the worker or vLLM's engine ended while the request was in flight",
    failed: "the engine gave up after too many failures; the message has the last one",
    not_running: "there is no engine of this name, or it was stopped",
    node_down:
      "the engine's node, or one that computes a part of its model, cannot be reached, or was " <>
        "lost with the call; see guides/clusters.md",
    node_incompatible:
      "the engine's node has no version of this library that understands this one's; or not the " <>
        "packages or the model of the others",
    shutdown: "the engine was stopped while the request was in flight",
    # Requests
    timeout:
      "the deadline (`timeout`) passed first, or a stream stalled for its `inter_token_timeout`",
    queue_timeout: "vLLM had not begun with the request when its `queue_timeout` was over",
    poison:
      "the worker died with the request in flight, was given it once more (`retry: true`), and " <>
        "died again",
    overloaded:
      "too many requests are in flight or waiting; try again in `details[\"retry_after_ms\"]` " <>
        "milliseconds",
    aborted: "the request or the job was cancelled, or the engine put to sleep",
    # Jobs
    job_not_found: "there is no job of this id",
    job_running: "this can be done with a job that has ended only; cancel it first",
    job_interrupted: "the application that ran the job ended; `VLLM.Job.retry/2` goes on with it",
    name_taken: "a model of this name is there already, or another job makes it",
    not_verified: "what a job has made says something else than its source; it was removed",
    source_changed: "the model's files have changed since the job began",
    step_died: "the process of a job's step ended; `details[\"log\"]` has its last lines",
    # Faults of our own making
    protocol: "the two sides did not understand each other; the worker is restarted",
    internal: "a fault in this library or in vLLM; `details` has the traceback where there is one"
  ]

  @spec all() :: [{atom(), String.t()}]
  def all, do: @reasons
end
