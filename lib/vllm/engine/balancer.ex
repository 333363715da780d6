defmodule VLLM.Engine.Balancer do
  @moduledoc false
  # Chooses the worker for a request. Requests that belong together (a session, or
  # prompts with the same beginning) go to the same worker, whose prefix cache then
  # has that beginning, unless it is busier than the others. All other requests go
  # to the least busy worker.
  #
  # By rendezvous hashing: each worker draws a number for the key and the
  # highest wins. So when a worker comes or goes, only what it wins moves.

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Call, Table}

  # How much of a prompt counts as its beginning: enough to tell prompts apart, and
  # less than the instructions they may share. In bytes of text, or as many token
  # ids; a block of vLLM's cache is 16 tokens.
  @prefix 128

  # The beginning of a conversation: its instructions and the first question.
  @messages 2

  @doc "The worker for a request with `params`, of at least one."
  @spec choose([Table.worker(), ...], map(), Call.t()) :: Table.worker()
  def choose([worker], _params, _call), do: worker

  def choose(workers, params, call) do
    loads = for worker <- workers, do: {Connection.in_flight(worker.conn), worker}

    case key(params, call) do
      nil -> least_busy(loads)
      key -> loads |> favourite(key) |> unless_busy(loads)
    end
  end

  defp least_busy(loads), do: loads |> Enum.min_by(&elem(&1, 0)) |> elem(1)

  defp favourite(loads, key) do
    Enum.max_by(loads, fn {_, worker} -> :erlang.phash2({key, worker.index}) end)
  end

  # At most a quarter more than the others have on average, and no queue.
  defp unless_busy({load, worker}, loads) do
    total = loads |> Enum.map(&elem(&1, 0)) |> Enum.sum()

    if load < worker.window and load <= 1.25 * total / length(loads) + 1,
      do: worker,
      else: least_busy(loads)
  end

  @doc "What requests that belong together have in common; nil for those that belong nowhere."
  @spec key(map(), Call.t()) :: non_neg_integer() | nil
  def key(params, %Call{session: nil}) do
    with beginning when beginning != nil <- beginning(params), do: :erlang.phash2(beginning)
  end

  def key(_params, %Call{session: session}), do: :erlang.phash2({:session, session})

  defp beginning(%{"prompt" => prompt}), do: cut(prompt)
  defp beginning(%{"messages" => messages}), do: messages |> Enum.take(@messages) |> cut()
  defp beginning(%{"data_1" => [text | _]}), do: cut(text)
  defp beginning(_params), do: nil

  # The term, with every binary and list in it cut short.
  defp cut(binary) when is_binary(binary),
    do: binary_part(binary, 0, min(byte_size(binary), @prefix))

  defp cut(list) when is_list(list), do: list |> Enum.take(@prefix) |> Enum.map(&cut/1)
  defp cut(struct) when is_struct(struct), do: struct |> Map.from_struct() |> cut()
  defp cut(map) when is_map(map), do: Map.new(map, fn {k, v} -> {k, cut(v)} end)
  defp cut(tuple) when is_tuple(tuple), do: tuple |> Tuple.to_list() |> cut()
  defp cut(other), do: other
end
