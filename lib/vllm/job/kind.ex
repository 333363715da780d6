defmodule VLLM.Job.Kind do
  @moduledoc false
  # A kind of job: which steps it takes. Its functions are pure but for what they
  # read of the disk, and quick: VLLM.Job.Runner calls them between two steps.

  alias VLLM.Error
  alias VLLM.Job.{Output, Record, Step}

  @doc """
  What comes next: a step, or the end, which is an error where there is not all that was asked for.
  What was found out before is in the record.
  """
  @callback next(Record.t()) :: Step.t() | :done | {:error, Error.t()}

  @doc "The record after a step with this result. An error ends the job."
  @callback done(Record.t(), Step.t(), result :: term()) ::
              {:ok, Record.t()} | {:error, Error.t()}

  @doc "The record after a step that failed, where the job goes on without it; or how it ends."
  @callback failed(Record.t(), Step.t(), Error.t()) :: {:ok, Record.t()} | {:error, Error.t()}

  @doc "The record of a job that has ended before, to be begun again: it keeps what is finished."
  @callback again(Record.t()) :: Record.t()

  @doc "The name under which an output is registered."
  @callback name(Record.t(), Output.t()) :: String.t()
end
