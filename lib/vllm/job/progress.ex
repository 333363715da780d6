defmodule VLLM.Job.Progress do
  @fields [
    job: "the job's id",
    state: "the job's state, see `VLLM.Job`",
    output:
      "the label of the output that is worked on, such as `\"Q4_K_M\"`; nil before there is one",
    output_number: "which one of the outputs that is, from 1; nil before there is one",
    outputs: "how many outputs the job has; nil before that is known",
    phase:
      "what is done now, in a word of the step's own: `\"download\"`, `\"layers\"`, `\"writing\"`, …",
    done: "how many parts of the phase are done, layers mostly; nil where they are not counted",
    total: "how many there are",
    bytes: "bytes of it that are there, of downloads and files; nil where they are not counted",
    total_bytes: "how many there will be",
    seconds_left: "until the end of the phase at the present speed; nil where nobody knows",
    waiting_for: "what a queued job waits for, as a text",
    figures:
      "what else the step tells, by its own names: of a training `\"step\"`, `\"loss\"`, " <>
        "`\"tokens_per_second\"`, …",
    error: "the `VLLM.Error` of a job that failed; in a last message only"
  ]

  @moduledoc """
  How far a job is: what `VLLM.Job.subscribe/1` sends.

  #{VLLM.Fields.docs(@fields)}

  After one whose state is `:done`, `:failed`, `:cancelled` or `:interrupted` there comes no other.
  """

  alias VLLM.Error

  @enforce_keys [:job, :state]
  defstruct [
    :job,
    :state,
    :output,
    :output_number,
    :outputs,
    :phase,
    :done,
    :total,
    :bytes,
    :total_bytes,
    :seconds_left,
    :waiting_for,
    :error,
    figures: %{}
  ]

  @type t :: %__MODULE__{
          job: String.t(),
          state: atom(),
          output: String.t() | nil,
          output_number: pos_integer() | nil,
          outputs: non_neg_integer() | nil,
          phase: String.t() | nil,
          done: non_neg_integer() | nil,
          total: non_neg_integer() | nil,
          bytes: non_neg_integer() | nil,
          total_bytes: non_neg_integer() | nil,
          seconds_left: number() | nil,
          waiting_for: String.t() | nil,
          figures: %{String.t() => term()},
          error: Error.t() | nil
        }
end
