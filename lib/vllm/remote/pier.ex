defmodule VLLM.Remote.Pier do
  @moduledoc false
  # Hands out on a caller's node what the VLLM.Remote.Ferry brings that started it there: one process
  # for each other node whose engines are read here. The two end together.

  alias VLLM.Bridge.{Deltas, Inbox}

  @doc "What a ferry starts on the node that it goes to."
  @spec serve() :: no_return()
  def serve do
    # What is logged on the way is of this node.
    Process.group_leader(self(), Process.whereis(:init))
    serve(%{streams: %{}, columns: %{}})
  end

  # Addresses by the numbers of streams, and by the columns of numbers that came last.
  defp serve(state) do
    receive do
      load -> load |> Enum.reduce(state, &hand_out/2) |> serve()
    end
  end

  defp hand_out({:columns, numbers, counts, token_ids, texts}, state) do
    {addresses, state} = find(numbers, state)
    :ok = Deltas.deal(addresses, counts, token_ids, texts)
    state
  end

  defp hand_out({:rows, rows}, state) do
    for [number | row] <- rows,
        address = state.streams[number],
        do: Inbox.send(address, {:delta, row})

    state
  end

  defp hand_out({:open, number, address}, state), do: put_in(state.streams[number], address)

  defp hand_out({:last, number, last}, state) do
    {address, streams} = Map.pop!(state.streams, number)
    Inbox.send(address, last)
    %{state | streams: streams}
  end

  defp hand_out({:close, number}, state),
    do: %{state | streams: Map.delete(state.streams, number)}

  defp hand_out({:empty, ferry}, state) do
    send(ferry, :emptied)
    state
  end

  defp find(numbers, %{columns: columns, streams: streams} = state) do
    case columns do
      %{^numbers => addresses} ->
        {addresses, state}

      _new ->
        addresses = for <<number::64-little <- numbers>>, do: streams[number]
        {addresses, %{state | columns: Deltas.note(columns, numbers, addresses)}}
    end
  end
end
