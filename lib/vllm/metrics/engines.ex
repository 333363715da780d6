defmodule VLLM.Metrics.Engines do
  @moduledoc false
  # The engines of this node as they are at one moment: read from their tables,
  # so that nobody is asked, and then vLLM's own metrics, for which every
  # replica is asked at once.

  alias VLLM.Bridge.{Connection, Deadline, Inbox}
  alias VLLM.Engine.Table
  alias VLLM.Secrets

  @typedoc "An engine: its key, its name and model as labels have them, what was counted, its replicas."
  @type engine :: %{
          key: term(),
          name: String.t(),
          model: String.t(),
          wanted: pos_integer(),
          counts: %{atom() => %{tuple() => pos_integer()}},
          replicas: [replica()]
        }

  @typedoc "A replica; `worker` is nil while it takes no requests, `answer` where it gave none."
  @type replica :: %{
          index: pos_integer(),
          model: String.t(),
          state: atom(),
          in_flight: non_neg_integer(),
          load_time: integer() | nil,
          worker: Table.worker() | nil,
          answer: [map()] | nil
        }

  @counted [:requests, :refused, :deaths, :restarts, :loads]

  @doc "All engines, with what their replicas answer until the deadline."
  @spec now(Deadline.t()) :: [engine()]
  def now(deadline) do
    engines = Table.engines() |> Enum.sort() |> Enum.flat_map(&read/1)
    answers = ask(engines, deadline)

    for engine <- engines do
      replicas =
        for one <- engine.replicas, do: %{one | answer: answers[{engine.name, one.index}]}

      %{engine | replicas: replicas}
    end
  end

  defp read({key, table}) do
    [
      %{
        key: key,
        # That of an engine without a name is its supervisor.
        name: Secrets.inspect(key),
        model: model(Table.config(table).model),
        wanted: Table.replicas(table),
        counts: Map.new(@counted, &{&1, Table.counts(table, &1)}),
        # One that is started beside another is told of once it has its place.
        replicas:
          for(index when is_integer(index) <- Table.slots(table), do: replica(table, index))
      }
    ]
  rescue
    # The table ended with its engine.
    ArgumentError -> []
  end

  defp replica(table, index) do
    state = state(Table.status(table, index))

    in_flight =
      with true <- state in [:ready, :draining],
           {_program, conn} <- Table.run(table, index) do
        Connection.in_flight(conn)
      else
        _no_requests -> 0
      end

    %{
      index: index,
      model: model(Table.config(table, index).model),
      state: state,
      in_flight: in_flight,
      load_time: Table.load_time(table, index),
      worker: Table.worker(table, index),
      answer: nil
    }
  end

  defp state({:failed, _error}), do: :failed
  # Between the start of its process and its first note.
  defp state(nil), do: :starting
  defp state(state), do: state

  # What each replica says that answers in time, by engine and index.
  defp ask(engines, deadline) do
    Inbox.run(fn inbox ->
      asked =
        for engine <- engines,
            %{worker: %{conn: conn}} = replica <- engine.replicas,
            {:ok, request} <- [Connection.request(conn, inbox, "metric_families", %{})],
            {_inbox, ref} = request.address,
            into: %{},
            do: {ref, {{engine.name, replica.index}, request}}

      collect(asked, inbox, deadline, %{})
    end)
  end

  defp collect(asked, _inbox, _deadline, answers) when asked == %{}, do: answers

  defp collect(asked, inbox, deadline, answers) do
    case Inbox.next(inbox, Deadline.remaining(deadline)) do
      :timeout ->
        for {_ref, {_key, request}} <- asked, do: Connection.cancel(request)
        answers

      {ref, last} ->
        {{key, request}, asked} = Map.pop!(asked, ref)

        case Connection.answer(request, last) do
          {:ok, families} -> collect(asked, inbox, deadline, Map.put(answers, key, families))
          {:error, _error} -> collect(asked, inbox, deadline, answers)
        end
    end
  end

  @doc "Every replica as one flat map, for a table; figures that it has not told in time are nil."
  @spec rows(timeout()) :: [%{atom() => term()}]
  def rows(timeout) do
    for engine <- timeout |> Deadline.new() |> now(), replica <- engine.replicas do
      kv_cache = figure(replica, "vllm:kv_cache_usage_perc")
      running = running(replica)

      %{
        engine: engine.name,
        replica: replica.index,
        model: replica.model,
        state: replica.state,
        running: running,
        waiting: replica.in_flight - running,
        kv_cache: kv_cache && Float.round(100.0 * kv_cache, 1),
        deaths: count(engine.counts.deaths, replica.index),
        restarts: count(engine.counts.restarts, replica.index),
        load_seconds: replica.load_time && seconds(replica.load_time)
      }
    end
  end

  defp figure(%{answer: nil}, _name), do: nil

  defp figure(%{answer: families}, name) do
    case for %{"name" => ^name} = family <- families,
             [_name, _labels, value] <- family["samples"],
             do: value do
      [] -> nil
      values -> Enum.sum(values) / length(values)
    end
  end

  defp count(counts, index),
    do: Enum.sum(for {values, count} <- counts, elem(values, 0) == index, do: count)

  defp seconds(time),
    do: Float.round(System.convert_time_unit(time, :native, :millisecond) / 1000, 1)

  @doc "How many of its requests a replica may compute at once; the others wait."
  @spec running(replica()) :: non_neg_integer()
  # One that drains gets no more, and all that it has may run.
  def running(%{worker: nil, in_flight: in_flight}), do: in_flight
  def running(%{worker: %{window: window}, in_flight: in_flight}), do: min(in_flight, window)

  @doc """
  A model as labels name it: one of the hub by its name, one at a path by the last part of that.

      iex> Enum.map(["org/llama:Q8_0", "/models/llama", "~/llama"], &VLLM.Metrics.Engines.model/1)
      ["org/llama:Q8_0", "llama", "llama"]
  """
  @spec model(String.t()) :: String.t()
  def model(model), do: if(path?(model), do: Path.basename(model), else: model)

  @doc "Whether a label's value is a path, as far as one can see."
  @spec path?(String.t()) :: boolean()
  def path?(value), do: value =~ ~r{^[/~.]|/.*/}
end
