defmodule VLLM.Engine.Table do
  @moduledoc false
  # What callers and workers of one engine know of each other: an ETS table
  # that belongs to the engine's supervisor, so that it outlives any worker.
  # Callers read it; nobody is asked.

  alias VLLM.Bridge.{Connection, Program}
  alias VLLM.Engine.{Config, Ranks}
  alias VLLM.{Error, Secrets}

  @type t :: :ets.table()
  @type status ::
          :starting | :ready | :draining | :drained | :dead | {:failed, Error.t()}

  @typedoc """
  What a worker is noted under: the index of its replica, or, as long as another one serves there,
  `{:beside, index}`.
  """
  @type slot :: pos_integer() | {:beside, pos_integer()}

  # What is noted of each worker.
  @noted [:worker, :status, :config, :process, :run, :ranks, :child, :load_time, :progress]

  # How many deaths are noted.
  @deaths 10

  @typedoc "A ready worker; `window` requests run at once, `limit` may be under way."
  @type worker :: %{
          index: pos_integer(),
          conn: Connection.t(),
          window: pos_integer(),
          limit: pos_integer()
        }

  @typedoc "The death of a worker's program, with the last lines of its log."
  @type death :: %{time: DateTime.t(), replica: pos_integer(), error: Error.t()}

  @typedoc "What was asked of an engine; `error` is that of one that has failed."
  @type operation :: %{
          name: String.t(),
          state: :running | :done | :failed,
          error: Error.t() | nil
        }

  @spec new() :: t()
  def new do
    # Ordered, so that the workers are found without a look at all the rest.
    table = :ets.new(__MODULE__, [:ordered_set, :public, read_concurrency: true])
    # Apart, because every request writes to it.
    :ets.insert(table, {:counts, :ets.new(:counts, [:public, write_concurrency: true])})
    table
  end

  @doc "The engine's table and supervisor, by the name, pid or handle that a user has."
  @spec lookup(term()) :: {:ok, t(), pid()} | {:error, Error.t()}
  def lookup(engine) do
    with :ok <- VLLM.Started.check() do
      case locate(engine) do
        {node, id} when node == node() -> find(id)
        {node, id} -> {:error, elsewhere(id, node)}
      end
    end
  end

  @doc "The node that an engine is on or was on last, and what it is called there."
  @spec locate(term()) :: {node(), term()}
  def locate(%VLLM.LLM{id: id, node: node}) do
    # Before a node has a name, it has this one.
    if node in [node(), :nonode@nohost], do: locate(id), else: {node, id}
  end

  def locate({name, node}) when is_atom(name) and is_atom(node) and name != :global,
    do: {node, name}

  def locate(id), do: {where(id), id}

  # The node of an engine; this one where it is not known.
  defp where(pid) when is_pid(pid), do: node(pid)
  defp where({:global, name}), do: where(:global.whereis_name(name))

  defp where({:via, module, name}) do
    if Code.ensure_loaded?(module) and function_exported?(module, :whereis_name, 1),
      do: where(module.whereis_name(name)),
      else: node()
  end

  defp where(_name), do: node()

  defp elsewhere(id, node) do
    Error.new(
      :unsupported,
      "The engine #{Secrets.inspect(id)} runs on the node #{node}, and what it was asked it answers " <>
        "on its own node only. Ask it there.",
      %{"node" => Atom.to_string(node)}
    )
  end

  defp find(id) do
    case Registry.lookup(VLLM.Registry, id) do
      [{pid, table}] ->
        {:ok, table, pid}

      [] ->
        {:error,
         Error.new(
           :not_running,
           "There is no engine #{Secrets.inspect(id)}. It was stopped, or its owner ended, or it was " <>
             "never started; see `VLLM.llm!/2` and `{VLLM, name: …, model: …}`."
         )}
    end
  end

  @doc "The engines of this BEAM: their names (or supervisors) and tables. Any of them may end at any moment."
  @spec engines() :: [{term(), t()}]
  def engines do
    # Nurseries and streams are registered there, too, without a table.
    tables = [{{:"$1", :_, :"$2"}, [{:is_reference, :"$2"}], [{{:"$1", :"$2"}}]}]
    if VLLM.Started.yet?(), do: Registry.select(VLLM.Registry, tables), else: []
  end

  @doc "The models that the engines of this BEAM serve, as they were named."
  @spec models() :: [String.t()]
  def models do
    engines() |> Enum.flat_map(fn {_id, table} -> models(table) end) |> Enum.uniq()
  end

  defp models(table) do
    for config <- [config(table) | all(table, :config)], do: config.model
  rescue
    # The table ended with its engine.
    ArgumentError -> []
  end

  ## The engine

  @spec put_control(t(), pid()) :: true
  def put_control(table, pid), do: :ets.insert(table, {:control, pid})

  @spec control(t()) :: {:ok, pid()} | :error
  def control(table) do
    case :ets.lookup(table, :control) do
      [{:control, pid}] -> {:ok, pid}
      [] -> :error
    end
  end

  @doc "Notes the process whose end ends the engine: its owner, else the supervisor above it."
  @spec put_keeper(t(), pid()) :: true
  def put_keeper(table, pid), do: :ets.insert(table, {:keeper, pid})

  @spec keeper(t()) :: pid()
  def keeper(table), do: :ets.lookup_element(table, :keeper, 2)

  @doc "Notes that the engine is about to end and takes no request any more."
  @spec put_stopping(t()) :: true
  def put_stopping(table), do: :ets.insert(table, {:stopping, true})

  @spec stopping?(t()) :: boolean()
  def stopping?(table), do: :ets.member(table, :stopping)

  @doc "Notes the process that gives turns to lost requests."
  @spec put_turns(t(), pid()) :: true
  def put_turns(table, pid), do: :ets.insert(table, {:turns, pid})

  @spec turns(t()) :: pid()
  def turns(table), do: :ets.lookup_element(table, :turns, 2)

  @doc "What events say of the engine."
  @spec about(t()) :: VLLM.Telemetry.about()
  def about(table), do: :ets.lookup_element(table, :about, 2)

  @doc "Notes what the engine is, as its worker last said."
  @spec put_info(t(), map()) :: true
  def put_info(table, info), do: :ets.insert(table, {:info, info})

  @spec info(t()) :: map()
  def info(table), do: :ets.lookup_element(table, :info, 2)

  @doc "Notes the config that new replicas start with, and what events say of the engine."
  @spec put_config(t(), Config.t()) :: true
  def put_config(table, config) do
    payloads = config.options.telemetry_payloads
    about = %{engine: config.name, model: config.model, payloads: payloads}
    :ets.insert(table, [{:config, config}, {:about, about}])
  end

  @spec config(t()) :: Config.t()
  def config(table), do: :ets.lookup_element(table, :config, 2)

  @doc "Notes that vLLM's API app is asked with these settings: workers that start make it ready."
  @spec put_http(t(), map()) :: true
  def put_http(table, settings), do: :ets.insert(table, {{:http, settings}, true})

  @spec http(t()) :: [map()]
  def http(table), do: :ets.select(table, [{{{:http, :"$1"}, :_}, [], [:"$1"]}])

  @doc "Notes how many replicas there are to be."
  @spec put_replicas(t(), pos_integer()) :: true
  def put_replicas(table, count), do: :ets.insert(table, {:replicas, count})

  @spec replicas(t()) :: pos_integer()
  def replicas(table), do: :ets.lookup_element(table, :replicas, 2)

  @doc "Notes the supervisor of the workers."
  @spec put_workers_supervisor(t(), pid()) :: true
  def put_workers_supervisor(table, pid), do: :ets.insert(table, {:workers_supervisor, pid})

  @spec workers_supervisor(t()) :: pid()
  def workers_supervisor(table), do: :ets.lookup_element(table, :workers_supervisor, 2)

  @doc "Counts one more of what `VLLM.Metrics` tells by that name and those labels' values."
  @spec count(t(), atom(), tuple()) :: :ok
  def count(table, name, values) do
    _ = :ets.update_counter(counts(table), {name, values}, 1, {nil, 0})
    :ok
  rescue
    # The table ended with its engine.
    ArgumentError -> :ok
  end

  @doc "What was counted by that name, for each of the labels' values."
  @spec counts(t(), atom()) :: %{tuple() => pos_integer()}
  def counts(table, name) do
    Map.new(:ets.select(counts(table), [{{{name, :"$1"}, :"$2"}, [], [{{:"$1", :"$2"}}]}]))
  end

  defp counts(table), do: :ets.lookup_element(table, :counts, 2)

  @doc "Notes the death of a worker; the last few are kept."
  @spec put_death(t(), death()) :: :ok
  def put_death(table, death) do
    :ets.insert(table, {{:death, System.unique_integer([:monotonic])}, death})
    numbers = :ets.select(table, [{{{:death, :"$1"}, :_}, [], [:"$1"]}])
    for number <- Enum.drop(numbers, -@deaths), do: :ets.delete(table, {:death, number})
    :ok
  end

  @doc "The last deaths of workers, oldest first."
  @spec deaths(t()) :: [death()]
  def deaths(table), do: all(table, :death)

  @doc "Notes what the engine was last asked to do over HTTP, and what came of it."
  @spec put_operation(t(), operation()) :: true
  def put_operation(table, operation), do: :ets.insert(table, {:operation, operation})

  @spec operation(t()) :: operation() | nil
  def operation(table), do: get(table, :operation)

  ## Each of its workers

  @doc "Makes a worker known to callers."
  @spec put_worker(t(), slot(), worker()) :: true
  def put_worker(table, slot, worker), do: :ets.insert(table, {{:worker, slot}, worker})

  @doc "What callers know of a worker; nil while it takes no requests."
  @spec worker(t(), slot()) :: worker() | nil
  def worker(table, slot), do: get(table, {:worker, slot})

  @spec delete_worker(t(), slot()) :: true
  def delete_worker(table, slot), do: :ets.delete(table, {:worker, slot})

  @doc "The workers that take requests now."
  @spec workers(t()) :: [worker()]
  def workers(table), do: all(table, :worker)

  @doc "Notes a worker's state and tells whoever waits for the engine."
  @spec put_status(t(), slot(), status()) :: :ok
  def put_status(table, slot, status) do
    :ets.insert(table, {{:status, slot}, status})
    tell(table, :status)
  end

  @spec status(t(), slot()) :: status() | nil
  def status(table, slot), do: get(table, {:status, slot})

  @spec statuses(t()) :: [status()]
  def statuses(table), do: all(table, :status)

  @doc "Notes the config that a worker serves with, for when its process has to begin anew."
  @spec put_config(t(), slot(), Config.t()) :: true
  def put_config(table, slot, config), do: :ets.insert(table, {{:config, slot}, config})

  @doc "The config of a worker; that of the engine where it has none of its own yet."
  @spec config(t(), slot()) :: Config.t()
  def config(table, slot), do: get(table, {:config, slot}) || config(table)

  @doc "Notes the process of a worker."
  @spec put_process(t(), slot(), pid()) :: true
  def put_process(table, slot, pid), do: :ets.insert(table, {{:process, slot}, pid})

  @spec process(t(), slot()) :: pid() | nil
  def process(table, slot), do: get(table, {:process, slot})

  @doc "The slots of all workers that have a process."
  @spec slots(t()) :: [slot()]
  def slots(table), do: :ets.select(table, [{{{:process, :"$1"}, :_}, [], [:"$1"]}])

  @doc "Notes the program that a worker runs, and its connection."
  @spec put_run(t(), slot(), Program.t(), Connection.t()) :: true
  def put_run(table, slot, program, conn),
    do: :ets.insert(table, {{:run, slot}, {program, conn}})

  @spec delete_run(t(), slot()) :: true
  def delete_run(table, slot), do: :ets.delete(table, {:run, slot})

  @spec run(t(), slot()) :: {Program.t(), Connection.t()} | nil
  def run(table, slot), do: get(table, {:run, slot})

  @doc "Notes what other nodes have of a worker's run."
  @spec put_ranks(t(), slot(), Ranks.t()) :: true
  def put_ranks(table, slot, ranks), do: :ets.insert(table, {{:ranks, slot}, ranks})

  @spec ranks(t(), slot()) :: Ranks.t() | nil
  def ranks(table, slot), do: get(table, {:ranks, slot})

  @doc "Notes how long the last load of a worker took, in native units."
  @spec put_load_time(t(), slot(), integer()) :: true
  def put_load_time(table, slot, duration), do: :ets.insert(table, {{:load_time, slot}, duration})

  @spec load_time(t(), slot()) :: integer() | nil
  def load_time(table, slot), do: get(table, {:load_time, slot})

  @doc "Forgets a worker that the engine has no more."
  @spec forget(t(), slot()) :: :ok
  def forget(table, slot) do
    :ets.delete(table, {:slot, child(table, slot)})
    for key <- @noted, do: :ets.delete(table, {key, slot})
    tell(table, :status)
  end

  @doc "The place of a worker's replica among those of the engine."
  @spec index(slot()) :: pos_integer()
  def index({:beside, index}), do: index
  def index(index), do: index

  @doc "Notes which child of the workers' supervisor has a slot; without a note, its id is the slot."
  @spec put_child(t(), slot(), reference()) :: true
  def put_child(table, slot, child),
    do: :ets.insert(table, [{{:child, slot}, child}, {{:slot, child}, slot}])

  @spec child(t(), slot()) :: slot() | reference()
  def child(table, slot), do: get(table, {:child, slot}) || slot

  @spec slot(t(), slot() | reference()) :: slot()
  def slot(table, child), do: get(table, {:slot, child}) || child

  @doc "Notes what is known of a worker under another slot, which is free."
  @spec move(t(), slot(), slot()) :: :ok
  def move(table, from, to) do
    :ets.insert(table, {{:slot, child(table, from)}, to})

    for key <- @noted, value = get(table, {key, from}), value != nil do
      :ets.insert(table, {{key, to}, value})
      :ets.delete(table, {key, from})
    end

    tell(table, :status)
  end

  @doc "Notes how far a worker has come with its start, and tells whoever waits for the engine."
  @spec put_progress(t(), slot(), map()) :: :ok
  def put_progress(table, slot, progress) do
    :ets.insert(table, {{:progress, slot}, progress})
    tell(table, {:progress, index(slot), progress})
  end

  @spec progress(t(), slot()) :: map() | nil
  def progress(table, slot), do: get(table, {:progress, slot})

  defp all(table, key), do: :ets.select(table, [{{{key, :_}, :"$1"}, [], [:"$1"]}])

  defp get(table, key) do
    case :ets.lookup(table, key) do
      [{_key, value}] -> value
      [] -> nil
    end
  end

  defp tell(table, message) do
    with {:ok, pid} <- control(table), do: send(pid, message)
    :ok
  end
end
