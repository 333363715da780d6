defmodule VLLM.Engine.Lifecycle do
  @moduledoc false
  # An engine from the outside: started, waited for, asked what it is, stopped.

  alias VLLM.Bridge.Deadline
  alias VLLM.Engine.{Config, Control, Progress, Table}
  alias VLLM.{Error, LLM, Options, Terminal}

  @doc "See `VLLM.llm/2`."
  @spec llm(String.t(), keyword() | map()) :: {:ok, LLM.t()} | {:error, Error.t()}
  def llm(model, options) do
    with {:ok, options} <- Options.to_map(options),
         {:ok, config} <- Config.new(Map.put(options, "model", model)) do
      name = Config.display_name(config)

      Terminal.line(config.options.progress, fn show ->
        start(config, fn progress ->
          show.(fn -> "#{name}: #{Progress.describe(progress)}" end)
        end)
      end)
    end
  end

  @doc """
  Starts an engine that belongs to the calling process, and waits until it is ready or
  nothing of it is left. `on_progress` is told of each step.
  """
  @spec start(Config.t(), (Progress.t() -> term())) :: {:ok, LLM.t()} | {:error, Error.t()}
  def start(config, on_progress) do
    with {:ok, pid} <- VLLM.Engine.start(%{config | owner: self()}) do
      llm = %LLM{id: config.name || pid, model: config.model, node: node()}

      case await(llm, :all, :infinity, on_progress) do
        :ok ->
          {:ok, llm}

        {:error, error} ->
          _ = stop(llm)
          {:error, error}
      end
    end
  end

  @doc "See `VLLM.child_spec/1`; `id` is that of an engine without a name."
  @spec child_spec(keyword() | map(), term()) ::
          {:ok, Supervisor.child_spec()} | {:error, Error.t()}
  def child_spec(options, id) do
    with {:ok, config} <- Config.new(options) do
      {:ok,
       %{
         id: config.name || id,
         start: {VLLM.Engine, :start_link, [config]},
         type: :supervisor,
         # An engine that `stop/1` has ended stays so.
         restart: :transient
       }}
    end
  end

  @doc "Waits for the engine; see `Control.await/4`."
  @spec await(VLLM.engine(), :any | :all, Deadline.t(), (map() -> term())) ::
          :ok | {:error, Error.t()}
  def await(engine, how_many, deadline, on_progress \\ fn _ -> :ok end) do
    with {:ok, table, _pid} <- Table.lookup(engine),
         do: Control.await(table, how_many, deadline, on_progress)
  end

  @doc "What `VLLM.EngineInfo` is made of, when the engine is ready."
  @spec info(VLLM.engine(), Deadline.t()) :: {:ok, map()} | {:error, Error.t()}
  def info(engine, deadline) do
    with :ok <- await(engine, :any, deadline),
         {:ok, table, _pid} <- Table.lookup(engine),
         do: {:ok, Table.info(table)}
  rescue
    # The table ended with its engine.
    ArgumentError -> {:error, Control.not_running()}
  end

  @doc "See `VLLM.stop/1`."
  @spec stop(VLLM.engine()) :: :ok | {:error, Error.t()}
  def stop(engine) do
    case Table.lookup(engine) do
      {:ok, _table, pid} -> Supervisor.stop(pid, :shutdown)
      # It has been stopped before, or has ended with its owner.
      {:error, %Error{reason: :not_running}} -> :ok
      {:error, error} -> {:error, error}
    end
  catch
    # It ended by itself meanwhile.
    :exit, _ -> :ok
  end
end
