defmodule VLLM.Cluster.Members do
  @moduledoc false
  # Which engines of a name there are on the connected nodes, as one node knows it: a table that
  # callers read, so that nobody is asked. Its owner hears of the engines (see VLLM.Cluster.Beacon),
  # has those wait who find none that is ready, and connects nodes.
  #
  # How busy another node's engine is, is what it last said plus what this node has given it since: a
  # burst of calls does not wait for the next report to be spread.

  use GenServer

  alias VLLM.Bridge.Deadline
  alias VLLM.Cluster.Beacon
  alias VLLM.Engine.{Balancer, Call, Control, Table}
  alias VLLM.Error
  alias VLLM.Remote.Courier

  require Logger

  @enforce_keys [:name, :pid, :table]
  defstruct @enforce_keys

  @type t :: %__MODULE__{name: atom(), pid: pid(), table: :ets.table()}

  @typedoc "How a member stands; `:silent` is one that has said nothing for too long."
  @type standing :: :ok | :wait | :silent | {:error, Error.t()}

  # Each as {node, standing, load, window, limit, calls, beacon}. The load is without what this node
  # has given it, which is in the table `calls`: {courier, whether it may be given to another one}.
  @standing 2
  @load 3

  # After how many reports of others a node that is lost is connected to again.
  @connect_every 4

  @doc "The members of the cluster of that name on this node; nil where it has none."
  @spec find(atom()) :: t() | nil
  def find(name) do
    with true <- VLLM.Started.yet?(),
         [{pid, {:members, table}}] <- Registry.lookup(VLLM.Registry, {:cluster, name}) do
      %__MODULE__{name: name, pid: pid, table: table}
    else
      _none -> nil
    end
  end

  @doc "Those that take requests, and how busy each is. That of this node is as it is this moment."
  @spec serving(t()) :: [Balancer.candidate()]
  def serving(%{table: table} = members) do
    others =
      for {node, :ok, load, window, limit, calls, _beacon} <- list(table), node != node() do
        {load + given(calls), %{index: node, window: window, limit: limit, calls: calls}}
      end

    case here(members) do
      nil -> others
      one -> [one | others]
    end
  end

  defp here(%{name: name} = members) do
    with {:ok, table, _pid} <- Table.lookup(name),
         %{standing: :ok, window: window} = report when window > 0 <- Beacon.report(table) do
      one = %{index: node(), window: window, limit: report.limit, table: table}
      {report.in_flight, one}
    else
      _takes_none ->
        # That it is ready nobody is to be told until it says so again.
        not_ready(members, node())
        nil
    end
  end

  @doc "All that are known, by their nodes."
  @spec standings(t()) :: %{node() => standing()}
  def standings(%{table: table}),
    do: for(member <- list(table), into: %{}, do: {elem(member, 0), elem(member, @standing - 1)})

  # It ends with its owner.
  defp list(table) do
    :ets.tab2list(table)
  rescue
    ArgumentError -> []
  end

  defp given(calls) do
    case :ets.info(calls, :size) do
      :undefined -> 0
      size -> size
    end
  end

  @doc "Waits until one of them is ready. Ends with the error of all that there are, or at the deadline."
  @spec await(t(), Call.t()) :: :ok | {:error, Error.t()}
  def await(%{name: name, pid: pid} = members, %Call{queue_deadline: queue} = call) do
    deadline = min(queue, call.deadline)

    try do
      GenServer.call(pid, {:await, deadline}, Deadline.remaining(deadline))
    catch
      :exit, {:timeout, _} when queue < call.deadline -> {:error, Call.queue_timeout(call)}
      :exit, {:timeout, _} -> {:error, late(name, standings(members))}
      :exit, _ended -> {:error, Control.not_running()}
    end
  end

  defp late(name, standings) when standings == %{} do
    Error.new(
      :timeout,
      "The deadline passed, and no engine #{inspect(name)} was found on this node or a connected one. " <>
        "See whether `Node.list()` has the nodes that are to have one (`nodes:` of `VLLM.Cluster` connects " <>
        "them), and whether one is started there under that name.",
      %{"option" => "timeout"}
    )
  end

  defp late(name, standings) do
    nodes = standings |> Map.keys() |> Enum.map_join(", ", &inspect/1)

    Error.new(
      :timeout,
      "The deadline passed, and none of the engines #{inspect(name)} was ready (on #{nodes}). Wait for one " <>
        "with `VLLM.await_ready/2`, or give the call more `timeout:`.",
      %{"option" => "timeout"}
    )
  end

  ## What callers find out

  @doc "Notes that `courier` has a request for a member; whether it may be given to another one then."
  @spec give(t(), map(), pid(), boolean()) :: :ok
  def give(members, %{calls: calls}, courier, again?) do
    :ets.insert(calls, {courier, again?})
    send(members.pid, {:given, calls, courier})
    :ok
  rescue
    # The member is gone, and the courier will hear of it.
    ArgumentError -> :ok
  end

  @doc "Notes that some of the request's answer has come: it is not given to another one any more."
  @spec keep(map(), pid()) :: :ok
  def keep(%{calls: calls}, courier) do
    _there? = :ets.update_element(calls, courier, {2, false})
    :ok
  rescue
    ArgumentError -> :ok
  end

  @doc "Notes that a member has refused a request, until it says how it is: it is full, or not ready."
  @spec refused(t(), map(), :full | :not_ready) :: :ok
  def refused(members, member, :not_ready), do: not_ready(members, member.index)

  def refused(members, member, :full) do
    _there? = :ets.update_element(members.table, member.index, {@load, member.limit})
    :ok
  rescue
    ArgumentError -> :ok
  end

  # One of which more is known, such as that it is silent, stays what it is.
  defp not_ready(%{table: table}, node) do
    rest = [:"$1", :"$2", :"$3", :"$4", :"$5"]
    ready = List.to_tuple([node, :ok | rest])
    waiting = List.to_tuple([node, :wait | rest])
    _count = :ets.select_replace(table, [{ready, [], [{waiting}]}])
    :ok
  rescue
    ArgumentError -> :ok
  end

  ## The owner of the table

  @spec start_link(%{name: atom(), nodes: [node()], silent_after: timeout()}) ::
          GenServer.on_start()
  def start_link(options), do: GenServer.start_link(__MODULE__, options)

  @impl true
  def init(%{name: name} = options) do
    table = :ets.new(__MODULE__, [:public, read_concurrency: true])

    case Registry.register(VLLM.Registry, {:cluster, name}, {:members, table}) do
      {:ok, _} ->
        state = %{
          name: name,
          table: table,
          nodes: options.nodes,
          patience: patience(options.silent_after),
          # Of each beacon, how many of our own ticks have passed since it was heard: where this node
          # hangs, nobody is silent.
          unheard: %{},
          ticks: 0,
          waiting: [],
          # The nodes that are being connected to, by the processes that do it.
          connecting: %{}
        }

        {:ok, tick(state)}

      {:error, {:already_registered, pid}} ->
        {:stop, {:already_started, pid}}
    end
  end

  defp patience(:infinity), do: :infinity
  defp patience(silent_after), do: max(2, div(silent_after, Beacon.interval()))

  @impl true
  def handle_call({:await, deadline}, {pid, _} = from, state),
    do: {:noreply, answer(%{state | waiting: [{from, pid, deadline} | state.waiting]})}

  @impl true
  def handle_info({:report, beacon, report}, state) do
    hear(state.table, node(beacon), beacon, report, state.name)

    unless is_map_key(state.unheard, beacon),
      do: :erlang.monitor(:process, beacon, tag: :left)

    {:noreply, answer(put_in(state.unheard[beacon], 0))}
  end

  # The engine was stopped, or its node is lost.
  def handle_info({:left, _monitor, :process, beacon, _reason}, state) do
    remove(state.table, beacon)
    {:noreply, answer(update_in(state.unheard, &Map.delete(&1, beacon)))}
  end

  def handle_info({:given, calls, courier}, state) do
    :erlang.monitor(:process, courier, tag: {:ended, calls})
    {:noreply, state}
  end

  def handle_info({{:ended, calls}, _monitor, :process, courier, _reason}, state) do
    if :ets.info(calls, :size) != :undefined, do: :ets.delete(calls, courier)
    {:noreply, state}
  end

  def handle_info(:tick, state),
    do: {:noreply, state |> listen_for_silence() |> connect() |> tick()}

  def handle_info({:connected, _monitor, :process, pid, _reason}, state),
    do: {:noreply, update_in(state.connecting, &Map.delete(&1, pid))}

  def handle_info(_message, state), do: {:noreply, state}

  defp tick(state) do
    Beacon.listen(state.name)
    Process.send_after(self(), :tick, Beacon.interval())

    waiting =
      Enum.filter(state.waiting, fn {_from, pid, deadline} ->
        Process.alive?(pid) and not Deadline.passed?(deadline)
      end)

    %{state | ticks: state.ticks + 1, waiting: waiting}
  end

  defp hear(table, node, beacon, report, name) do
    calls =
      case :ets.lookup(table, node) do
        [{_, :silent, _, _, _, calls, _}] ->
          Logger.info("#{inspect(name)}: the node #{node} is heard again.")
          calls

        [{_, _, _, _, _, calls, _}] ->
          calls

        [] ->
          :ets.new(:calls, [:public, write_concurrency: true])
      end

    %{standing: standing, in_flight: in_flight, window: window, limit: limit} = report
    load = max(in_flight - given(calls), 0)
    :ets.insert(table, {node, standing, load, window, limit, calls, beacon})
  end

  # Not where the engine was started anew meanwhile.
  defp remove(table, beacon) do
    with [{_, _, _, _, _, calls, ^beacon} = member] <- :ets.lookup(table, node(beacon)) do
      :ets.delete_object(table, member)
      :ets.delete(calls)
    end
  end

  defp listen_for_silence(state) do
    unheard = Map.new(state.unheard, fn {beacon, ticks} -> {beacon, ticks + 1} end)
    for {beacon, ticks} <- unheard, ticks == state.patience, do: silent(state, beacon)
    %{state | unheard: unheard}
  end

  # Its node hangs, or the link: no request goes there, and those end that may be given to others.
  defp silent(state, beacon) do
    with [{node, _, _, _, _, calls, ^beacon}] <- :ets.lookup(state.table, node(beacon)) do
      Logger.warning(
        "#{inspect(state.name)}: the node #{node} has said nothing for " <>
          "#{state.patience * Beacon.interval()} ms and gets no requests until it does."
      )

      :ets.update_element(state.table, node, {@standing, :silent})
      for [courier] <- :ets.match(calls, {:"$1", true}), do: Courier.give_up(courier)
    end
  end

  # Each by a process, since a node that hangs takes seconds to be given up.
  defp connect(%{ticks: ticks} = state) when rem(ticks, @connect_every) != 0, do: state

  defp connect(state) do
    lost = (state.nodes -- [node() | Node.list()]) -- Map.values(state.connecting)

    connecting =
      for node <- lost, into: state.connecting do
        {pid, _monitor} =
          :erlang.spawn_opt(fn -> Node.connect(node) end, monitor: [tag: :connected])

        {pid, node}
      end

    %{state | connecting: connecting}
  end

  defp answer(%{waiting: []} = state), do: state

  defp answer(state) do
    case verdict(for member <- list(state.table), do: elem(member, @standing - 1)) do
      :wait ->
        state

      result ->
        for {from, _pid, _deadline} <- state.waiting, do: GenServer.reply(from, result)
        %{state | waiting: []}
    end
  end

  defp verdict(standings) do
    errors = for {:error, error} <- standings, do: error

    cond do
      :ok in standings -> :ok
      errors != [] and length(errors) == length(standings) -> {:error, hd(errors)}
      true -> :wait
    end
  end
end
