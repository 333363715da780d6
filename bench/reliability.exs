# The figures of guides/reliability.md on one real engine: how soon an abandoned request is gone from
# vLLM, how soon callers hear of a death, how soon the engine serves again, how long it takes to be
# refused, and how soon a death is noticed while the model loads.
#
#     mix run bench/reliability.exs

for file <- ~w(os_process demo_model footprint) do
  path = Path.expand("../test/support/#{file}.ex", __DIR__)
  unless Mix.env() == :test, do: Code.require_file(path)
end

alias VLLM.{DemoModel, Footprint, OSProcess}

Logger.configure(level: :none)

now = fn -> System.monotonic_time(:microsecond) end

report = fn what, times ->
  [middle, last] = [Enum.at(Enum.sort(times), div(length(times), 2)), Enum.max(times)]
  show = &:erlang.float_to_binary(&1 / 1000, decimals: 2)

  IO.puts(
    "#{String.pad_trailing(what, 52)} median #{show.(middle)} ms, at most #{show.(last)} ms (#{length(times)})"
  )
end

await = fn until ->
  poll = fn poll -> unless until.(), do: Process.sleep(1) && poll.(poll) end
  poll.(poll)
end

long = [max_tokens: 900, ignore_eos: true, temperature: 0.0]
llm = DemoModel.start!("demo", max_restarts: 100, max_in_flight: 64, max_queue: 0)
{:ok, table, _} = VLLM.Engine.Table.lookup(llm)

in_flight = fn ->
  VLLM.Engine.Table.workers(table)
  |> Enum.map(&VLLM.Bridge.Connection.in_flight(&1.conn))
  |> Enum.sum()
end

# The worker answers a cancelled request when vLLM has let it go.
left =
  for _ <- 1..100 do
    [_] = Enum.take(VLLM.stream!(llm, "Count:", long), 1)
    at = now.()
    await.(fn -> in_flight.() == 0 end)
    now.() - at
  end

report.("a stream that is left, until vLLM has let it go", left)

test = self()
holders = for _ <- 1..64, do: spawn(fn -> VLLM.generate(llm, "Count:", long) end)
await.(fn -> in_flight.() == 64 end)

refused =
  for _ <- 1..100 do
    at = now.()

    VLLM.generate(llm, "The", max_tokens: 1)
    |> case do
      {:error, %VLLM.Error{reason: :overloaded}} -> [now.() - at]
      # The others have ended meanwhile.
      {:ok, _} -> []
    end
  end

for pid <- holders, do: Process.exit(pid, :kill)
await.(fn -> in_flight.() == 0 end)
report.("a call that is refused as :overloaded", List.flatten(refused))

deaths =
  for victim <- [:worker, :engine_core, :guard] do
    {:ok, _} = VLLM.generate(llm, "The", max_tokens: 1)

    for _ <- 1..8 do
      spawn(fn ->
        {:error, %VLLM.Error{reason: reason}} = VLLM.generate(llm, "Count:", long)
        send(test, {:told, reason, now.()})
      end)
    end

    await.(fn -> in_flight.() == 8 end)
    [guard] = Footprint.guards()
    roles = Footprint.roles(guard)
    at = now.()
    true = OSProcess.signal("KILL", roles[victim])

    told =
      for _ <- 1..8 do
        receive do
          {:told, :engine_dead, told} -> told - at
        after
          60_000 -> raise "a caller was not told"
        end
      end

    # The next run, not the rest of this one.
    await.(fn -> match?([next] when next != guard, Footprint.guards()) end)
    :ok = VLLM.await_ready(llm)
    {victim, Enum.max(told), now.() - at}
  end

for {victim, list} <- Enum.group_by(deaths, &elem(&1, 0)) do
  report.("SIGKILL of the #{victim}, until all 8 callers know", Enum.map(list, &elem(&1, 1)))
end

report.("a death, until the engine serves again", Enum.map(deaths, &elem(&1, 2)))
VLLM.stop(llm)

# The first process that vLLM starts is its EngineCore, the second a rank; until they have imported
# what they need, they have no name of their own.
for {victim, place, ranks, delays} <- [
      {"EngineCore", 0, 1, [0, 100, 1000, 3000, 5000]},
      {"a rank", 1, 2, [0, 3000, 5000, 8000]}
    ] do
  noticed =
    for delay <- delays do
      options = [tensor_parallel_size: ranks, max_restarts: 0] ++ DemoModel.options()
      load = Task.async(fn -> VLLM.llm(DemoModel.path(), options) end)

      spawned = fn ->
        for guard <- Footprint.guards(),
            {_role, pid} <- Enum.sort_by(Footprint.roles(guard), &elem(&1, 1)),
            OSProcess.command(pid) =~ "spawn_main",
            do: pid
      end

      await.(fn -> Enum.at(spawned.(), place) != nil end)
      pid = Enum.at(spawned.(), place)
      Process.sleep(delay)
      at = now.()
      true = OSProcess.signal("KILL", pid)
      {:error, %VLLM.Error{reason: :failed} = error} = Task.await(load, 60_000)
      "engine_dead" = error.details["reason"]
      now.() - at
    end

  report.("SIGKILL of #{victim} while it loads, until noticed", noticed)
end
