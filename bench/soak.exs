# Hours of everyday life in minutes: a steady mix of completions, chats, streams and tokenization on
# one real engine, with callers that die, leave, run out of time and ask nonsense; and what the BEAM
# and the worker hold meanwhile. Ends with status 1 where something grows or a request is not
# accounted for.
#
#     mix run bench/soak.exs --minutes 30
#
#   --minutes     how long it runs (5)
#   --rate        requests a second, at most (20)
#   --callers     that ask at once (12)
#   --every       seconds between two samples (10)
#   --seed        what requests and faults follow from (1)

for file <- ~w(os_process demo_model footprint chaos/plan chaos/bank chaos/caller chaos) do
  path = Path.expand("../test/support/#{file}.ex", __DIR__)
  unless Mix.env() == :test, do: Code.require_file(path)
end

alias VLLM.{Chaos, DemoModel, Footprint}

Logger.configure(level: :error)

{options, [], []} =
  OptionParser.parse(System.argv(),
    strict: [minutes: :float, rate: :integer, callers: :integer, every: :integer, seed: :integer]
  )

options = Map.new([minutes: 5.0, rate: 20, callers: 12, every: 10, seed: 1] ++ options)

tmp = Path.join(System.tmp_dir!(), "soak-#{System.pid()}")
File.mkdir_p!(tmp)
System.put_env("TMPDIR", tmp)

# Of each column: its heading, and by how much the median of the last third of the samples may be
# above that of the second third: by a share of it, and by a number.
columns = [
  {:memory, "BEAM MB", 0.03, 1.0},
  {:processes, "processes", 0.0, 4},
  {:ets_tables, "ETS tables", 0.0, 0},
  {:ets_memory, "ETS kB", 0.03, 16},
  {:ports, "ports", 0.0, 1},
  {:atoms, "atoms", 0.0, 20},
  {:fds, "fds", 0.0, 2},
  {:worker_fds, "worker fds", 0.0, 2},
  {:core_fds, "core fds", 0.0, 2},
  {:worker_rss, "worker MB", 0.01, 2.0},
  {:core_rss, "core MB", 0.01, 2.0},
  {:in_flight, "in flight", 0.0, 12}
]

megabytes = &Float.round(&1 / 1024 / 1024, 1)

sample = fn run ->
  [guard] = Footprint.guards()
  roles = Map.new(Footprint.roles(guard))
  beam = Footprint.take()
  [worker] = VLLM.Engine.Table.workers(run.table)
  # The account grows with each request, and is no part of the library.
  words = fn tables ->
    tables |> Enum.map(&:ets.info(&1, :memory)) |> Enum.filter(&is_integer/1)
  end

  bytes = &(Enum.sum(words.(&1)) * :erlang.system_info(:wordsize))
  account = [run.outcomes, run.calls, run.violations, run.segments]

  Map.merge(beam, %{
    memory: megabytes.(beam.memory - bytes.(account)),
    ets_memory: div(bytes.(:ets.all() -- account), 1024),
    worker_fds: Footprint.fds(roles.worker),
    core_fds: Footprint.fds(roles.engine_core),
    worker_rss: megabytes.(Footprint.resident(roles.worker)),
    core_rss: megabytes.(Footprint.resident(roles.engine_core)),
    in_flight: VLLM.Bridge.Connection.in_flight(worker.conn)
  })
end

row = fn cells -> IO.puts(Enum.map_join(cells, " ", &String.pad_leading("#{&1}", 10))) end

# A sample each so many seconds, all of them shown.
samples = fn run ->
  row.(["s", "requests"] ++ Enum.map(columns, &elem(&1, 1)))
  started_at = System.monotonic_time(:millisecond)

  samples =
    for n <- 1..max(round(options.minutes * 60 / options.every), 6) do
      at = started_at + 1000 * n * options.every
      Process.sleep(max(at - System.monotonic_time(:millisecond), 0))
      sample = sample.(run)
      requests = :atomics.get(run.counters, 3)
      row.([n * options.every, requests] ++ Enum.map(columns, &sample[elem(&1, 0)]))
      sample
    end

  %{samples: samples, hits: [], operations: []}
end

# Faults of callers in one of seven requests, for as long as it lasts.
requests = round(options.minutes * 60 * options.rate)

plan =
  Chaos.Plan.new(options.seed,
    requests: requests,
    faults: div(requests, 7),
    processes: 0,
    operations: 0,
    victims: [:worker]
  )

account =
  Chaos.load(
    [
      start: fn -> DemoModel.start!() end,
      bank: Chaos.Bank.demo(),
      plan: %{plan | requests: 0},
      callers: options.callers,
      rate: options.rate,
      timeout: 60_000,
      patience: 60,
      memory: 16 * 1024 * 1024
    ],
    samples
  )

File.rm_rf!(tmp)

median = fn list -> list |> Enum.sort() |> Enum.at(div(length(list), 2)) end
third = div(length(account.samples), 3)
[_warm_up, second, last | _] = Enum.chunk_every(account.samples, third)

growth =
  for {name, heading, share, number} <- columns do
    before = median.(Enum.map(second, & &1[name]))
    now = median.(Enum.map(last, & &1[name]))
    {heading, before, now, now <= before + max(before * share, number)}
  end

IO.puts("\nmedians of the second and the last third")

for {heading, before, now, flat?} <- growth do
  row.([heading, before, now, if(flat?, do: "flat", else: "GROWS")])
end

IO.puts(["\n", Chaos.describe(account)])
flat? = Enum.all?(growth, &elem(&1, 3))
IO.puts(if flat?, do: "verdict: flat", else: "verdict: something grows")
unless flat? and account.violations == [], do: System.halt(1)
