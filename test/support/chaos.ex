defmodule VLLM.Chaos do
  @moduledoc """
  Load on an engine while processes are killed and stopped and callers die, leave and ask nonsense;
  and the account of it. All of it follows from a seed (`VLLM.Chaos.Plan`), except what the machine
  makes of it.
  """

  alias VLLM.Chaos.Caller
  alias VLLM.Engine.Table
  alias VLLM.{Footprint, OSProcess}

  # A call may take so many ms beyond its deadline, on a machine that is busy.
  @grace 15_000

  # How long an engine may take to serve again, in ms.
  @recovery 300_000

  # How long a run may take to be gone after one of its processes was killed.
  @gone 30_000

  @doc """
  Starts an engine with `start`, runs the plan, stops it, and returns the account.

    * `:start` - a function that starts an engine of the calling process and returns its handle
    * `:bank` - what is asked, see `VLLM.Chaos.Bank`
    * `:plan` - a `VLLM.Chaos.Plan`
    * `:callers` - how many ask at once
    * `:rate` - requests a second, at most
    * `:pause` - usual ms between two faults of processes; five times as many between operations
    * `:hang` - ms within which a stopped process is found out, twice the engine's `hang_timeout:`
    * `:timeout` - ms that a call has
    * `:patience` - ms within which those die and time out who are to
    * `:memory` - bytes that the BEAM may hold more at the end
    * `:log` - a function that is told of each fault of a process as it happens
  """
  def run(options) do
    options = Map.new(options)

    load(options, fn run ->
      operator = Task.async(fn -> operate(run, options) end)
      hits = Enum.map(run.plan.processes, &strike(run, options, &1))
      %{hits: hits, operations: Task.await(operator, :infinity)}
    end)
  end

  @doc """
  Like `run/1`, with `meanwhile` in place of the faults of processes: callers go on until it returns.
  What it returns is a part of the account.
  """
  def load(options, meanwhile) do
    options = Map.new(options)
    # What is loaded on first use is no leak.
    {:ok, modules} = :application.get_key(:ex_vllm, :modules)
    :ok = :code.ensure_modules_loaded(modules)
    # Nor is the nursery, which stays for the next engine; its forks do not.
    VLLM.stop(options.start.())
    true = OSProcess.eventually(fn -> Footprint.guards() == [] end)
    before = Footprint.take()
    started_at = System.monotonic_time(:millisecond)
    run = new(options)
    llm = options.start.()
    {:ok, table, _pid} = Table.lookup(llm)
    run = Map.merge(run, %{llm: llm, table: table, away: away(table, run.plan)})

    beside =
      Task.async(fn ->
        result = meanwhile.(run)
        :atomics.put(run.counters, 2, 1)
        result
      end)

    watch(run, Enum.reduce(1..options.callers, %{}, fn _, callers -> add(callers, run) end))
    result = Task.await(beside, :infinity)
    wrong = afterwards(run)
    for guard <- Footprint.guards(), do: note_segments(run, Footprint.roles(guard))
    VLLM.stop(llm)
    violations = wrong ++ for({_, violation} <- :ets.tab2list(run.violations), do: violation)
    segments = for {name} <- :ets.tab2list(run.segments), do: name
    account = Map.merge(account(run, started_at), result)
    for name <- [:calls, :outcomes, :violations, :segments], do: :ets.delete(run[name])

    left =
      Footprint.left(before, %{memory: options.memory, ets_memory: 65_536, atoms: 1000}) ++
        for(name <- segments, File.exists?("/dev/shm/" <> name), do: {:shared_memory, name})

    violations = violations ++ for({what, more} <- left, do: {:left_behind, what, more})
    Map.merge(account, %{left: left, violations: violations ++ sum(account)})
  end

  # What whoever asks may hear of an engine that is hit.
  defp away(table, plan) do
    hit = [:engine_dead, :poison, :overloaded]
    drained? = Enum.any?(plan.operations, &(&1.operation == :drain))
    # Where the only replica is drained, nobody serves.
    if drained? and Table.replicas(table) == 1, do: [:not_running | hit], else: hit
  end

  defp new(options) do
    options
    |> Map.take([:bank, :plan, :timeout, :patience])
    |> Map.merge(%{
      # The last number taken; whether all faults of processes have happened; requests sent.
      counters: :atomics.new(3, []),
      calls: :ets.new(:calls, [:public]),
      outcomes: :ets.new(:outcomes, [:public]),
      violations: :ets.new(:violations, [:public]),
      # What processes had mapped when they were hit.
      segments: :ets.new(:segments, [:public]),
      pause: div(1000 * options.callers, options.rate)
    })
  end

  ## The callers' watch

  defp add(callers, run) do
    {pid, monitor} = Caller.start(run)
    Map.put(callers, monitor, pid)
  end

  defp watch(_run, callers) when callers == %{}, do: :ok

  defp watch(run, callers) do
    receive do
      {:DOWN, monitor, :process, pid, reason} when is_map_key(callers, monitor) ->
        callers = Map.delete(callers, monitor)
        ended(run, pid, reason)
        watch(run, if(over?(run), do: callers, else: add(callers, run)))
    after
      500 ->
        now = System.monotonic_time(:millisecond)

        for {pid, number, deadline} <- :ets.tab2list(run.calls), now > deadline + @grace do
          stack = Process.info(pid, :current_stacktrace)
          violation(run, {:unanswered, number, stack})
          Caller.note(run, number, :unanswered, now - deadline)
          :ets.delete(run.calls, pid)
          Process.exit(pid, :kill)
        end

        watch(run, callers)
    end
  end

  defp over?(run) do
    :atomics.get(run.counters, 1) >= run.plan.requests and :atomics.get(run.counters, 2) == 1
  end

  # How a caller's last request ended, if the caller could not say so itself.
  defp ended(run, pid, reason) do
    with [{^pid, number, _deadline}] <- :ets.take(run.calls, pid),
         [] <- :ets.lookup(run.outcomes, number) do
      case reason do
        :killed -> Caller.note(run, number, :died)
        _ -> Caller.note(run, number, {:crashed, reason})
      end
    end
  end

  defp violation(run, violation), do: :ets.insert(run.violations, {make_ref(), violation})

  ## The faults of processes

  defp strike(run, options, fault) do
    wait(div(fault.pause * options.pause, 1000))
    if fault.moment == :serving, do: await_serving(run)

    case candidates(run, fault.moment) do
      [] ->
        # All are between two runs.
        wait(50)
        strike(run, options, fault)

      guards ->
        roles = Footprint.roles(Enum.at(guards, rem(fault.run, length(guards))))
        note_segments(run, roles)
        {role, pid} = victim(roles, fault.victim)

        if OSProcess.signal(if(fault.signal == :kill, do: "KILL", else: "STOP"), pid),
          do: hit(run, options, fault, role, pid, roles),
          else: strike(run, options, fault)
    end
  end

  defp hit(run, options, fault, role, pid, roles) do
    at = System.monotonic_time(:millisecond)
    options.log.({fault.signal, role, fault.moment})
    # A run goes on without a helper, such as the shell that finds its interpreter.
    watched = if role == :helper, do: [{role, pid}], else: roles
    follow(run, options, fault, pid, watched)
    %{victim: role, signal: fault.signal, took: System.monotonic_time(:millisecond) - at}
  end

  defp follow(run, options, %{signal: signal} = fault, pid, roles) when signal != :stop do
    patience = if signal == :hang, do: options.hang + @gone, else: @gone
    gone? = OSProcess.eventually(fn -> not alive?(roles) end, patience)
    unless gone?, do: violation(run, {:not_gone, fault, roles})
    if signal == :hang, do: OSProcess.signal("CONT", pid)
  end

  defp follow(_run, _options, %{resume: resume}, pid, _roles) do
    wait(resume)
    OSProcess.signal("CONT", pid)
  end

  # The guards of what serves, or that of what has started last.
  defp candidates(run, :serving) do
    for %{index: index, conn: conn} <- Table.workers(run.table),
        # The run may be another one by now.
        {%{port: port} = program, _conn} <- [Table.run(run.table, index)],
        port == conn.port,
        guard = Footprint.guard(program.run_dir),
        # It may be gone meanwhile.
        guard != 0,
        do: guard
  end

  defp candidates(_run, :started), do: Enum.take(Footprint.guards(), -1)

  defp note_segments(run, roles) do
    for name <- Footprint.segments(Keyword.values(roles)), do: :ets.insert(run.segments, {name})
  end

  # A run that has only begun has not all of them.
  defp victim(roles, wanted) do
    Enum.find(roles, hd(Enum.reverse(roles)), &match?({^wanted, _}, &1))
  end

  defp alive?(roles), do: Enum.any?(roles, fn {_role, pid} -> OSProcess.alive?(pid) end)

  # The only replica may be drained just then; the operation starts it again.
  defp await_serving(run) do
    served? = fn -> VLLM.await_ready(run.llm, @recovery) == :ok end

    unless OSProcess.eventually(served?, @recovery),
      do: violation(run, {:not_serving, VLLM.replicas!(run.llm)})
  end

  defp wait(ms) do
    receive do
    after
      ms -> :ok
    end
  end

  ## Operations

  defp operate(run, options) do
    replicas = length(VLLM.replicas!(run.llm))

    for %{operation: operation, replica: n} <- run.plan.operations do
      wait(5 * options.pause)
      result = operate(run.llm, operation, rem(n, replicas) + 1, replicas)
      options.log.({operation, rem(n, replicas) + 1, result})
      {operation, result}
    end
  end

  # Replicas that die meanwhile may make it an error; what matters is what is there in the end.
  defp operate(llm, :restart, replica, _count), do: VLLM.restart(llm, replica)
  defp operate(llm, :reload, _replica, _count), do: VLLM.reload(llm, max_queue: 1000)

  defp operate(llm, :drain, replica, _count) do
    with :ok <- VLLM.drain(llm, replica), do: VLLM.restart(llm, replica)
  end

  defp operate(llm, :scale, _replica, count) do
    more = VLLM.scale(llm, count + 1)
    with :ok <- VLLM.scale(llm, count), do: more
  end

  ## The account

  # The engine serves all that it should, and no request is left on either side.
  defp afterwards(run) do
    ready? = fn -> Enum.all?(VLLM.replicas!(run.llm), &(&1.state == :ready)) end

    unless OSProcess.eventually(ready?, @recovery),
      do: violation(run, {:not_ready, VLLM.replicas!(run.llm)})

    {prompts, right} = Enum.unzip(run.bank.prompts)

    wrong =
      case VLLM.generate(run.llm, prompts, [timeout: @recovery] ++ run.bank.options) do
        {:ok, outputs} ->
          if VLLM.text(outputs) == right, do: [], else: [{:wrong_afterwards, outputs}]

        {:error, error} ->
          [{:wrong_afterwards, error}]
      end

    idle? = fn -> Enum.all?(Table.workers(run.table), &idle?/1) end

    if OSProcess.eventually(idle?, @gone) do
      wrong
    else
      left = for %{conn: conn} <- Table.workers(run.table), do: under_way(conn)
      [{:requests_left, left} | wrong]
    end
  end

  defp idle?(%{conn: conn}), do: under_way(conn) == {0, []}

  defp under_way(conn) do
    {VLLM.Bridge.Connection.in_flight(conn), :ets.tab2list(conn.routes)}
  end

  defp account(run, started_at) do
    outcomes = :ets.tab2list(run.outcomes)
    named = for {_, outcome, _} <- outcomes, do: name(outcome)

    %{
      seed: run.plan.seed,
      seconds: div(System.monotonic_time(:millisecond) - started_at, 1000),
      sent: :atomics.get(run.counters, 3),
      outcomes: Enum.frequencies(named),
      bad: for({number, outcome, _} <- outcomes, bad?(outcome), do: {number, outcome}),
      overshoot:
        outcomes
        |> Enum.map(fn {_, outcome, late} -> if outcome == :deadline, do: late, else: 0 end)
        |> Enum.max(fn -> 0 end),
      caller_faults: run.plan.callers |> Map.values() |> Enum.frequencies()
    }
  end

  defp name({:error, reason}), do: {:error, reason}
  defp name(outcome) when is_tuple(outcome), do: elem(outcome, 0)
  defp name(outcome), do: outcome

  defp bad?({:error, _}), do: false
  defp bad?(outcome), do: is_tuple(outcome) or outcome == :unanswered

  # Each request that was sent has its one outcome.
  defp sum(account) do
    bad = for {number, outcome} <- account.bad, do: {:bad_outcome, number, outcome}
    if account.sent == Enum.sum(Map.values(account.outcomes)), do: bad, else: [:unaccounted | bad]
  end

  @doc "An account as a text."
  def describe(account) do
    hits = account.hits
    faults = length(hits) + Enum.sum(Map.values(account.caller_faults))

    [
      "seed #{account.seed}, #{account.seconds} s\n",
      line("requests sent", account.sent),
      for(
        {outcome, count} <- Enum.sort(account.outcomes),
        do: line("  " <> words(outcome), count)
      ),
      line("latest end after a deadline", "#{account.overshoot} ms"),
      line("faults", faults),
      for({what, count} <- hits |> Enum.frequencies_by(&{&1.signal, &1.victim}) |> Enum.sort()) do
        line("  " <> words(what), count)
      end,
      for({kind, count} <- account.caller_faults, do: line("  " <> fault(kind), count)),
      for({operation, count} <- Enum.frequencies_by(account.operations, &operation/1)) do
        line("  " <> operation, count)
      end,
      for(
        {signal, what} <- [kill: "a run is gone after SIGKILL", hang: "after SIGSTOP for good"],
        times = for(%{signal: ^signal, took: took} <- hits, do: took),
        times != [],
        do: line(what, spread(times))
      ),
      line("violations", length(account.violations)),
      for(
        violation <- Enum.take(account.violations, 20),
        do: "  #{inspect(violation, limit: 30)}\n"
      )
    ]
  end

  defp line(what, value), do: "#{String.pad_trailing(what, 34)} #{value}\n"

  defp words({:error, reason}), do: "error #{inspect(reason)}"
  defp words({:kill, victim}), do: "SIGKILL of a process: #{victim}"
  defp words({:stop, victim}), do: "SIGSTOP for a while: #{victim}"
  defp words({:hang, victim}), do: "SIGSTOP for good: #{victim}"
  defp words(:answered), do: "answered, right"
  defp words(:deadline), do: "ended at the deadline"
  defp words(:died), do: "the caller died"
  defp words(:left), do: "the caller left early"
  defp words(outcome), do: inspect(outcome)

  defp fault(:death), do: "caller killed"
  defp fault(:cancel), do: "stream left early"
  defp fault(:deadline), do: "deadline within milliseconds"
  defp fault(:malformed), do: "malformed request"

  defp operation({operation, :ok}), do: "#{operation}"
  defp operation({operation, {:error, error}}), do: "#{operation}: error #{inspect(error.reason)}"

  defp spread(times) do
    times = Enum.sort(times)
    "median #{Enum.at(times, div(length(times), 2))} ms, at most #{List.last(times)} ms"
  end
end
