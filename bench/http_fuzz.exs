# Schemathesis against the admin API: requests that its description allows and that it does not, to a
# server whose engines, jobs and questions are made-up programs. Ends with status 1 where an answer is not as
# described, is a fault of the server's (5xx) or does not come, and where files or processes are left open.
#
#     python3 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install schemathesis==4.32.5
#     MIX_ENV=test mix run bench/http_fuzz.exs --schemathesis /tmp/fuzz/bin/schemathesis --examples 600
#
#   --examples   for each operation, of those that start no process (600)
#   --heavy      for each of those that do (10)
#   --seed       the same seed, the same requests (1)

alias VLLM.{HTTPFuzz, OSProcess}

{options, [], []} =
  OptionParser.parse(System.argv(),
    strict: [schemathesis: :string, examples: :integer, heavy: :integer, seed: :integer]
  )

schemathesis = options[:schemathesis] || raise "Where is it? --schemathesis PATH"
seed = to_string(options[:seed] || 1)

Logger.configure(level: :none)
folder = Path.join(System.tmp_dir!(), "http-fuzz-#{System.pid()}")
Application.put_env(:ex_vllm, :data_dir, folder)
HTTPFuzz.fake()

files = fn -> length(File.ls!("/proc/self/fd")) end
processes = fn -> length(OSProcess.descendants(String.to_integer(System.pid()))) end

# What is opened once stays open.
HTTPFuzz.run(schemathesis, ["--max-examples", "1", "--phases", "examples"])
before = {files.(), processes.()}

heavy = "^/api/v1/(models|quantize/(options|estimate|compare))"

statuses =
  for {which, examples} <- [
        {["--exclude-path-regex", heavy], options[:examples] || 600},
        {["--include-path-regex", heavy], options[:heavy] || 10}
      ] do
    arguments = ["--max-examples", to_string(examples), "--seed", seed]
    %{text: text, status: status} = HTTPFuzz.run(schemathesis, arguments ++ which)
    IO.puts(text)
    status
  end

File.rm_rf!(folder)
left = {files.(), processes.()}
IO.puts("open files and processes before #{inspect(before)}, after #{inspect(left)}")
{files_before, processes_before} = before
{files_left, processes_left} = left
whole? = files_left <= files_before and processes_left <= processes_before
if Enum.any?(statuses, &(&1 != 0)) or not whole?, do: System.halt(1)
