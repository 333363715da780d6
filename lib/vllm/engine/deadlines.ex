defmodule VLLM.Engine.Deadlines do
  @moduledoc false
  # The deadlines of requests that one process has under way, the earliest first. They come in that
  # order, as those of one call, or of calls of one timeout, do.

  alias VLLM.Bridge.Deadline

  @opaque t :: :queue.queue({Deadline.t(), key :: term()})

  @spec new() :: t()
  def new, do: :queue.new()

  @typedoc "Those that have not ended, by their keys."
  @type requests :: %{(key :: term()) => term()}

  @doc "Adds that of a new request; one that has none is not noted."
  @spec add(t(), Deadline.t(), key :: term(), requests()) :: t()
  def add(deadlines, :infinity, _key, _requests), do: deadlines

  def add(deadlines, deadline, key, requests) do
    {_at, _key, deadlines} = earliest(deadlines, requests)
    :queue.in({deadline, key}, deadlines)
  end

  @doc "The earliest, and whose it is; those of requests that have ended go."
  @spec earliest(t(), requests()) :: {Deadline.t(), key :: term(), t()}
  def earliest(deadlines, requests) do
    case :queue.peek(deadlines) do
      :empty -> {:infinity, nil, deadlines}
      {:value, {at, key}} when is_map_key(requests, key) -> {at, key, deadlines}
      {:value, _ended} -> deadlines |> :queue.drop() |> earliest(requests)
    end
  end
end
