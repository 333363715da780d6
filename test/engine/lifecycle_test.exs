defmodule VLLM.Engine.LifecycleTest do
  # Hangs of the real engine with all its processes.
  use ExUnit.Case

  import VLLM.FakeEngine, only: [in_flight: 1, workers: 1, worker_pid: 1]
  import VLLM.OSProcess

  alias VLLM.{DemoModel, Error}

  @moduletag :slow
  @moduletag timeout: 1_800_000

  # How long anything here may take on a machine that is slow and busy.
  @patience 600_000

  # A busy machine may leave processes without time for seconds.
  @hang_timeout 15_000

  # It takes seconds, however fast the machine.
  @long [max_tokens: 5_000, ignore_eos: true, temperature: 0.0]

  test "a worker and an EngineCore that were stopped are found and replaced" do
    llm = DemoModel.start!("demo", max_model_len: 8192, hang_timeout: @hang_timeout)
    find_hung(llm, "worker", worker_pid(program(llm)))
    find_hung(llm, "engine", named(llm, "EngineCore"))
    VLLM.stop(llm)
  end

  # The answer to what is in flight says who hangs, and nothing of the run is left.
  defp find_hung(llm, who, victim) do
    tree = tree(llm)
    assert victim, "not among #{inspect(Enum.map(tree, &command/1))}"
    long(llm)
    assert signal("STOP", victim)

    assert_receive {:long, {:error, %Error{reason: :engine_dead} = error}}, @patience
    assert error.message =~ "hung"
    assert error.details["hung"] == who
    assert gone?(tree)
    assert :ok = VLLM.await_ready(llm, @patience)
    assert right?(llm)
  end

  # A request that takes long, whose result comes as `{:long, result}`.
  defp long(llm) do
    test = self()
    call = Keyword.put(@long, :timeout, @patience)
    spawn_link(fn -> send(test, {:long, VLLM.generate(llm, "Count:", call)}) end)
    assert eventually(fn -> in_flight(llm) == 1 end, @patience)
  end

  defp right?(llm) do
    {prompt, expected} = hd(DemoModel.facts())
    [output] = VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64, timeout: @patience)
    VLLM.text(output) == expected
  end

  defp program(llm) do
    [{_worker, program}] = workers(llm)
    program
  end

  defp tree(llm) do
    guard = program(llm).os_pid
    [guard | descendants(guard)]
  end

  # vLLM names its processes.
  defp named(llm, name), do: Enum.find(tree(llm), &(command(&1) =~ name))

  defp gone?(tree), do: eventually(fn -> not Enum.any?(tree, &alive?/1) end, @patience)
end
