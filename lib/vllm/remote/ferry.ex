defmodule VLLM.Remote.Ferry do
  @moduledoc false
  # Takes across what the engines of this node have for streams that are read on another one: what a
  # step of an engine adds to all of them is one message. There is one for each such node, with a
  # VLLM.Remote.Pier there, which it starts and which hands out. It may have to wait for the
  # distribution; then what comes meanwhile waits here, no more of it than the readers have granted.
  #
  # A VLLM.Remote.Proxy has it `take/1` its stream. From then on everything that comes for the stream
  # comes to the ferry (see `t:VLLM.Bridge.Connection.relay/0`), and so in its order: deltas go over;
  # the first one and the end are told to the proxy; and what that answers the caller comes by
  # here again, behind the deltas.
  #
  # It ends with the link to the other node, as do the proxies, each of which is linked to it.

  use GenServer, restart: :temporary

  alias VLLM.Bridge.{Connection, Deadline, Deltas, Inbox}
  alias VLLM.Engine.InFlight
  alias VLLM.Remote.Pier

  # For how many ms it waits at the end of the library for what proxies have still to say, and until
  # that is handed out.
  @patience 1_000

  # So many messages at most go in one.
  @most 32

  @doc "Has the ferry to the node of `address` take to it what comes for a stream of the calling proxy."
  @spec take(Inbox.address()) :: Connection.relay()
  def take({_inbox, ref} = address) do
    ferry = find(node(ref))

    case ask(ferry, {:take, address}) do
      {:ok, number} -> {:relay, ferry, number}
      # With a link that was lost before the one to the caller of this stream was made.
      :ended -> take(address)
    end
  end

  # For as long as the distribution holds the ferry: who calls then ends with the caller.
  defp ask(ferry, request) do
    {:ok, GenServer.call(ferry, request, :infinity)}
  catch
    :exit, _reason -> :ended
  end

  defp find(node) do
    name = {:via, Registry, {VLLM.Registry, {:ferry, node}}}

    with nil <- GenServer.whereis(name) do
      case DynamicSupervisor.start_child(VLLM.FerrySupervisor, {__MODULE__, {node, name}}) do
        {:ok, ferry} -> ferry
        {:error, {:already_started, ferry}} -> ferry
      end
    end
  end

  @doc "Takes the last message for the caller of a stream across, behind the deltas that have come for it."
  @spec answer(Connection.relay(), term()) :: :ok
  def answer({:relay, ferry, number}, answer) do
    send(ferry, {:answer, number, answer})
    :ok
  end

  def start_link({node, name}), do: GenServer.start_link(__MODULE__, node, name: name)

  @impl true
  def init(node) do
    Process.flag(:trap_exit, true)

    {:ok,
     %{
       pier: nil,
       # What goes next, the last first.
       load: [],
       # Of each stream by its number: where its proxy gets messages, what is asked of the engine, the
       # monitor of the worker, and whether a delta has come.
       streams: %{},
       # The numbers of proxies, and the last one that was given.
       numbers: %{},
       last: 0,
       # Columns whose streams have all begun.
       seen: %{}
     }, {:continue, node}}
  end

  # Until the pier is there, all else waits.
  @impl true
  def handle_continue(node, state) do
    ref = :erlang.spawn_request(node, Pier, :serve, [], [:link])

    receive do
      {:spawn_reply, ^ref, :ok, pier} -> {:noreply, %{state | pier: pier}}
      {:spawn_reply, ^ref, :error, reason} -> {:stop, {:shutdown, reason}, state}
    end
  end

  @impl true
  def handle_call({:take, address}, {proxy, _tag}, state) do
    Process.link(proxy)
    number = state.last + 1
    stream = %{address: nil, method: nil, monitor: nil, begun?: false}
    state = put_in(state.streams[number], stream)
    state = put_in(state.numbers[proxy], number)
    {:reply, number, load(%{state | last: number}, {:open, number, address})}
  end

  # What has come meanwhile goes along.
  @impl true
  def handle_info(:timeout, state), do: {:noreply, go(state)}

  def handle_info({:EXIT, pier, reason}, %{pier: pier} = state),
    do: {:stop, {:shutdown, reason}, state}

  def handle_info(message, state) do
    case hear(message, state) do
      %{load: []} = state -> {:noreply, state}
      # There is nothing yet to hand out.
      %{load: [{:open, _, _} | _]} = state -> {:noreply, state}
      %{load: load} = state when length(load) < @most -> {:noreply, state, 0}
      state -> {:noreply, go(state)}
    end
  end

  # The engines have ended before, and whoever was served by one is being told.
  @impl true
  def terminate(:shutdown, state) do
    until = Deadline.new(@patience)
    state |> finish(until) |> load({:empty, self()}) |> go()

    receive do
      :emptied -> :ok
    after
      Deadline.remaining(until) -> :ok
    end
  end

  def terminate(_reason, _state), do: :ok

  defp finish(%{streams: streams} = state, _until) when streams == %{}, do: state

  defp finish(%{pier: pier} = state, until) do
    receive do
      {:EXIT, ^pier, _reason} -> state
      message when elem(message, 0) != :"$gen_call" -> message |> hear(state) |> finish(until)
    after
      Deadline.remaining(until) -> state
    end
  end

  defp load(state, message), do: %{state | load: [message | state.load]}

  defp go(%{load: []} = state), do: state

  defp go(state) do
    send(state.pier, Enum.reverse(state.load))
    %{state | load: []}
  end

  defp hear({:columns, numbers, _, _, _} = columns, state) do
    state = load(state, columns)

    # From one step to the next they are mostly the same.
    if is_map_key(state.seen, numbers) do
      state
    else
      state =
        for <<number::64-little <- numbers>>, reduce: state do
          state -> begin(number, {:delta, "", <<>>}, state)
        end

      %{state | seen: Deltas.note(state.seen, numbers, true)}
    end
  end

  defp hear({:rows, rows}, state) do
    case Enum.flat_map_reduce(rows, state, &check/2) do
      {[], state} -> state
      {rows, state} -> load(state, {:rows, rows})
    end
  end

  defp hear({:last, number, last}, state), do: tell(number, last, state)

  defp hear({{:worker_down, number}, _monitor, :process, _worker, reason}, state),
    do: tell(number, {:down, reason}, state)

  # The stream's first run, or another one.
  defp hear({:relay, number, address, worker, method}, state) do
    case state.streams do
      %{^number => stream} ->
        unwatch(stream)
        monitor = :erlang.monitor(:process, worker, tag: {:worker_down, number})
        stream = %{stream | address: address, method: method, monitor: monitor}
        put_in(state.streams[number], stream)

      _left ->
        state
    end
  end

  defp hear({:answer, number, answer}, state),
    do: number |> forget(state) |> load({:last, number, answer})

  # A proxy has ended. One whose caller left has answered nothing.
  defp hear({:EXIT, proxy, _reason}, state) do
    {number, numbers} = Map.pop(state.numbers, proxy)
    state = %{state | numbers: numbers}

    if is_map_key(state.streams, number),
      do: number |> forget(state) |> load({:close, number}),
      else: state
  end

  # The proxy finds out what is wrong with a delta that is none.
  defp check([number | row], state) do
    delta = {:delta, row}

    case state.streams do
      %{^number => %{method: method}} ->
        if InFlight.delta?(method, delta),
          do: {[[number | row]], begin(number, delta, state)},
          else: {[], tell(number, delta, state)}

      _left ->
        {[], state}
    end
  end

  # From its first delta on a request is not run again, which the proxy has to know.
  defp begin(number, delta, state) do
    case state.streams do
      %{^number => %{begun?: false}} ->
        put_in(tell(number, delta, state).streams[number].begun?, true)

      _begun_or_left ->
        state
    end
  end

  defp tell(number, message, state) do
    with %{^number => stream} <- state.streams, do: Inbox.send(stream.address, message)
    state
  end

  defp forget(number, state) do
    with %{^number => stream} <- state.streams, do: unwatch(stream)
    %{state | streams: Map.delete(state.streams, number)}
  end

  defp unwatch(%{monitor: nil}), do: true
  defp unwatch(%{monitor: monitor}), do: Process.demonitor(monitor, [:flush])
end
