defmodule VLLM.Job do
  @fields [
    id:
      "names the job: `\"20261128T041233-4fj2\"`; what all functions take, as well as the job itself",
    kind: "`:quantize` or `:finetune`",
    name: "the name under which its outputs are registered",
    source: "the model that it is made of: a hub id or a folder",
    options: "what was asked for: a map with string keys, without secrets",
    state: "see below",
    outputs: "a list of `VLLM.Job.Output`; empty until it is known what they will be called",
    progress: "the last `VLLM.Job.Progress`; nil before there is any",
    error: "the `VLLM.Error` of one that failed or was interrupted",
    made_at: "when it was asked for, a `DateTime`",
    started_at: "when it began; nil while it waits for others",
    ended_at: "when it ended; nil before"
  ]

  @moduledoc """
  Jobs: long work on models, supervised.

  ## A job

  #{VLLM.Fields.docs(@fields)}
  """

  alias VLLM.Error
  alias VLLM.Job.{Output, Progress}

  @enforce_keys [:id, :kind, :name, :source, :state]
  defstruct [
    :id,
    :kind,
    :name,
    :source,
    :state,
    :progress,
    :error,
    :made_at,
    :started_at,
    :ended_at,
    options: %{},
    outputs: []
  ]

  @type state ::
          :queued
          | :downloading
          | :preparing
          | :quantizing
          | :training
          | :verifying
          | :done
          | :failed
          | :cancelled
          | :interrupted

  @type t :: %__MODULE__{
          id: String.t(),
          kind: :quantize | :finetune,
          name: String.t(),
          source: String.t(),
          options: %{String.t() => term()},
          state: state(),
          outputs: [Output.t()],
          progress: Progress.t() | nil,
          error: Error.t() | nil,
          made_at: DateTime.t(),
          started_at: DateTime.t() | nil,
          ended_at: DateTime.t() | nil
        }
end
