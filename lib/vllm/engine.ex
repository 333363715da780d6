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
  #     └─ VLLM.Engine.Control
  #
  # OTP's own supervisor rather than Elixir's, for `auto_shutdown`: the control
  # process ends with the engine's owner and takes everything with it.

  @behaviour :supervisor

  alias VLLM.Engine.{Config, Control, Suspects, Table, Worker}
  alias VLLM.Error

  @doc "Starts an engine in the supervision tree of the caller."
  @spec start_link(Config.t()) :: Supervisor.on_start()
  def start_link(%Config{name: nil} = config), do: :supervisor.start_link(__MODULE__, config)

  def start_link(%Config{name: name} = config) do
    registered = if is_atom(name), do: {:local, name}, else: name
    :supervisor.start_link(registered, __MODULE__, config)
  end

  @doc "Starts an engine under the library's own supervisor; it ends with `config.owner`."
  @spec start(Config.t()) :: {:ok, pid()} | {:error, Error.t()}
  def start(%Config{} = config) do
    spec = %{
      id: __MODULE__,
      start: {__MODULE__, :start_link, [config]},
      type: :supervisor,
      restart: :temporary
    }

    case DynamicSupervisor.start_child(VLLM.EngineSupervisor, spec) do
      {:ok, pid} ->
        {:ok, pid}

      {:error, {:already_started, _pid}} ->
        {:error,
         Error.new(
           :invalid_option,
           "An engine named #{inspect(config.name)} is running already; stop it first " <>
             "(`VLLM.stop/1`) or take another `name:`.",
           %{"option" => "name"}
         )}

      {:error, reason} ->
        {:error,
         Error.new(:internal, "The engine's processes could not be started.", %{
           "error" => inspect(reason)
         })}
    end
  end

  @impl true
  def init(%Config{} = config) do
    table = Table.new()
    note(table, config)
    Table.put_replicas(table, config.options.replicas)

    case Registry.register(VLLM.Registry, config.name || self(), table) do
      {:ok, _} ->
        workers = %{
          id: :workers,
          start: {__MODULE__, :start_workers, [table]},
          type: :supervisor
        }

        # The last to be started is the first to be stopped: it has the workers
        # finish what they have, all at once.
        children = [workers, Suspects.child_spec(table), Control.child_spec(table)]
        {:ok, {%{strategy: :one_for_one, auto_shutdown: :any_significant}, children}}

      {:error, {:already_registered, _pid}} ->
        :ignore
    end
  end

  @doc "Notes the config of the engine, and what events say of it."
  @spec note(Table.t(), Config.t()) :: true
  def note(table, config) do
    Table.put_config(table, config)

    Table.put_about(table, %{
      engine: config.name,
      model: config.model,
      payloads: config.options.telemetry_payloads
    })
  end

  @doc false
  def start_workers(table) do
    workers = for index <- 1..Table.replicas(table), do: Worker.child_spec({table, index})
    # What a program does, its worker survives: only a fault of our own ends one.
    options = [strategy: :one_for_one, max_restarts: 10, max_seconds: 10]

    with {:ok, pid} <- Supervisor.start_link(workers, options) do
      Table.put_workers_supervisor(table, pid)
      {:ok, pid}
    end
  end

  @doc "What logs call the engine."
  @spec display_name(Config.t()) :: String.t()
  def display_name(%Config{name: nil, model: model}), do: Path.basename(model)
  def display_name(%Config{name: name}), do: inspect(name)
end
