defmodule VLLM.Engine do
  @moduledoc false
  # The supervisor of one engine: one model with its options, served by
  # `replicas` workers. Registered under the name that users give it, or its
  # pid.
  #
  #     VLLM.Engine
  #     ├─ workers (a supervisor)
  #     │  ├─ VLLM.Engine.Worker 1
  #     │  └─ VLLM.Engine.Worker 2 …
  #     ├─ VLLM.Engine.Turns
  #     ├─ VLLM.Cluster.Beacon (of one whose name is an atom)
  #     └─ VLLM.Engine.Control
  #
  # OTP's own supervisor rather than Elixir's, for `auto_shutdown`: the control
  # process ends with the engine's owner and takes everything with it.

  @behaviour :supervisor

  alias VLLM.Cluster.Beacon
  alias VLLM.Engine.{Config, Control, Table, Turns, Worker}
  alias VLLM.Error

  @doc """
  Starts an engine in the supervision tree of the caller. Where one of that name
  is about to end, it waits for that.
  """
  @spec start_link(Config.t()) :: Supervisor.on_start()
  def start_link(%Config{} = config) do
    with :ok <- VLLM.Started.check(),
         {:error, {:already_started, pid}} = taken <- start_now(config) do
      if ending?(pid) do
        await_end(pid)
        start_link(config)
      else
        taken
      end
    end
  end

  @doc """
  Starts an engine under the library's own supervisor; it ends with `config.owner`.
  Where one of that name is about to end, it waits for that.
  """
  @spec start(Config.t()) :: {:ok, pid()} | {:error, Error.t()}
  def start(%Config{} = config) do
    spec = %{
      id: __MODULE__,
      # The library's supervisor, which has other engines to start, waits for nobody.
      start: {__MODULE__, :start_now, [config]},
      type: :supervisor,
      restart: :temporary
    }

    with :ok <- VLLM.Started.check(),
         :ok <- check_registry(config.name) do
      start_child(config, spec)
    end
  end

  # What a registry makes of a name only it can tell.
  defp check_registry({:via, registry, name} = given) do
    _ = registry.whereis_name(name)
    :ok
  rescue
    error ->
      {:error,
       Error.new(
         :invalid_option,
         "The registry of `name: #{inspect(given)}` does not take that name: " <>
           "#{Exception.message(error)}.",
         %{"option" => "name"}
       )}
  end

  defp check_registry(_name), do: :ok

  defp start_child(config, spec) do
    case DynamicSupervisor.start_child(VLLM.EngineSupervisor, spec) do
      {:ok, pid} ->
        {:ok, pid}

      {:error, {:already_started, pid}} ->
        if ending?(pid) do
          await_end(pid)
          start(config)
        else
          {:error, name_taken(config.name, pid)}
        end

      {:error, reason} ->
        {:error,
         Error.new(:internal, "The engine's processes could not be started.", %{
           "error" => inspect(reason)
         })}
    end
  end

  @doc false
  def start_now(%Config{name: name} = config) do
    # The process whose end ends the engine.
    arg = {config, config.owner || self()}

    case name do
      nil -> :supervisor.start_link(__MODULE__, arg)
      name when is_atom(name) -> :supervisor.start_link({:local, name}, __MODULE__, arg)
      name -> :supervisor.start_link(name, __MODULE__, arg)
    end
  end

  # Whether the engine of that pid is being stopped, or will be because its keeper is gone.
  defp ending?(pid) when node(pid) != node(), do: false

  defp ending?(pid) do
    with [name] <- Registry.keys(VLLM.Registry, pid),
         {:ok, table, ^pid} <- Table.lookup(name) do
      Table.stopping?(table) or not Process.alive?(Table.keeper(table))
    else
      _no_engine -> not Process.alive?(pid)
    end
  rescue
    # The table ended with its engine.
    ArgumentError -> true
  end

  defp await_end(pid) do
    monitor = Process.monitor(pid)

    receive do
      {:DOWN, ^monitor, :process, _pid, _reason} -> :ok
    end
  end

  defp name_taken(name, pid) do
    message =
      if Registry.keys(VLLM.Registry, pid) == [name],
        do:
          "An engine named #{inspect(name)} is running already; stop it first (`VLLM.stop/1`) or",
        else: "The name #{inspect(name)} belongs to a process that is no engine;"

    Error.new(:invalid_option, message <> " take another `name:`.", %{"option" => "name"})
  end

  @impl true
  def init({%Config{} = config, keeper}) do
    table = Table.new()
    Table.put_config(table, config)
    Table.put_keeper(table, keeper)
    Table.put_replicas(table, config.options.replicas)

    case Registry.register(VLLM.Registry, config.name || self(), table) do
      {:ok, _} ->
        workers = %{
          id: :workers,
          start: {__MODULE__, :start_workers, [table]},
          type: :supervisor
        }

        # Control is started last and so stopped first: it lets all workers finish
        # their requests at the same time.
        children = [workers, Turns.child_spec(table)] ++ beacon(config.name, table)
        children = children ++ [Control.child_spec(table)]
        {:ok, {%{strategy: :one_for_one, auto_shutdown: :any_significant}, children}}

      {:error, {:already_registered, _pid}} ->
        :ignore
    end
  end

  # Clusters are of engines with names that are the same on all nodes.
  defp beacon(name, table) when is_atom(name) and name != nil,
    do: [Beacon.child_spec({name, table})]

  defp beacon(_name, _table), do: []

  @doc false
  def start_workers(table) do
    workers = for index <- 1..Table.replicas(table), do: Worker.child_spec({table, index})
    # Workers survive whatever their programs do, so only our own bugs restart one.
    options = [strategy: :one_for_one, max_restarts: 10, max_seconds: 10]

    with {:ok, pid} <- Supervisor.start_link(workers, options) do
      Table.put_workers_supervisor(table, pid)
      {:ok, pid}
    end
  end
end
