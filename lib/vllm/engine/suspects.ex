defmodule VLLM.Engine.Suspects do
  @moduledoc false
  # Gives turns to requests that were in flight when a worker died: any of them
  # may be what killed it, so they run again one at a time, and only one of them
  # can be there at the next death.
  #
  # A turn ends when it is given back, with the process that has it, or at the
  # deadline of its request. Other requests need none and do not come here.

  use GenServer

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.Table
  alias VLLM.Error

  defstruct [:ref]

  @typedoc "A turn that was asked for; `{ref, :granted}` comes when it begins."
  @type turn :: %__MODULE__{ref: reference()}

  @spec start_link(Table.t()) :: GenServer.on_start()
  def start_link(table), do: GenServer.start_link(__MODULE__, table)

  @doc """
  Asks for a turn until `deadline`. `{ref, :granted}` comes, or, should the
  engine end first, `{:DOWN, ref, :process, _, reason}`.
  """
  @spec ask(Table.t(), Connection.deadline()) :: turn()
  def ask(table, deadline) do
    suspects = Table.suspects(table)
    ref = :erlang.monitor(:process, suspects, alias: :demonitor)
    send(suspects, {:ask, ref, self(), deadline})
    %__MODULE__{ref: ref}
  rescue
    # The table ended with its engine, and with it the process whose end is told.
    ArgumentError -> %__MODULE__{ref: tell_of_the_end()}
  end

  defp tell_of_the_end do
    ref = make_ref()
    send(self(), {:DOWN, ref, :process, nil, :shutdown})
    ref
  end

  @doc "Waits for a turn until the deadline."
  @spec await(turn(), Connection.deadline()) :: :ok | {:error, Error.t()}
  def await(%__MODULE__{ref: ref}, deadline) do
    receive do
      {^ref, :granted} -> :ok
      {:DOWN, ^ref, :process, _pid, _reason} -> {:error, Connection.stopped()}
    after
      Connection.remaining(deadline) -> {:error, Connection.timeout()}
    end
  end

  @doc "Gives a turn back, or asks for it no more."
  @spec give_back(Table.t(), turn() | nil) :: :ok
  def give_back(_table, nil), do: :ok

  def give_back(table, %__MODULE__{ref: ref}) do
    Process.demonitor(ref, [:flush])
    send(Table.suspects(table), {:give_back, ref})
    flush(ref)
  rescue
    ArgumentError -> flush(ref)
  end

  defp flush(ref) do
    receive do
      {^ref, :granted} -> flush(ref)
      {:DOWN, ^ref, :process, _pid, _reason} -> flush(ref)
    after
      0 -> :ok
    end
  end

  @impl true
  def init(table) do
    Table.put_suspects(table, self())
    {:ok, %{waiting: :queue.new(), holder: nil}}
  end

  @impl true
  def handle_info({:ask, ref, pid, deadline}, state) do
    # It ends with the process, whether that has the turn or waits for it.
    monitor = :erlang.monitor(:process, pid, tag: {:gone, ref})
    waiting = :queue.in(%{ref: ref, monitor: monitor, deadline: deadline}, state.waiting)
    {:noreply, grant(%{state | waiting: waiting})}
  end

  def handle_info({:give_back, ref}, state), do: {:noreply, remove(state, ref)}
  def handle_info({{:gone, ref}, _, :process, _, _}, state), do: {:noreply, remove(state, ref)}
  def handle_info({:expired, ref}, state), do: {:noreply, remove(state, ref)}
  def handle_info(_message, state), do: {:noreply, state}

  defp remove(%{holder: %{ref: ref} = holder} = state, ref) do
    Process.demonitor(holder.monitor, [:flush])
    if holder.timer, do: Process.cancel_timer(holder.timer)
    grant(%{state | holder: nil})
  end

  defp remove(state, ref) do
    {gone, waiting} = state.waiting |> :queue.to_list() |> Enum.split_with(&(&1.ref == ref))
    for one <- gone, do: Process.demonitor(one.monitor, [:flush])
    %{state | waiting: :queue.from_list(waiting)}
  end

  defp grant(%{holder: nil} = state) do
    case :queue.out(state.waiting) do
      {{:value, next}, waiting} ->
        send(next.ref, {next.ref, :granted})
        %{state | waiting: waiting, holder: Map.put(next, :timer, expire_at(next))}

      {:empty, _} ->
        state
    end
  end

  defp grant(state), do: state

  # A reader may leave its stream lying about.
  defp expire_at(%{deadline: :infinity}), do: nil

  defp expire_at(%{deadline: deadline, ref: ref}),
    do: Process.send_after(self(), {:expired, ref}, deadline, abs: true)
end
