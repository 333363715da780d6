# Load from many callers on a real engine while its processes are killed and stopped and callers
# die, leave, run out of time and ask nonsense; then the account of it. Ends with status 1 where it
# does not add up.
#
#     mix run bench/chaos.exs
#     mix run bench/chaos.exs --seed 7 --requests 20000 --faults 240 --processes 60 --replicas 2
#     mix run bench/chaos.exs --ranks --requests 2000 --faults 40 --processes 12 --replicas 1
#
#   --seed        what the plan of faults follows from; the same seed, the same plan
#   --requests    how many are made at least (20,000); more if faults take longer
#   --faults      of all kinds (240)
#   --processes   of these, how many hit processes of the engine (60)
#   --operations  restarts, drains, scalings and reloads beside the faults (8)
#   --replicas    workers of the engine (2)
#   --ranks       tensor_parallel_size 2: two more processes to hit in each worker
#   --callers     that ask at once (24)
#   --rate        requests a second, at most (60)
#   --pause       usual milliseconds between two faults of processes (3000)

for file <- ~w(os_process demo_model footprint chaos/plan chaos/bank chaos/caller chaos) do
  path = Path.expand("../test/support/#{file}.ex", __DIR__)
  unless Mix.env() == :test, do: Code.require_file(path)
end

alias VLLM.{Chaos, DemoModel}

Logger.configure(level: :error)

{options, [], []} =
  OptionParser.parse(System.argv(),
    strict: [
      seed: :integer,
      requests: :integer,
      faults: :integer,
      processes: :integer,
      replicas: :integer,
      ranks: :boolean,
      callers: :integer,
      rate: :integer,
      pause: :integer,
      operations: :integer
    ]
  )

defaults = [seed: 1, requests: 20_000, faults: 240, processes: 60, operations: 8, replicas: 2]
options = Map.new(defaults ++ [ranks: false, callers: 24, rate: 60, pause: 3000] ++ options)

# A folder of its own, so that nothing of other engines is taken for a leftover.
tmp = Path.join(System.tmp_dir!(), "chaos-#{System.pid()}")
File.mkdir_p!(tmp)
System.put_env("TMPDIR", tmp)

{victims, engine} =
  if options.ranks do
    {[:worker, :guard, :engine_core, :rank],
     [tensor_parallel_size: 2, env: %{"VLLM_CPU_OMP_THREADS_BIND" => "nobind"}]}
  else
    {[:worker, :guard, :engine_core], []}
  end

plan = Chaos.Plan.new(options.seed, Map.put(options, :victims, victims))
hang_timeout = 20_000
started_at = System.monotonic_time(:second)

log = fn event ->
  IO.puts("#{System.monotonic_time(:second) - started_at} s: #{inspect(event)}")
end

account =
  Chaos.run(
    start: fn ->
      DemoModel.start!(
        "demo",
        [
          replicas: options.replicas,
          max_restarts: 100_000,
          max_seconds: 20,
          hang_timeout: hang_timeout
        ] ++ engine
      )
    end,
    bank: Chaos.Bank.demo(),
    plan: plan,
    callers: options.callers,
    rate: options.rate,
    pause: options.pause,
    hang: 2 * hang_timeout,
    timeout: 240_000,
    patience: 60,
    memory: 16 * 1024 * 1024,
    log: log
  )

File.rm_rf!(tmp)
IO.puts(["\n", Chaos.describe(account)])
if account.violations != [], do: System.halt(1)
