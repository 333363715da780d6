defmodule VLLM.Engine.StatesTest do
  # A model of an engine's workers and of the calls to them, and the real engine
  # driven at random beside it. After each event the two must come to agree.
  #
  # EX_VLLM_SEED=n runs the sequence of that number alone.
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 2]

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Config, Table}
  alias VLLM.{Error, Puppet}

  @moduletag timeout: 600_000
  @moduletag capture_log: true

  @sequences 300
  @events 25
  @max_restarts 1

  # How long the two may take to agree, in ms: only a fault takes that long.
  @patience 30_000

  test "the workers' states and the calls' ends are those of the model" do
    seeds =
      case System.get_env("EX_VLLM_SEED") do
        nil -> Enum.map(1..@sequences, fn _ -> :rand.uniform(1_000_000_000) end)
        seed -> [String.to_integer(seed)]
      end

    seeds
    |> Task.async_stream(&sequence/1, max_concurrency: 16, timeout: :infinity, ordered: false)
    |> Enum.each(fn {:ok, outcome} -> assert outcome == :agreed end)
  end

  defp sequence(seed) do
    :rand.seed(:exsss, seed)
    model = start(seed)
    final = Enum.reduce(1..@events, model, fn _, model -> step(model) end)
    finish(final)
  end

  defp start(seed) do
    test = self()
    replicas = :rand.uniform(2)

    {:ok, config} =
      Config.new(
        model: "puppet",
        replicas: replicas,
        max_restarts: @max_restarts,
        # However long a sequence takes, every death in it counts.
        max_seconds: 86_400,
        shutdown_timeout: 0
      )

    # Nothing of a sequence that fails is left to the tests that follow.
    config = %{config | owner: test, start_program: fn _ -> Puppet.start(test) end}
    {:ok, pid} = VLLM.Engine.start(config)
    {:ok, table, _} = Table.lookup(pid)

    %{
      seed: seed,
      llm: pid,
      table: table,
      replicas: Map.new(1..replicas, &{&1, replica()}),
      # Of each call its process, and where it is: waiting, at a replica, or how it ended.
      calls: %{},
      next: 1,
      # What is done to a replica, and by whom it is awaited.
      operation: nil,
      kills: 0,
      history: []
    }
  end

  # `first` is how its first start ended.
  defp replica, do: %{state: :starting, loading: false, deaths: 0, next: nil, first: nil}

  ## Events

  defp step(model) do
    event = Enum.random(events(model))
    model = %{model | history: [event | model.history]}
    model |> apply_event(event) |> conclude() |> agree()
  end

  defp events(model) do
    starting = for {index, %{state: :starting, loading: false}} <- model.replicas, do: index
    loading = for {index, %{state: :starting, loading: true}} <- model.replicas, do: index
    running = for {index, r} <- model.replicas, r.state in [:ready, :draining], do: index
    held = for {prompt, %{at: at}} when is_integer(at) <- model.calls, do: prompt
    open = for {prompt, %{at: at}} when not is_tuple(at) <- model.calls, do: prompt
    indexes = Map.keys(model.replicas)

    List.flatten([
      [:request, :request, :timed_request],
      for(i <- starting, do: [{:await_loading, i}, {:await_loading, i}]),
      for(
        i <- loading,
        do: [{:load, i, :ok}, {:load, i, :ok}, {:load, i, :refused}, {:crash, i}]
      ),
      for(i <- running, do: [{:crash, i}, {:garbage, i}]),
      for(prompt <- held, do: [{:answer, prompt}, {:answer, prompt}]),
      for(prompt <- open, do: {:caller_dies, prompt}),
      if(model.operation == nil,
        do: [
          for(i <- indexes, do: [{:drain, i, :infinity}, {:drain, i, 1}, {:restart, i}]),
          {:scale, Enum.random(1..3)},
          if(model.kills < 2, do: for(i <- indexes, do: {:kill_worker, i}), else: [])
        ],
        else: []
      )
    ])
    |> Enum.reject(&race?(model, &1))
  end

  # The last of several new replicas is ready, and goes again because another failed: whether calls
  # that wait get in between is anybody's guess.
  defp race?(%{operation: {_ref, {:scale, now, count}}} = model, {:load, index, :ok})
       when index > now do
    others = for other <- (now + 1)..count, other != index, do: model.replicas[other].first

    :failed in others and nil not in others and
      Enum.any?(model.calls, &match?({_, %{at: :waiting}}, &1))
  end

  defp race?(_model, _event), do: false

  defp puppet(model, index) do
    {%{port: puppet}, _conn} = Table.run(model.table, index)
    puppet
  end

  defp apply_event(model, :request), do: request(model, :infinity)
  defp apply_event(model, :timed_request), do: request(model, 30)

  # There may be a pause before.
  defp apply_event(model, {:await_loading, index}) do
    asked = fn ->
      # After a kill of the worker's process, that of its predecessor is noted for a while.
      with {%{port: puppet}, _conn} <- Table.run(model.table, index),
           true <- Process.alive?(puppet) do
        receive do
          {:puppet, ^puppet, :loading} -> true
        after
          0 -> false
        end
      end
    end

    assert eventually(asked, @patience), "seed #{model.seed}: no start: #{describe(model)}"
    put(model, index, %{loading: true})
  end

  defp apply_event(model, {:load, index, :ok}) do
    Puppet.tell(puppet(model, index), {:load, :ok})
    put(model, index, %{state: :ready})
  end

  defp apply_event(model, {:load, index, :refused}) do
    Puppet.tell(puppet(model, index), {:load, "out_of_memory"})
    put(model, index, %{state: :failed})
  end

  defp apply_event(model, {:crash, index}) do
    Puppet.tell(puppet(model, index), :exit)
    died(model, index, :engine_dead)
  end

  defp apply_event(model, {:garbage, index}) do
    Puppet.tell(puppet(model, index), :garbage)
    died(model, index, :protocol)
  end

  defp apply_event(model, {:answer, prompt}) do
    Puppet.tell(puppet(model, model.calls[prompt].at), {:answer, prompt})
    put_in(model.calls[prompt].at, {:ended, :ok})
  end

  defp apply_event(model, {:caller_dies, prompt}) do
    pid = model.calls[prompt].pid
    monitor = Process.monitor(pid)
    Process.exit(pid, :kill)
    assert_receive {:DOWN, ^monitor, _, _, _}, @patience
    update_in(model.calls, &Map.delete(&1, prompt))
  end

  defp apply_event(model, {:drain, index, timeout}) do
    model =
      operate(model, {:drain, index}, fn -> VLLM.drain(model.llm, index, timeout: timeout) end)

    case model.replicas[index].state do
      :ready ->
        model = put(model, index, %{state: :draining, next: :drained})
        if timeout == 1, do: end_calls(model, index, :shutdown), else: model

      _ ->
        put(model, index, %{state: :drained, deaths: 0})
    end
  end

  defp apply_event(model, {:restart, index}) do
    model = operate(model, {:restart, index}, fn -> VLLM.restart(model.llm, index) end)

    case model.replicas[index].state do
      :ready ->
        put(model, index, %{state: :draining, next: :starting})

      :starting ->
        # Nothing else shows that it has arrived.
        assert eventually(fn -> awaited?(model, index) end, @patience)
        put(model, index, %{deaths: 0})

      _ ->
        put(model, index, %{state: :starting, deaths: 0})
    end
  end

  defp apply_event(model, {:scale, count}) do
    now = map_size(model.replicas)
    model = operate(model, {:scale, now, count}, fn -> VLLM.scale(model.llm, count) end)

    cond do
      count > now ->
        Enum.reduce((now + 1)..count, model, &put_in(&2.replicas[&1], replica()))

      count < now ->
        Enum.reduce((count + 1)..now, model, fn index, model ->
          case model.replicas[index].state do
            :ready -> put(model, index, %{state: :draining, next: :drained})
            _ -> put(model, index, %{state: :drained})
          end
        end)

      true ->
        model
    end
  end

  defp apply_event(model, {:kill_worker, index}) do
    worker = Table.process(model.table, index)
    Process.exit(worker, :kill)
    # Its successor is there before anything else happens.
    assert eventually(fn -> Table.process(model.table, index) != worker end, @patience)
    model = end_calls(%{model | kills: model.kills + 1}, index, :engine_dead)

    case model.replicas[index].state do
      state when state in [:drained, :failed] -> model
      _ -> put(model, index, %{state: :starting, deaths: 0})
    end
  end

  defp awaited?(model, index) do
    {_state, data} = :sys.get_state(Table.process(model.table, index))
    data.waiting != []
  end

  defp request(model, timeout) do
    test = self()
    prompt = "call #{model.next}"

    pid =
      spawn(fn ->
        result = VLLM.generate(model.llm, prompt, timeout: timeout)
        send(test, {:ended, prompt, result})
      end)

    call = %{pid: pid, at: :waiting, timeout: timeout}
    %{put_in(model.calls[prompt], call) | next: model.next + 1}
  end

  defp operate(model, what, operation) do
    test = self()
    ref = make_ref()
    spawn(fn -> send(test, {:operated, ref, operation.()}) end)
    %{model | operation: {ref, what}}
  end

  # What begins, begins before the load.
  defp put(model, index, %{state: state} = changes) do
    first = if state in [:ready, :failed], do: state

    update_in(model.replicas[index], fn replica ->
      Map.merge(%{replica | loading: false, first: replica.first || first}, changes)
    end)
  end

  defp put(model, index, changes), do: update_in(model.replicas[index], &Map.merge(&1, changes))

  defp end_calls(model, index, reason) do
    calls =
      Map.new(model.calls, fn
        {prompt, %{at: ^index} = call} -> {prompt, %{call | at: {:ended, reason}}}
        other -> other
      end)

    %{model | calls: calls}
  end

  defp died(model, index, reason) do
    model = end_calls(model, index, reason)

    case model.replicas[index] do
      %{state: :draining} -> model
      %{deaths: deaths} when deaths >= @max_restarts -> put(model, index, %{state: :failed})
      %{deaths: deaths} -> put(model, index, %{state: :starting, deaths: deaths + 1})
    end
  end

  ## What follows by itself

  # Replicas that drain and have nothing left go on; operations come to an end;
  # calls that wait are told where there is no hope.
  defp conclude(model) do
    model =
      Enum.reduce(model.replicas, model, fn
        {index, %{state: :draining} = replica}, model ->
          if at(model, index) == [],
            do: put(model, index, %{state: replica.next, next: nil, deaths: 0}),
            else: model

        _, model ->
          model
      end)

    model |> conclude_operation() |> conclude_calls()
  end

  defp conclude_operation(%{operation: {ref, {:scale, now, count}}} = model) when count > now do
    starts = for index <- (now + 1)..count, do: model.replicas[index].first

    cond do
      # Each is awaited; then all go if one failed, when they have nothing left.
      nil in starts ->
        model

      Enum.all?(starts, &(&1 == :ready)) ->
        operated(model, ref, :ok)

      true ->
        failed_scale(model, (now + 1)..count, ref)
    end
  end

  defp conclude_operation(%{operation: {ref, {:scale, now, count}}} = model) when count < now do
    if Enum.all?((count + 1)..now, &(model.replicas[&1].state == :drained)),
      do: model |> forget((count + 1)..now) |> operated(ref, :ok),
      else: model
  end

  defp conclude_operation(%{operation: {ref, {:scale, same, same}}} = model),
    do: operated(model, ref, :ok)

  defp conclude_operation(%{operation: {ref, {:shrink, indexes}}} = model) do
    if Enum.all?(indexes, &(model.replicas[&1].state == :drained)),
      do: model |> forget(indexes) |> operated(ref, :error),
      else: model
  end

  defp conclude_operation(%{operation: {ref, {kind, index}}} = model) do
    case {kind, model.replicas[index].state} do
      {:drain, :drained} -> operated(model, ref, :ok)
      {:restart, :ready} -> operated(model, ref, :ok)
      {:restart, :failed} -> operated(model, ref, :error)
      _ -> model
    end
  end

  defp conclude_operation(model), do: model

  defp failed_scale(model, indexes, ref) do
    model =
      Enum.reduce(indexes, model, fn index, model ->
        case model.replicas[index].state do
          :ready -> put(model, index, %{state: :draining, next: :drained})
          _ -> put(model, index, %{state: :drained})
        end
      end)

    conclude(%{model | operation: {ref, {:shrink, indexes}}})
  end

  defp forget(model, indexes), do: update_in(model.replicas, &Map.drop(&1, Enum.to_list(indexes)))

  defp operated(model, ref, outcome) do
    receive do
      {:operated, ^ref, result} ->
        assert outcome == if(result == :ok, do: :ok, else: :error),
               "seed #{model.seed}: #{inspect(result)} in #{describe(model)}"
    after
      @patience -> flunk("seed #{model.seed}: the operation does not end: #{describe(model)}")
    end

    %{model | operation: nil}
  end

  defp conclude_calls(model) do
    hopeless = Enum.all?(model.replicas, fn {_, r} -> r.state in [:failed, :drained] end)

    calls =
      Map.new(model.calls, fn
        {prompt, %{at: :waiting} = call} when hopeless -> {prompt, %{call | at: {:ended, :down}}}
        other -> other
      end)

    %{model | calls: calls}
  end

  defp at(model, index), do: for({prompt, %{at: ^index}} <- model.calls, do: prompt)

  ## Agreement

  defp agree(%{seed: seed} = model) do
    model = place(model)

    unless eventually(fn -> differences(model) == [] end, @patience),
      do: flunk("seed #{seed}: #{inspect(differences(model))} in #{describe(model)}")

    for {prompt, %{at: {:ended, reason}} = call} <- model.calls, not is_map_key(call, :told) do
      assert_ended(model, prompt, reason)
    end

    # What has ended is done with.
    calls = for {p, %{at: at} = call} <- model.calls, not is_tuple(at), into: %{}, do: {p, call}
    %{model | calls: calls}
  end

  # A call that waits goes to any replica that is ready: which one is found out.
  # One with a short time ends by itself.
  defp place(%{seed: seed} = model) do
    ready = for {index, %{state: :ready}} <- model.replicas, do: index

    Enum.reduce(model.calls, model, fn
      {prompt, %{at: :waiting}}, model when ready != [] ->
        receive do
          {:puppet, puppet, {:asked, ^prompt}} ->
            index = Enum.find(ready, &(puppet(model, &1) == puppet))
            assert index, "seed #{seed}: #{prompt} came to a replica that is not ready"
            timed(put_in(model.calls[prompt].at, index), prompt)

          {:ended, ^prompt, {:error, %Error{reason: :timeout}}} = early ->
            # The deadline may have passed first.
            send(self(), early)
            assert model.calls[prompt].timeout != :infinity
            timed(model, prompt)
        after
          @patience -> flunk("seed #{seed}: #{prompt} comes to nobody: #{describe(model)}")
        end

      {prompt, %{at: :waiting}}, model ->
        timed(model, prompt)

      _, model ->
        model
    end)
  end

  defp timed(%{calls: calls} = model, prompt) do
    if calls[prompt].timeout == :infinity,
      do: model,
      else: put_in(model.calls[prompt].at, {:ended, :timeout})
  end

  defp assert_ended(%{seed: seed} = model, prompt, reason) do
    receive do
      {:ended, ^prompt, result} ->
        got =
          case result do
            {:ok, [output]} -> if VLLM.text(output) == prompt, do: :ok, else: :wrong
            {:error, %Error{reason: reason}} -> reason
          end

        expected =
          case reason do
            :down -> [:failed, :out_of_memory, :not_running]
            reason -> [reason]
          end

        # Where the machine is busy, a short time may be over first.
        timed = if model.calls[prompt].timeout == :infinity, do: [], else: [:timeout]

        assert got in (expected ++ timed),
               "seed #{seed}: #{prompt} ended with #{got}, not #{inspect(expected)}: #{describe(model)}"
    after
      @patience -> flunk("seed #{seed}: #{prompt} does not end: #{describe(model)}")
    end
  end

  defp differences(%{table: table} = model) do
    statuses =
      for index <- 1..3, status = Table.status(table, index), into: %{} do
        case status do
          {:failed, _} -> {index, :failed}
          # There is a pause before the start, and no promise how long.
          :dead -> {index, :starting}
          status -> {index, status}
        end
      end

    expected = Map.new(model.replicas, fn {index, replica} -> {index, replica.state} end)
    rows = table |> Table.workers() |> Enum.map(& &1.index) |> Enum.sort()
    ready = for {index, %{state: :ready}} <- model.replicas, do: index

    in_flight =
      for {index, replica} <- model.replicas,
          replica.state in [:ready, :draining],
          run = Table.run(table, index),
          {_program, conn} = run,
          count = Connection.in_flight(conn),
          count != length(at(model, index)),
          do: {index, count, at(model, index)}

    # A worker that dies while it starts is soon starting again: only its deaths tell that it has
    # heard of this one.
    deaths =
      for {index, %{state: state, deaths: deaths}} <- model.replicas,
          state in [:starting, :ready, :draining],
          counted = deaths(table, index),
          counted != deaths,
          do: {index, counted, deaths}

    alive =
      for {prompt, %{at: at, pid: pid}} <- model.calls,
          not is_tuple(at),
          not Process.alive?(pid),
          do: prompt

    Enum.reject(
      [
        statuses: statuses != expected && {statuses, expected},
        rows: rows != Enum.sort(ready) && {rows, ready},
        deaths: deaths != [] && deaths,
        in_flight: in_flight != [] && in_flight,
        ended_too_soon: alive != [] && alive
      ],
      fn {_, difference} -> difference == false end
    )
  end

  defp deaths(table, index) do
    {_state, data} = :sys.get_state(Table.process(table, index), :infinity)
    length(data.deaths)
  catch
    # Killed just now; its successor comes.
    :exit, reason -> reason
  end

  defp describe(model), do: inspect({Enum.reverse(model.history), model.replicas, model.calls})

  # Stopped, it ends each call that is left, and leaves nothing.
  defp finish(%{seed: seed} = model) do
    assert :ok = VLLM.stop(model.llm)
    refute Process.alive?(model.llm)

    for {prompt, _call} <- model.calls do
      receive do
        {:ended, ^prompt, {:error, %Error{reason: reason}}} ->
          assert reason in [:shutdown, :not_running],
                 "seed #{seed}: #{prompt} ended with #{reason}"
      after
        @patience -> flunk("seed #{seed}: #{prompt} does not end with its engine")
      end
    end

    refute_received {:ended, _, _}
    :agreed
  end
end
