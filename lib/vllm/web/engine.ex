defmodule VLLM.Web.Engine do
  @moduledoc false
  # An engine as the admin API tells of it, read from its table: nobody is asked.

  alias VLLM.Bridge.Log
  alias VLLM.Engine.{Progress, Replicas, Table}
  alias VLLM.{Hub, OpenAI, Secrets}
  alias VLLM.OpenAI.Models
  alias VLLM.Web.{Answer, Figures, Live}

  @doc "What an engine is called in paths: it changes with its name, or where it has none with each start."
  @spec id(term()) :: String.t()
  def id(key) do
    digest = :crypto.hash(:sha256, :erlang.term_to_binary(key))
    digest |> Base.encode16(case: :lower) |> binary_part(0, 16)
  end

  @doc "The engine of an id: its name or pid, and its table."
  @spec find(String.t()) :: {:ok, {term(), Table.t()}} | :none
  def find(id) do
    case Enum.find(Table.engines(), fn {key, _table} -> id(key) == id end) do
      nil -> :none
      engine -> {:ok, engine}
    end
  end

  @doc "All engines of this node."
  @spec all(OpenAI.t(), Live.t()) :: [map()]
  def all(core, live) do
    Table.engines() |> Enum.sort() |> Enum.flat_map(&view(&1, core, live))
  end

  @doc "An engine, in a list; none where it has ended meanwhile."
  @spec view({term(), Table.t()}, OpenAI.t(), Live.t()) :: [map()]
  def view({key, table}, core, live) do
    config = Table.config(table)
    replicas = for replica <- listed(key), do: replica(replica, table)
    state = state(Table.stopping?(table), Enum.map(replicas, & &1.state))
    info = info(table)

    [
      %{
        id: id(key),
        name: name(key),
        model: config.model,
        state: state,
        ready: Table.workers(table) != [],
        progress: if(state == :loading, do: progress(table)),
        replicas: replicas,
        memory: live.memory[key] || [],
        quantization: info["quantization"],
        max_model_len: info["max_model_len"],
        deaths: Enum.map(Table.deaths(table), &death/1),
        served_name: core |> OpenAI.models() |> Models.names_of(table) |> List.first(),
        error: Enum.find_value(replicas, & &1.error),
        operation: operation(Table.operation(table))
      }
      # Nothing is known of one that is newer than the last look.
      |> Map.merge(live.figures[key] || Figures.new(%{}, nil, 0.0))
    ]
  rescue
    # The table ended with its engine.
    ArgumentError -> []
  end

  defp listed(key) do
    case Replicas.list(key) do
      {:ok, replicas} -> replicas
      {:error, _gone} -> []
    end
  end

  defp name(key) when is_pid(key), do: nil
  defp name({:via, Registry, {VLLM.Web.Names, name}}), do: name
  defp name(key), do: Secrets.inspect(key)

  # Before the first start is over.
  defp info(table) do
    Table.info(table)
  rescue
    ArgumentError -> %{}
  end

  defp state(true, _replicas), do: :stopping

  defp state(false, states) do
    cond do
      :ready in states -> :ready
      # Before the first of them has a process, too.
      states == [] or :starting in states -> :loading
      :dead in states -> :restarting
      :draining in states -> :draining
      :failed in states -> :failed
      true -> :drained
    end
  end

  defp replica(replica, table) do
    %{
      index: replica.index,
      state: replica.state,
      node: node(),
      devices: replica.devices,
      pid: pid(Table.run(table, replica.index)),
      restarts: Map.get(Table.counts(table, :restarts), {replica.index}, 0),
      in_flight: replica.in_flight,
      error: Answer.about(replica.error)
    }
  end

  # Of the guard, which is the parent of all the others.
  defp pid({%{os_pid: pid}, _conn}) when pid > 0, do: pid
  defp pid(_no_program), do: nil

  defp progress(table) do
    starting =
      for index <- 1..Table.replicas(table), Table.status(table, index) == :starting, do: index

    with progress when progress != nil <- Enum.find_value(starting, &Table.progress(table, &1)) do
      %{phase: progress.phase, percent: percent(progress), text: Progress.describe(progress)}
    end
  end

  defp percent(%{phase: :download, bytes: _} = progress),
    do: Hub.Progress.percent(struct(Hub.Progress, progress))

  defp percent(%{done: done, total: total}), do: div(100 * done, total)
  defp percent(_uncounted), do: nil

  defp death(%{time: time, replica: replica, error: error}) do
    %{
      time: time,
      replica: replica,
      reason: if(is_map_key(error.details, "hung"), do: :hung, else: error.reason),
      message: error.message,
      log: error.details["log"] || []
    }
  end

  defp operation(nil), do: nil
  defp operation(operation), do: %{operation | error: Answer.about(operation.error)}

  @doc """
  The last lines that the processes of an engine have printed, with the number of their replica where there are
  several; of one without processes those before its last death.
  """
  @spec log(Table.t(), pos_integer()) :: [String.t()]
  def log(table, count) do
    replicas = Table.replicas(table)

    runs =
      for index <- 1..replicas, {%{run_dir: folder}, _conn} <- [Table.run(table, index)] do
        {index, folder}
      end

    if runs == [], do: last_words(table), else: Enum.flat_map(runs, &lines(&1, replicas, count))
  rescue
    # The table ended with its engine.
    ArgumentError -> []
  end

  defp lines({_index, folder}, 1, count), do: Log.tail(folder, count)

  defp lines({index, folder}, _several, count),
    do: for(line <- Log.tail(folder, count), do: "#{index}: #{line}")

  defp last_words(table) do
    case List.last(Table.deaths(table)) do
      nil -> []
      death -> death.error.details["log"] || []
    end
  end
end
