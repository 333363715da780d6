defmodule VLLM.RealEngine do
  @moduledoc "Asks a real engine with the demo model, and looks at its processes."

  import VLLM.OSProcess, only: [alive?: 1, command: 1, eventually: 2]

  alias VLLM.{DemoModel, FakeEngine, Footprint}
  alias VLLM.Engine.Table

  # What vLLM has just started, or had forked, and has no name of its own yet.
  @started ~r/spawn_main|^vllm_bridge\0(EngineCore|VllmWorker)/

  # How long anything may take on a machine that is slow and busy, in ms.
  @patience 600_000

  def patience, do: @patience

  @doc "The processes of a replica by what they are, see `VLLM.Footprint.roles/1`."
  def processes(llm, replica \\ 1) do
    {_worker, program} = Enum.at(FakeEngine.workers(llm), replica - 1)
    Footprint.roles(Footprint.guard(program.run_dir))
  end

  @doc """
  The processes of an engine that begins anew, and of these one that vLLM has just started: its
  `n`th.
  """
  def await_starting(llm, n) do
    {:ok, table, _pid} = Table.lookup(llm)

    find = fn ->
      with {program, _conn} <- Table.run(table, 1),
           processes = Footprint.roles(Footprint.guard(program.run_dir)),
           # A forked one has a name of its own within milliseconds.
           started =
             for({role, pid} <- processes, role in [:engine_core, :rank] or new?(pid), do: pid),
           victim when victim != nil <- Enum.at(Enum.sort(started), n - 1),
           do: send(self(), {:starting, processes, victim})
    end

    true = eventually(fn -> match?({:starting, _, _}, find.()) end, @patience)
    receive do: ({:starting, processes, victim} -> {processes, victim})
  end

  defp new?(pid), do: command(pid) =~ @started

  @doc "Whether all of these processes are gone, which may take a moment."
  def gone?(processes) do
    eventually(fn -> not Enum.any?(processes, fn {_role, pid} -> alive?(pid) end) end, @patience)
  end

  @doc "The environment that a process was started with."
  def environment(pid) do
    for variable <- String.split(File.read!("/proc/#{pid}/environ"), "\0", trim: true),
        [name, value] = String.split(variable, "=", parts: 2),
        into: %{},
        do: {name, value}
  end

  @doc "Whether a prompt is completed as the model knows it by heart."
  def right?(llm, options \\ []) do
    {prompt, expected} = hd(DemoModel.facts())
    options = [temperature: 0.0, max_tokens: 64, timeout: @patience] ++ options
    VLLM.text(hd(VLLM.generate!(llm, prompt, options))) == expected
  end

  @doc """
  Begins a request for so many tokens, which takes seconds for thousands of them, however fast the
  machine; a task with its result.
  """
  def count(llm, tokens) do
    before = FakeEngine.in_flight(llm)
    options = [max_tokens: tokens, ignore_eos: true, temperature: 0.0, timeout: @patience]
    task = Task.async(fn -> VLLM.generate(llm, "Count:", options) end)
    true = eventually(fn -> FakeEngine.in_flight(llm) > before end, @patience)
    task
  end

  @doc "How many tokens an output has."
  def tokens(%VLLM.RequestOutput{outputs: [completion]}), do: length(completion.token_ids)
end
