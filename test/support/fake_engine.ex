defmodule VLLM.FakeEngine do
  @moduledoc """
  Engines around `fake_worker.py`: the real supervision, guard and protocol, and a worker that
  does what the model's name and the prompts tell it.
  """

  @python Path.expand("fake_python", __DIR__)

  @doc "Starts one for the calling process, by default ready at once."
  def start(model \\ "ready", options \\ []),
    do: VLLM.llm(model, [python: @python, nursery: false] ++ options)

  def start!(model \\ "ready", options \\ []),
    do: VLLM.llm!(model, [python: @python, nursery: false] ++ options)

  @doc "The child spec of one for a supervision tree."
  def child_spec(options), do: VLLM.child_spec([python: @python, nursery: false] ++ options)

  @doc "What the fake worker answers to a prompt."
  def ask(llm, prompt, options \\ []) do
    with {:ok, [output]} <- VLLM.generate(llm, prompt, options), do: {:ok, VLLM.text(output)}
  end

  @doc """
  Sends a prompt from a process of its own that hands on the result as `{:answer, result}`. It ends
  with the calling process: what a test leaves in flight holds up no engine and nothing of it is
  told to the next test.
  """
  def ask_in_background(llm, prompt, options \\ []) do
    test = self()
    caller = spawn(fn -> send(test, {:answer, ask(llm, prompt, options)}) end)

    spawn(fn ->
      for pid <- [test, caller], do: Process.monitor(pid)
      receive do: ({:DOWN, _, :process, _, _} -> Process.exit(caller, :kill))
    end)

    caller
  end

  @doc "Returns when the worker holds `count` prompts."
  def await_held(llm, count) do
    case ask(llm, "held") do
      {:ok, text} ->
        unless text == Integer.to_string(count), do: await_held(llm, count)
    end

    :ok
  end

  @doc "The engine's workers (processes) and their programs."
  def workers(llm) do
    {:ok, table, _pid} = VLLM.Engine.Table.lookup(llm)

    for index <- 1..VLLM.Engine.Table.replicas(table) do
      program = with {program, _conn} <- VLLM.Engine.Table.run(table, index), do: program
      {VLLM.Engine.Table.process(table, index), program}
    end
  end

  @doc """
  The worker's process among those of a program, or of a guard, which has others, such as its
  witness and for a moment its sweep, which look like the guard until they begin.
  """
  def worker_pid(%{run_dir: run_dir}), do: worker_pid(VLLM.Footprint.guard(run_dir))

  def worker_pid(guard) do
    import VLLM.OSProcess, only: [descendants: 1, command: 1]

    Enum.find(descendants(guard), fn pid ->
      command = command(pid)
      command =~ ~r/fake_worker|-m\0vllm_bridge\0/ and not (command =~ "guard.py")
    end)
  end

  @doc "Whether a supervisor has no child: of engines or of streams, say."
  def none_below?(supervisor), do: DynamicSupervisor.count_children(supervisor).active == 0

  @doc "How many requests are under way."
  def in_flight(llm) do
    {:ok, table, _pid} = VLLM.Engine.Table.lookup(llm)

    table
    |> VLLM.Engine.Table.workers()
    |> Enum.map(&VLLM.Bridge.Connection.in_flight(&1.conn))
    |> Enum.sum()
  end
end
