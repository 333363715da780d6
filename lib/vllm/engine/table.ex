defmodule VLLM.Engine.Table do
  @moduledoc false
  # What callers and workers of one engine know of each other: an ETS table
  # that belongs to the engine's supervisor, so that it outlives any worker.
  # Callers read it; nobody is asked.

  alias VLLM.Bridge.Connection
  alias VLLM.Error

  @type t :: :ets.table()
  @type status :: :starting | :ready | {:failed, Error.t()}

  @typedoc "A ready worker; `window` requests run at once, `limit` may be under way."
  @type worker :: %{
          index: pos_integer(),
          conn: Connection.t(),
          window: pos_integer(),
          limit: pos_integer()
        }

  @spec new() :: t()
  # Ordered, so that the workers are found without a look at all the rest.
  def new, do: :ets.new(__MODULE__, [:ordered_set, :public, read_concurrency: true])

  @doc "The engine's table and supervisor, by the name, pid or handle that a user has."
  @spec lookup(term()) :: {:ok, t(), pid()} | {:error, Error.t()}
  def lookup(%VLLM.LLM{id: id}), do: lookup(id)

  def lookup(id) do
    case Registry.lookup(VLLM.Registry, id) do
      [{pid, table}] ->
        {:ok, table, pid}

      [] ->
        {:error,
         Error.new(
           :not_running,
           "There is no engine #{inspect(id)}. It was stopped, or its owner ended, or it was " <>
             "never started; see `VLLM.llm!/2` and `{VLLM, name: …, model: …}`."
         )}
    end
  end

  @spec put_control(t(), pid()) :: true
  def put_control(table, pid), do: :ets.insert(table, {:control, pid})

  @spec control(t()) :: {:ok, pid()} | :error
  def control(table) do
    case :ets.lookup(table, :control) do
      [{:control, pid}] -> {:ok, pid}
      [] -> :error
    end
  end

  @doc "Notes what events say of the engine."
  @spec put_about(t(), VLLM.Telemetry.about()) :: true
  def put_about(table, about), do: :ets.insert(table, {:about, about})

  @spec about(t()) :: VLLM.Telemetry.about()
  def about(table), do: :ets.lookup_element(table, :about, 2)

  @doc "Makes a worker known to callers."
  @spec put_worker(t(), pos_integer(), worker()) :: true
  def put_worker(table, index, worker), do: :ets.insert(table, {{:worker, index}, worker})

  @spec delete_worker(t(), pos_integer()) :: true
  def delete_worker(table, index), do: :ets.delete(table, {:worker, index})

  @doc "The workers that take requests now."
  @spec workers(t()) :: [worker()]
  def workers(table), do: :ets.select(table, [{{{:worker, :_}, :"$1"}, [], [:"$1"]}])

  @doc "Notes what the engine is, as its worker last said."
  @spec put_info(t(), map()) :: true
  def put_info(table, info), do: :ets.insert(table, {:info, info})

  @spec info(t()) :: map()
  def info(table), do: :ets.lookup_element(table, :info, 2)

  @doc "Notes a worker's state and tells whoever waits for the engine."
  @spec put_status(t(), pos_integer(), status()) :: :ok
  def put_status(table, index, status) do
    :ets.insert(table, {{:status, index}, status})
    tell(table, :status)
  end

  @spec statuses(t()) :: [status()]
  def statuses(table), do: :ets.select(table, [{{{:status, :_}, :"$1"}, [], [:"$1"]}])

  @doc "Tells whoever waits for the engine how far a worker has come."
  @spec put_progress(t(), pos_integer(), map()) :: :ok
  def put_progress(table, index, progress), do: tell(table, {:progress, index, progress})

  defp tell(table, message) do
    with {:ok, pid} <- control(table), do: send(pid, message)
    :ok
  end
end
