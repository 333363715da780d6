defmodule VLLM.Engine.Rank do
  @moduledoc false
  # What one other node has of a run of an engine over several nodes: a program of its own, under a
  # guard of that node, which computes what it is told and knows no requests.
  #
  # A *keeper* on the engine's node, which belongs to the worker, has a *holder* on the other node, and that
  # a VLLM.Bridge.Session with the program. Worker, keeper and holder are linked and the session
  # watches its holder: so each ends with the one before it, with the node of that and with the link
  # to it, and the program with its session. What becomes of the program the holder tells the keeper
  # and the keeper the worker, as `{:rank, keeper, told}`. Only the keeper waits for the distribution.

  require Logger

  alias VLLM.Bridge.{Log, Nursery, Session}
  alias VLLM.{Error, Started}

  # How often a node is looked for that cannot be reached, in ms.
  @look_again 1_000

  # How long the program of a node may take to be gone, in ms. A node that hangs does not say.
  @patience 15_000

  @typedoc "What a holder starts: `name` is what logs call it. All of it may be secret."
  @type program :: %{
          name: String.t(),
          python: Path.t() | nil,
          env: map(),
          nursery: boolean()
        }

  @typedoc """
  What a worker is told of a rank: that its node, or this library on it, is not there (once, it is looked for again); what its program
  says of itself, with the address of this machine on the network that leads there; of which checkpoint it is;
  why it has ended.
  """
  @type told ::
          :away
          | {:greeted, map(), :inet.ip_address()}
          | {:checkpoint, String.t()}
          | {:ended, Error.t()}

  @doc "Starts one for the calling process, a worker: its keeper."
  @spec start(node(), program()) :: pid()
  def start(node, program) do
    worker = self()

    spawn_link(fn ->
      Process.flag(:trap_exit, true)
      rank = %{node: node, worker: worker, program: program, told_away: false}
      find(Map.merge(rank, %{holder: nil, session: nil}))
    end)
  end

  @doc "Has its program compute, with the params of `rank` (guides/protocol.md)."
  @spec run(pid(), map()) :: :ok
  def run(keeper, params) do
    send(keeper, {:run, params})
    :ok
  end

  @doc "Has it end."
  @spec stop(pid()) :: :ok
  def stop(keeper) do
    send(keeper, :stop)
    :ok
  end

  @doc "Returns when nothing is left of it, or its node cannot be asked."
  @spec await_end(pid()) :: :ok
  def await_end(keeper) do
    monitor = Process.monitor(keeper)

    receive do
      {:DOWN, ^monitor, :process, _, _} -> :ok
    end
  end

  ## The keeper

  defp find(rank) do
    # The program is no argument: what a node without this library prints of the call that it cannot
    # make has no environment in it.
    request = :erlang.spawn_request(rank.node, __MODULE__, :hold, [self(), version()], [:link])

    receive do
      {:spawn_reply, ^request, :ok, holder} ->
        send(holder, {self(), rank.program})
        keep(%{rank | holder: holder})

      {:spawn_reply, ^request, :error, _not_there} ->
        find_again(rank)

      # A holder that comes to be nevertheless ends by the link.
      :stop ->
        exit(:shutdown)

      {:EXIT, worker, _} when worker == rank.worker ->
        exit(:shutdown)
    end
  end

  defp find_again(rank) do
    unless rank.told_away, do: tell(rank, :away)
    if pause(rank), do: find(%{rank | told_away: true})
  end

  # False where it is to end meanwhile.
  defp pause(%{worker: worker}) do
    receive do
      :stop -> false
      {:EXIT, ^worker, _} -> false
    after
      @look_again -> true
    end
  end

  defp keep(%{worker: worker, holder: holder} = rank) do
    receive do
      {:run, params} ->
        send(holder, {self(), {:run, params}})
        keep(rank)

      {^holder, {:session, session}} ->
        keep(%{rank | session: session})

      {^holder, {:greeted, hello}} ->
        tell(rank, {:greeted, hello, address(rank.node)})
        keep(rank)

      {^holder, {:ended, error}} ->
        tell(rank, {:ended, there(error, rank.node)})
        finish(rank)

      {^holder, told} ->
        tell(rank, told)
        keep(rank)

      {:EXIT, ^holder, {:shutdown, :not_started}} ->
        find_again(rank)

      {:EXIT, ^holder, reason} ->
        tell(rank, {:ended, lost(rank.node, reason)})
        finish(rank)

      :stop ->
        finish(rank)

      {:EXIT, ^worker, _} ->
        finish(rank)
    end
  end

  defp tell(rank, told), do: send(rank.worker, {:rank, self(), told})

  # The session ends when nothing is left of the program.
  defp finish(rank) do
    Process.exit(rank.holder, :kill)

    if rank.session do
      monitor = Process.monitor(rank.session)

      receive do
        {:DOWN, ^monitor, :process, _, _} -> :ok
      after
        @patience -> :ok
      end
    end
  end

  # By the routes of this machine; nothing is sent.
  defp address(node) do
    {:ok, {:net_address, {ip, port}, _, _, _}} = :net_kernel.node_info(node, :address)
    family = if tuple_size(ip) == 4, do: :inet, else: :inet6
    {:ok, socket} = :gen_udp.open(0, [family])
    :ok = :gen_udp.connect(socket, ip, port)
    {:ok, {own, _port}} = :inet.sockname(socket)
    :gen_udp.close(socket)
    own
  end

  defp there(error, node) do
    %{
      error
      | message: "On the node #{node}: #{error.message}",
        details: Map.put(error.details, "node", Atom.to_string(node))
    }
  end

  defp lost(node, {:undef, _stacktrace}), do: incompatible(node, "lacks this library")

  defp lost(node, {:shutdown, {:version, theirs}}),
    do: incompatible(node, "has version #{theirs} of this library")

  defp lost(node, _reason) do
    Error.new(
      :node_down,
      "The node #{node}, which computes a part of the model, was lost: it ended, or the link was " <>
        "cut.",
      %{"node" => Atom.to_string(node)}
    )
  end

  defp incompatible(node, what) do
    Error.new(
      :node_incompatible,
      "The node #{node} #{what}; all nodes of an engine need that of this one, #{version()}.",
      %{"node" => Atom.to_string(node)}
    )
  end

  defp version, do: to_string(Application.spec(:ex_vllm, :vsn))

  ## The holder

  @doc "What a keeper of another node starts on this one."
  @spec hold(pid(), String.t()) :: no_return()
  def hold(keeper, version) do
    # What is logged is of this node.
    Process.group_leader(self(), Process.whereis(:init))
    # A node is reached before its applications are started.
    unless Started.wholly?(), do: exit({:shutdown, :not_started})
    if version != version(), do: exit({:shutdown, {:version, version()}})

    receive do
      {^keeper, program} ->
        {:error, error} = hold_program(keeper, program)
        send(keeper, {self(), {:ended, error}})
    end

    # Told before the link says it.
    exit(:normal)
  end

  defp hold_program(keeper, program) do
    mode = if program.nursery, do: &Nursery.mode(&1, program.env)
    options = [python: program.python, env: program.env, mode: mode, on_log: &log(program, &1)]

    with {:ok, session} <- Session.start(:engine, options),
         send(keeper, {self(), {:session, session.pid}}),
         # How long it may take, the worker knows.
         {:ok, session} <- Session.greet(session, :infinity) do
      send(keeper, {self(), {:greeted, session.hello}})

      receive do
        {^keeper, {:run, params}} ->
          ended = Session.follow(session, "rank", params, :infinity, :infinity, &pass(keeper, &1))
          Session.close(session)
          ended
      end
    end
  end

  defp pass(keeper, %{"checkpoint" => checkpoint}) when is_binary(checkpoint),
    do: send(keeper, {self(), {:checkpoint, checkpoint}})

  defp pass(_keeper, _phase), do: :ok

  defp log(program, lines) do
    for line <- lines, do: Logger.log(Log.level(line), fn -> "#{program.name}: #{line}" end)
  end
end
