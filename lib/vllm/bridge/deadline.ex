defmodule VLLM.Bridge.Deadline do
  @moduledoc false
  # Until when something may take. Absolute, so that whatever a call waits for
  # one after another draws on the same time.

  @typedoc "In milliseconds of `:erlang.monotonic_time/1`."
  @type t :: integer() | :infinity

  # What a receive takes.
  @longest 0xFFFF_FFFF

  @doc "The deadline that is `timeout` milliseconds away."
  @spec new(timeout()) :: t()
  def new(:infinity), do: :infinity
  def new(timeout), do: :erlang.monotonic_time(:millisecond) + timeout

  @doc "Milliseconds until the deadline and `grace` more, for a receive."
  @spec remaining(t(), non_neg_integer()) :: timeout()
  def remaining(deadline, grace \\ 0)
  def remaining(:infinity, _grace), do: :infinity

  def remaining(deadline, grace) do
    left = max(deadline - :erlang.monotonic_time(:millisecond), 0)
    min(left + grace, @longest)
  end

  @spec passed?(t()) :: boolean()
  def passed?(deadline), do: remaining(deadline) == 0
end
