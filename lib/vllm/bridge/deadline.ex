defmodule VLLM.Bridge.Deadline do
  @moduledoc false
  # Until when something may take. Absolute, so that whatever a call waits for
  # one after another draws on the same time.

  @typedoc "In milliseconds of `:erlang.monotonic_time/1`."
  @type t :: integer() | :infinity

  @doc "The deadline that is `timeout` milliseconds away."
  @spec new(timeout()) :: t()
  def new(:infinity), do: :infinity
  def new(timeout), do: :erlang.monotonic_time(:millisecond) + timeout

  @doc "Milliseconds until the deadline, for a receive."
  @spec remaining(t()) :: timeout()
  def remaining(:infinity), do: :infinity
  def remaining(deadline), do: max(deadline - :erlang.monotonic_time(:millisecond), 0)

  @spec passed?(t()) :: boolean()
  def passed?(deadline), do: remaining(deadline) == 0
end
