defmodule VLLM.Engine do
  @moduledoc false
  # The supervisor of one engine: one model with its options, served by
  # `replicas` workers. Registered under the name that users give it, or its
  # pid.
  #
  # OTP's own supervisor rather than Elixir's, for `auto_shutdown`: the control
  # process ends with the engine's owner and takes everything with it.

  @behaviour :supervisor

  alias VLLM.Engine.{Config, Control, Table, Worker}
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

    Table.put_about(table, %{
      engine: config.name,
      model: config.model,
      payloads: config.options.telemetry_payloads
    })

    case Registry.register(VLLM.Registry, config.name || self(), table) do
      {:ok, _} ->
        workers =
          for index <- 1..config.options.replicas, do: Worker.child_spec({config, table, index})

        control = Control.child_spec({config, table})
        {:ok, {%{strategy: :one_for_one, auto_shutdown: :any_significant}, [control | workers]}}

      {:error, {:already_registered, _pid}} ->
        :ignore
    end
  end

  @doc "What logs call the engine."
  @spec display_name(Config.t()) :: String.t()
  def display_name(%Config{name: nil, model: model}), do: Path.basename(model)
  def display_name(%Config{name: name}), do: inspect(name)
end
