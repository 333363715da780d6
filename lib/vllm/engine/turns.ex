defmodule VLLM.Engine.Turns do
  @moduledoc false
  # Gives turns to requests that were in flight when a worker died: any of them
  # may be what killed it, so they run again one at a time, and only one of them
  # can be there at the next death.
  #
  # A turn ends when it is given back, when its process ends, or at the deadline of
  # its request. Requests that were not in flight at a death need no turn.

  use GenServer

  alias VLLM.Bridge.{Deadline, Inbox}
  alias VLLM.Engine.Table

  @typedoc "A turn that was asked for."
  @type turn :: Inbox.address()

  @spec start_link(Table.t()) :: GenServer.on_start()
  def start_link(table), do: GenServer.start_link(__MODULE__, table)

  @doc """
  Asks for a turn until `deadline`. When it begins `:granted` comes to `inbox`, or, should the
  engine end first, `{:down, reason}`.
  """
  @spec ask(Table.t(), Inbox.t(), Deadline.t()) :: turn()
  def ask(table, inbox, deadline) do
    turns = Table.turns(table)
    turn = Inbox.open(inbox, turns, :many)
    send(turns, {:ask, turn, self(), deadline})
    turn
  rescue
    # The table ended with its engine, and with it the process whose end would be told.
    ArgumentError ->
      turn = {inbox, make_ref()}
      send(self(), Tuple.append(turn, {:down, :noproc}))
      turn
  end

  @doc "Gives a turn back, or asks for it no more."
  @spec give_back(Table.t(), turn() | nil) :: :ok
  def give_back(_table, nil), do: :ok

  def give_back(table, turn) do
    Inbox.close(turn)
    send(Table.turns(table), {:give_back, turn})
    :ok
  rescue
    ArgumentError -> :ok
  end

  @impl true
  def init(table) do
    Table.put_turns(table, self())
    {:ok, %{waiting: :queue.new(), holder: nil}}
  end

  @impl true
  def handle_info({:ask, turn, pid, deadline}, state) do
    # Dropped when the process ends, whether it has the turn or waits for it.
    monitor = :erlang.monitor(:process, pid, tag: {:gone, turn})
    waiting = :queue.in(%{turn: turn, monitor: monitor, deadline: deadline}, state.waiting)
    {:noreply, grant(%{state | waiting: waiting})}
  end

  def handle_info({:give_back, turn}, state), do: {:noreply, remove(state, turn)}
  def handle_info({{:gone, turn}, _, :process, _, _}, state), do: {:noreply, remove(state, turn)}
  def handle_info({:expired, turn}, state), do: {:noreply, remove(state, turn)}
  def handle_info(_message, state), do: {:noreply, state}

  defp remove(%{holder: %{turn: turn} = holder} = state, turn) do
    Process.demonitor(holder.monitor, [:flush])
    if holder.timer, do: Process.cancel_timer(holder.timer)
    grant(%{state | holder: nil})
  end

  defp remove(state, turn) do
    {gone, waiting} = state.waiting |> :queue.to_list() |> Enum.split_with(&(&1.turn == turn))
    for one <- gone, do: Process.demonitor(one.monitor, [:flush])
    %{state | waiting: :queue.from_list(waiting)}
  end

  defp grant(%{holder: nil} = state) do
    case :queue.out(state.waiting) do
      {{:value, next}, waiting} ->
        Inbox.send(next.turn, :granted)
        %{state | waiting: waiting, holder: Map.put(next, :timer, expire_at(next))}

      {:empty, _} ->
        state
    end
  end

  defp grant(state), do: state

  # The reader of a stream may stop reading without closing it.
  defp expire_at(%{deadline: :infinity}), do: nil

  defp expire_at(%{deadline: deadline, turn: turn}),
    do: Process.send_after(self(), {:expired, turn}, deadline, abs: true)
end
