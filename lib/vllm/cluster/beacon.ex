defmodule VLLM.Cluster.Beacon do
  @moduledoc false
  # Tells the clusters that have the name of an engine, on all connected nodes, how it is: a few
  # times a second, from beside the engine. So its first word is that it has joined, its silence that
  # its node hangs, and the end of this process that it has left.
  #
  # Clusters find it, as it finds them, by a group of the library's own scope of `:pg`. Nodes that do
  # not understand each other are in groups of their own.

  use GenServer

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Control, Dispatch, Table}
  alias VLLM.Error
  alias VLLM.Remote.Protocol

  @scope __MODULE__

  # In ms.
  @interval 250

  @typedoc "What it tells: how the engine stands, and its requests: how many it has, computes at once, and takes."
  @type report :: %{
          standing: :ok | :wait | {:error, Error.t()},
          in_flight: non_neg_integer(),
          window: non_neg_integer(),
          limit: non_neg_integer()
        }

  @doc "The child spec of the scope, which each node with this library has."
  @spec scope() :: Supervisor.child_spec()
  def scope, do: %{id: @scope, start: {:pg, :start_link, [@scope]}}

  @doc "How many milliseconds pass from one report to the next."
  @spec interval() :: pos_integer()
  def interval, do: @interval

  @doc "Has `{:report, beacon, report}` come to the calling process from each engine of that name."
  @spec listen(atom()) :: :ok
  def listen(name) do
    # Again, should the scope have begun anew.
    if self() in :pg.get_local_members(@scope, group(name)),
      do: :ok,
      else: :pg.join(@scope, group(name), self())
  end

  defp group(name), do: {name, Protocol.number()}

  @doc "How an engine of this node is now."
  @spec report(Table.t()) :: report()
  def report(table) do
    case Dispatch.workers(table) do
      :stopped -> add_up(Control.not_running(), [])
      workers -> add_up(Control.standing(table), workers)
    end
  rescue
    # The table ended with its engine.
    ArgumentError -> add_up(Control.not_running(), [])
  end

  defp add_up(%Error{} = error, workers), do: add_up({:error, error}, workers)

  defp add_up(standing, workers) do
    sum = fn count -> workers |> Enum.map(count) |> Enum.sum() end

    %{
      standing: standing,
      in_flight: sum.(&Connection.in_flight(&1.conn)),
      window: sum.(& &1.window),
      limit: sum.(& &1.limit)
    }
  end

  @spec start_link({atom(), Table.t()}) :: GenServer.on_start()
  def start_link(engine), do: GenServer.start_link(__MODULE__, engine)

  @impl true
  def init(engine) do
    send(self(), :tell)
    {:ok, engine}
  end

  @impl true
  def handle_info(:tell, {name, table} = engine) do
    case :pg.get_members(@scope, group(name)) do
      [] -> :ok
      clusters -> tell(clusters, {:report, self(), report(table)})
    end

    Process.send_after(self(), :tell, @interval)
    {:noreply, engine}
  end

  def handle_info(_message, engine), do: {:noreply, engine}

  # A link that is full would hold back what the others are told.
  defp tell(clusters, report),
    do: Enum.each(clusters, &:erlang.send(&1, report, [:nosuspend, :noconnect]))
end
