# Random requests over HTTP. Ends with status 1 where an answer is a fault of the server's (5xx), is not as described (of
# the admin API) or does not come, and where files, processes of the system or of the BEAM are left.
#
#     MIX_ENV=test mix run bench/http_fuzz.exs admin
#     MIX_ENV=test mix run bench/http_fuzz.exs generate|embed [--schemathesis]
#     MIX_ENV=test mix run bench/http_fuzz.exs bytes
#
# `admin`: what the description of the admin API allows, and what it does not, of a server whose engines, jobs and
# questions are made-up programs. `generate`, `embed`: the same of the paths of OpenAI's API, by the description of
# vLLM's own app, on the demo model, or without Schemathesis with any values for the options that are known. `bytes`: requests of which bytes are changed, and which get to no engine.
#
#   --examples   for each operation (600), or in all (10,000, without Schemathesis)
#   --heavy      for each operation of the admin API that starts a process (10)
#   --seed       the same seed, the same requests (1)

alias VLLM.{HTTPFuzz, OSProcess}

{options, [what]} =
  OptionParser.parse!(System.argv(),
    strict: [schemathesis: :boolean, examples: :integer, heavy: :integer, seed: :integer]
  )

seed = options[:seed] || 1
Logger.configure(level: :none)
folder = Path.join(System.tmp_dir!(), "http-fuzz-#{System.pid()}")
Application.put_env(:ex_vllm, :data_dir, folder)

schemathesis = HTTPFuzz.schemathesis()

amount = &["--max-examples", to_string(&1), "--seed", to_string(seed)]
# What is opened once stays open.
once = ["--max-examples", "1"]

# What makes all there is that stays, and what each run then says: 0 for none to find.
{first, runs} =
  case what do
    "admin" ->
      HTTPFuzz.fake()
      heavy = HTTPFuzz.heavy()
      ask = &HTTPFuzz.admin(schemathesis, &1)

      {fn -> ask.(once) end,
       [
         fn -> ask.(amount.(options[:examples] || 600) ++ ["--exclude-path-regex", heavy]) end,
         fn -> ask.(amount.(options[:heavy] || 10) ++ ["--include-path-regex", heavy]) end
       ]}

    "bytes" ->
      :rand.seed(:exsss, seed)

      {fn -> HTTPFuzz.bytes(100) end,
       [
         fn ->
           statuses = HTTPFuzz.bytes(options[:examples] || 10_000)
           IO.inspect(statuses, label: "answers")
           Enum.count(statuses, fn {status, _count} -> status >= 500 end)
         end
       ]}

    kind ->
      own = %{"generate" => [], "embed" => [runner: "pooling", convert: "embed"]}[kind]
      # Short texts, so that nobody waits for those of others.
      llm = VLLM.DemoModel.start!("demo", [max_model_len: 128, max_queue: 1024] ++ own)
      :rand.seed(:exsss, seed)

      bodies = fn count ->
        {statuses, faults} = HTTPFuzz.bodies(llm, kind, count)
        IO.inspect(statuses, label: "answers")
        for fault <- faults, do: IO.inspect(fault, printable_limit: 1_000)
        length(faults)
      end

      by_schema = fn arguments -> HTTPFuzz.engine(schemathesis, arguments, llm) end

      if options[:schemathesis],
        do:
          {fn -> by_schema.(once) end, [fn -> by_schema.(amount.(options[:examples] || 600)) end]},
        else: {fn -> bodies.(100) end, [fn -> bodies.(options[:examples] || 10_000) end]}
  end

there = fn ->
  %{
    files: length(File.ls!("/proc/self/fd")),
    processes: length(OSProcess.descendants(String.to_integer(System.pid()))),
    beam: length(Process.list())
  }
end

first.()
before = there.()
said = for run <- runs, do: run.()
File.rm_rf!(folder)
# Where the last connections end.
OSProcess.eventually(fn -> Enum.all?(there.(), fn {name, count} -> count <= before[name] end) end)
left = there.()
IO.puts("before: #{inspect(before)}, after: #{inspect(left)}")
more? = Enum.any?(left, fn {name, count} -> count > before[name] end)
if more? or Enum.any?(said, &(&1 != 0)), do: System.halt(1)
