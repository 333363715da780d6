defmodule VLLM.Metrics.Families do
  @moduledoc false
  # What `VLLM.Metrics` tells: the library's own metrics, each declared once, and
  # vLLM's with the labels of their replica.

  alias VLLM.Job.{Record, Tally}
  alias VLLM.Metrics.{Engines, Exposition}

  @states [:starting, :ready, :draining, :drained, :dead, :failed]

  # Those that there are from the beginning: what has happened once has then grown from 0, which
  # Prometheus sees; a series that begins with 1 has not.
  @deaths [:engine_dead, :hung, :protocol]

  @own [
    up:
      {"gauge", ~w(engine replica),
       "1 where the replica has answered in time with vLLM's metrics, else 0"},
    engine_info: {"gauge", ~w(engine model), "1; says which model the engine serves"},
    replicas: {"gauge", ~w(engine), "how many replicas the engine is to have"},
    replica_state:
      {"gauge", ~w(engine replica state),
       "1 for the state that the replica is in, 0 for all others"},
    requests_running:
      {"gauge", ~w(engine replica),
       "requests that the replica has been given and may compute at once"},
    requests_waiting:
      {"gauge", ~w(engine replica), "requests that wait beyond those, in vLLM's queue"},
    requests_limit:
      {"gauge", ~w(engine replica),
       "requests that may run and wait; one more is refused. 0 while it takes none"},
    requests_total:
      {"counter", ~w(engine method outcome), "requests that have ended, by what came of them"},
    refused_requests_total:
      {"counter", ~w(engine replica), "requests that were refused because too many were waiting"},
    deaths_total: {"counter", ~w(engine replica reason), "times that the replica's program died"},
    restarts_total:
      {"counter", ~w(engine replica), "times that the replica was started again after a death"},
    loads_total:
      {"counter", ~w(engine replica outcome), "starts that have ended, by what came of them"},
    last_load_seconds:
      {"gauge", ~w(engine replica),
       "how long the last start took that succeeded, until it was ready"},
    jobs: {"gauge", ~w(kind state), "jobs of this node that have not ended"},
    jobs_ended_total:
      {"counter", ~w(kind state), "jobs of this node that have ended since it began"}
  ]

  @doc "The library's own metrics: name, type, labels and meaning."
  @spec own() :: [{String.t(), String.t(), [String.t()], String.t()}]
  def own, do: for({name, {type, labels, help}} <- @own, do: {full(name), type, labels, help})

  @doc "All metrics of these engines, and of the jobs of this node."
  @spec all([Engines.engine()]) :: [Exposition.family()]
  def all(engines) do
    jobs = Tally.counts()

    own =
      for {name, {type, labels, help}} <- @own do
        samples =
          for {values, value} <- name |> series(engines, jobs) |> Enum.sort() do
            values = values |> Tuple.to_list() |> Enum.map(&to_string/1)
            {full(name), Enum.zip(labels, values), value}
          end

        %{name: full(name), type: type, help: help <> ".", samples: samples}
      end

    own ++ Exposition.merge(of_vllm(engines))
  end

  defp full(name), do: "vllm_bridge_#{name}"

  ## Our own: the values of their labels, with a number

  defp series(:jobs, _engines, jobs) do
    {active, _ended} = Record.states()
    zero(for(kind <- Record.kinds(), state <- active, do: {kind, state}), jobs.now)
  end

  defp series(:jobs_ended_total, _engines, jobs) do
    {_active, ended} = Record.states()
    zero(for(kind <- Record.kinds(), state <- ended, do: {kind, state}), jobs.ended)
  end

  defp series(:engine_info, engines, _jobs),
    do: for(one <- engines, do: {{one.name, one.model}, 1})

  defp series(:replicas, engines, _jobs), do: for(one <- engines, do: {{one.name}, one.wanted})

  defp series(:requests_total, engines, _jobs),
    do: counted(engines, :requests, fn _replica -> [] end)

  defp series(:refused_requests_total, engines, _jobs),
    do: counted(engines, :refused, &[{&1.index}])

  defp series(:deaths_total, engines, _jobs),
    do:
      counted(engines, :deaths, fn replica ->
        for(reason <- @deaths, do: {replica.index, reason})
      end)

  defp series(:restarts_total, engines, _jobs), do: counted(engines, :restarts, &[{&1.index}])
  defp series(:loads_total, engines, _jobs), do: counted(engines, :loads, &[{&1.index, :ok}])

  defp series(name, engines, _jobs) do
    for engine <- engines,
        replica <- engine.replicas,
        {values, value} <- of_replica(name, replica) do
      {List.to_tuple([engine.name, replica.index | values]), value}
    end
  end

  defp of_replica(:up, replica), do: [{[], if(replica.answer, do: 1, else: 0)}]

  defp of_replica(:replica_state, replica),
    do: for(state <- @states, do: {[state], if(replica.state == state, do: 1, else: 0)})

  defp of_replica(:requests_running, replica), do: [{[], Engines.running(replica)}]

  defp of_replica(:requests_waiting, replica),
    do: [{[], replica.in_flight - Engines.running(replica)}]

  defp of_replica(:requests_limit, %{worker: nil}), do: [{[], 0}]
  defp of_replica(:requests_limit, %{worker: %{limit: limit}}), do: [{[], limit}]
  defp of_replica(:last_load_seconds, %{load_time: nil}), do: []

  defp of_replica(:last_load_seconds, %{load_time: time}),
    do: [{[], System.convert_time_unit(time, :native, :microsecond) / 1.0e6}]

  # What an engine has counted, and 0 for what each replica has not yet.
  defp counted(engines, name, of_replica) do
    for engine <- engines,
        {values, count} <- zero(Enum.flat_map(engine.replicas, of_replica), engine.counts[name]),
        do: {Tuple.insert_at(values, 0, engine.name), count}
  end

  defp zero(keys, counts), do: Map.merge(Map.new(keys, &{&1, 0}), counts)

  ## vLLM's

  defp of_vllm(engines) do
    for engine <- engines,
        %{answer: [_ | _] = families} = replica <- engine.replicas,
        family <- families do
      of_replica = [{"engine", engine.name}, {"replica", to_string(replica.index)}]

      samples =
        for [name, labels, value] <- family["samples"] do
          labels = for {label, text} <- Enum.sort(labels), do: label(label, text, replica)
          {name, of_replica ++ labels, value}
        end

      %{name: family["name"], type: family["type"], help: family["help"], samples: samples}
    end
  end

  # vLLM's `engine` is a number within ours; Prometheus renames what it finds taken in the same way.
  defp label(name, text, _replica) when name in ["engine", "replica"],
    do: {"exported_" <> name, text}

  # vLLM calls a model by the folder that it was read from.
  defp label("model_name", text, replica),
    do: {"model_name", if(Engines.path?(text), do: replica.model, else: text)}

  defp label(name, text, _replica),
    do: {name, if(Engines.path?(text), do: Path.basename(text), else: text)}
end
