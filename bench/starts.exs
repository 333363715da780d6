# How long engines take to start, each round beside `vllm.LLM(...)` constructed in a fresh Python with
# the same options: the first `llm!` of a BEAM, further ones, those without a nursery, and the time
# from SIGKILL of a process until the engine serves again. And what the memory of forked processes is.
#
#     mix run bench/starts.exs [ROUNDS]

for file <- ~w(os_process demo_model footprint) do
  path = Path.expand("../test/support/#{file}.ex", __DIR__)
  unless Mix.env() == :test, do: Code.require_file(path)
end

alias VLLM.{DemoModel, Footprint, OSProcess}

Logger.configure(level: :none)
rounds = String.to_integer(List.first(System.argv()) || "3")
options = [enforce_eager: true, kv_cache_memory_bytes: 268_435_456, name: nil, max_restarts: 100]
{:ok, python} = VLLM.Python.executable()

seconds = fn fun ->
  {time, result} = :timer.tc(fun)
  {time / 1_000_000, result}
end

# The interpreter's start and the imports count, the end of the process does not.
construct = """
from vllm import LLM
import os, sys
if __name__ == "__main__":
    LLM(#{inspect(DemoModel.path())}, enforce_eager=True, kv_cache_memory_bytes=268435456)
    print("constructed", file=sys.__stderr__, flush=True)
    os.read(0, 1)
    os._exit(0)
"""

file = Path.join(System.tmp_dir!(), "construct-#{System.pid()}.py")
File.write!(file, construct)

peer = fn ->
  port =
    Port.open({:spawn_executable, python}, [
      :binary,
      :stderr_to_stdout,
      args: [file],
      env: [{'HF_HUB_OFFLINE', '1'}]
    ])

  wait = fn wait, said ->
    receive do
      {^port, {:data, data}} ->
        unless said <> data =~ "constructed", do: wait.(wait, said <> data)
    end
  end

  {time, _} = seconds.(fn -> wait.(wait, "") end)
  {:os_pid, pid} = Port.info(port, :os_pid)
  family = OSProcess.descendants(pid)
  Port.command(port, "x")

  true =
    OSProcess.eventually(fn -> not Enum.any?([pid | family], &OSProcess.alive?/1) end, 60_000)

  time
end

forget_nurseries = fn ->
  for {_, pid, _, _} <- DynamicSupervisor.which_children(VLLM.NurserySupervisor),
      do: DynamicSupervisor.terminate_child(VLLM.NurserySupervisor, pid)
end

start = fn more ->
  {time, llm} = seconds.(fn -> VLLM.llm!(DemoModel.path(), options ++ more) end)
  {time, llm}
end

roles = fn llm ->
  {:ok, table, _} = VLLM.Engine.Table.lookup(llm)
  {program, _} = VLLM.Engine.Table.run(table, 1)
  Footprint.roles(Footprint.guard(program.run_dir))
end

serve = fn serve, llm ->
  case VLLM.generate(llm, "The capital of France is", max_tokens: 4, temperature: 0.0) do
    {:ok, _} -> :ok
    {:error, _} -> serve.(serve, llm)
  end
end

after_death = fn llm, role ->
  pid = roles.(llm)[role]

  {time, :ok} =
    seconds.(fn ->
      true = OSProcess.signal("KILL", pid)
      serve.(serve, llm)
    end)

  time
end

measured =
  for _ <- 1..rounds do
    base = peer.()
    forget_nurseries.()
    {first, llm} = start.([])
    VLLM.stop(llm)
    {further, llm} = start.([])
    core = after_death.(llm, :engine_core)
    worker = after_death.(llm, :worker)
    VLLM.stop(llm)
    {plain, llm} = start.(nursery: false)
    VLLM.stop(llm)
    row = %{peer: base, first: first, further: further, core: core, worker: worker, plain: plain}
    IO.inspect(Map.new(row, fn {name, time} -> {name, Float.round(time, 2)} end))
    row
  end

median = fn values -> values |> Enum.sort() |> Enum.at(div(length(values), 2)) end
show = &:erlang.float_to_binary(&1, decimals: 2)

for {name, text} <- [
      peer: "vllm.LLM(...) in a fresh Python",
      first: "the first llm!",
      further: "a further llm!",
      plain: "llm! with nursery: false",
      core: "from SIGKILL of EngineCore until service",
      worker: "from SIGKILL of the worker until service"
    ] do
  times = Enum.map(measured, & &1[name])
  ratio = median.(Enum.map(measured, &(&1[name] / &1.peer)))

  IO.puts(
    "#{String.pad_trailing(text, 44)} median #{show.(median.(times))} s, ratio #{show.(ratio)}"
  )
end

# What a process has for itself, and its share of what it has with others.
memory = fn pid ->
  text = File.read!("/proc/#{pid}/smaps_rollup")

  for name <- ["Rss", "Pss", "Private_Dirty"], into: %{} do
    [_, kilobytes] = Regex.run(~r/^#{name}:\s+(\d+) kB/m, text)
    {name, div(String.to_integer(kilobytes), 1024)}
  end
end

{_, forked} = start.([])
for {role, pid} <- roles.(forked), do: IO.inspect(memory.(pid), label: "forked #{role}, MiB")
VLLM.stop(forked)
{_, started} = start.(nursery: false)
for {role, pid} <- roles.(started), do: IO.inspect(memory.(pid), label: "started #{role}, MiB")
VLLM.stop(started)
File.rm!(file)
