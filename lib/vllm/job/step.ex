defmodule VLLM.Job.Step do
  @moduledoc false
  # One step of a job, as its kind plans it and VLLM.Job.Runner takes it: a
  # question to a worker of its own, which ends with the step, or a function that
  # is done in a moment.

  alias VLLM.Error

  @enforce_keys [:name, :state]
  defstruct [
    :name,
    :state,
    :output,
    :output_state,
    :at,
    :method,
    :run,
    params: %{},
    before: nil,
    memory: 0,
    disk: 0
  ]

  @typedoc """
    * `:name` - what the kind knows it by
    * `:state` - of the job, meanwhile
    * `:output` - label of the output that it is for
    * `:output_state` - of that output, meanwhile
    * `:at` - the worker: `:tools`, or one of the kind `job` in the environment that `:quantize`s or
      that `:serve`s
    * `:method`, `:params` - what it is asked
    * `:run` - in place of these, a function that does the step
    * `:before` - is done before it, and may refuse it
    * `:memory`, `:disk` - bytes that must be there when it begins
  """
  @type t :: %__MODULE__{
          name: atom(),
          state: atom(),
          output: String.t() | nil,
          output_state: atom() | nil,
          at: :tools | :quantize | :serve | nil,
          method: String.t() | nil,
          params: map(),
          run: (() -> {:ok, term()} | {:error, Error.t()}) | nil,
          before: (() -> :ok | {:error, Error.t()}) | nil,
          memory: non_neg_integer(),
          disk: non_neg_integer()
        }
end
