# Hostile frames against both sides: frames of a real session, changed at random,
# into what reads a worker's frames here, and into a worker's parser, decoder and
# server (python/tests/fuzz.py). It ends with status 1 at the first frame that is
# neither a message nor malformed, for which more memory is taken than its size
# warrants, or (here) which makes an atom.
#
#     mix run bench/fuzz.exs --inputs 1000000 --seed 1
#
# `--inputs` counts for each side. A seed gives the same frames again.

Code.require_file("test/support/fuzz.ex")

{options, [], []} = OptionParser.parse(System.argv(), strict: [inputs: :integer, seed: :integer])
inputs = Keyword.get(options, :inputs, 1_000_000)
seed = Keyword.get_lazy(options, :seed, fn -> :rand.uniform(1_000_000_000) end)
batch = 1_000

# In words, of a process that reads a batch of frames, the largest of which has some 20 KB: what a
# frame becomes is a fraction of this, and what a frame may announce (4 GiB) is not.
max_heap = 4_000_000

peak = fn ->
  [_, kilobytes] = Regex.run(~r/VmHWM:\s+(\d+) kB/, File.read!("/proc/self/status"))
  div(String.to_integer(kilobytes), 1024)
end

run = fn corpus, number, count ->
  # The frame that is being read is told before it is: it would die with its process.
  current = :atomics.new(1, [])

  {pid, monitor} =
    :erlang.spawn_opt(
      fn ->
        :rand.seed(:exsss, {seed, number, 0})

        counts =
          for index <- 1..count, reduce: %{accepted: 0, rejected: 0} do
            counts ->
              frame = VLLM.Fuzz.frame(corpus)
              :atomics.put(current, 1, index)
              Map.update!(counts, VLLM.Fuzz.read(frame), &(&1 + 1))
          end

        exit({:done, counts})
      end,
      [:monitor, max_heap_size: %{size: max_heap, kill: true, error_logger: false}]
    )

  receive do
    {:DOWN, ^monitor, :process, ^pid, {:done, counts}} ->
      counts

    {:DOWN, ^monitor, :process, ^pid, reason} ->
      :rand.seed(:exsss, {seed, number, 0})
      frames = for _ <- 1..:atomics.get(current, 1), do: VLLM.Fuzz.frame(corpus)
      IO.puts("seed #{seed}: the process that read this frame ended with #{inspect(reason)}:")
      IO.puts(Base.encode16(List.last(frames), case: :lower))
      System.halt(1)
  end
end

Logger.configure(level: :none)
corpus = VLLM.Fuzz.corpus(:from_worker)
# Once before it counts: code that is loaded brings its atoms.
run.(corpus, 0, batch)
atoms = :erlang.system_info(:atom_count)
before = peak.()

{microseconds, counts} =
  :timer.tc(fn ->
    for number <- 1..div(inputs + batch - 1, batch), reduce: %{accepted: 0, rejected: 0} do
      counts ->
        count = min(batch, inputs - (number - 1) * batch)
        Map.merge(counts, run.(corpus, number, count), fn _, a, b -> a + b end)
    end
  end)

new_atoms = :erlang.system_info(:atom_count) - atoms

IO.puts("""
Elixir: seed #{seed}, #{tuple_size(corpus)} recorded frames
inputs #{inputs}: accepted #{counts.accepted}, rejected #{counts.rejected}
time #{Float.round(microseconds / 1_000_000, 1)} s
peak memory of the VM #{peak.()} MiB (#{before} MiB before)
new atoms #{new_atoms}
""")

if new_atoms > 0, do: System.halt(1)

{:ok, python} = VLLM.Python.executable()

{_, status} =
  System.cmd(python, ["python/tests/fuzz.py", "#{inputs}", "#{seed}"],
    env: %{"PYTHONPATH" => VLLM.Python.path()},
    stderr_to_stdout: true,
    into: IO.stream()
  )

System.halt(status)
