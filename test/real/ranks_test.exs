defmodule VLLM.Real.RanksTest do
  # A real engine whose model is split over two processes, also where one of them dies or hangs.
  use ExUnit.Case

  import VLLM.OSProcess, only: [signal: 2]
  import VLLM.RealEngine

  alias VLLM.{DemoModel, Error, Footprint}

  @moduletag :slow
  @moduletag timeout: 1_800_000

  # A busy machine may leave processes without time for seconds.
  @hang_timeout 10_000

  test "a rank that is killed or stopped is found, and a stop that cannot wait leaves nothing" do
    llm =
      DemoModel.start!("demo",
        tensor_parallel_size: 2,
        max_model_len: 8192,
        hang_timeout: @hang_timeout,
        shutdown_timeout: 100,
        max_restarts: 10
      )

    {processes, rank} = ranks(llm)
    lost = count(llm, 8000)
    again = Task.async(fn -> right?(llm, retry: true) end)
    assert signal("KILL", rank)
    assert {:error, %Error{reason: :engine_dead} = error} = Task.await(lost, patience())
    assert Enum.any?(error.details["log"], &(&1 =~ ~r/rank \S+ died: SIGKILL/))
    assert gone?(processes)

    # The engine that comes instead loses one while it loads.
    {processes, rank} = await_starting(llm, 2)
    assert signal("KILL", rank)
    assert gone?(processes)
    assert Task.await(again, patience())

    {processes, rank} = ranks(llm)
    lost = count(llm, 8000)
    assert signal("STOP", rank)
    assert {:error, %Error{reason: :engine_dead} = error} = Task.await(lost, patience())
    assert error.message =~ "hung"
    assert error.details["hung"] == "engine"
    assert gone?(processes)

    {processes, _rank} = ranks(llm)
    segments = Footprint.segments(Keyword.values(processes))
    long = count(llm, 8000)
    assert :ok = VLLM.stop(llm)
    assert {:error, %Error{reason: :shutdown}} = Task.await(long, patience())
    assert gone?(processes)
    for name <- segments, do: refute(File.exists?("/dev/shm/" <> name))
  end

  test "the stages of a pipeline say the model's sentences" do
    llm = DemoModel.start!("demo", pipeline_parallel_size: 2)
    assert DemoModel.wrong_facts(llm) == []
    assert [_first, _second] = Keyword.get_values(processes(llm), :rank)
    assert :ok = VLLM.stop(llm)
  end

  # All processes of the engine that answers, and the second of its ranks. The news of a death may be
  # a moment behind the death.
  defp ranks(llm) do
    assert right?(llm, retry: true)
    processes = processes(llm)
    assert [_first, second] = Keyword.get_values(processes, :rank)
    {processes, second}
  end
end
