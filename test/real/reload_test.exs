defmodule VLLM.Real.ReloadTest do
  # New options and the end of a real engine while it has requests.
  use ExUnit.Case

  import VLLM.OSProcess, only: [eventually: 2]
  import VLLM.RealEngine

  alias VLLM.{DemoModel, Error}

  @moduletag :slow
  @moduletag timeout: 1_800_000

  test "a reload loses nothing, one that is refused changes nothing, and a stop waits" do
    llm = DemoModel.start!("demo", max_model_len: 8192, shutdown_timeout: patience())
    assert VLLM.engine_info!(llm).max_model_len == 8192
    old = processes(llm)

    # Each of these two can be answered by one of the engines only.
    long = count(llm, 5000)
    assert {:error, %Error{reason: :invalid_option}} = ask(llm, logprobs: 25)

    reload = Task.async(fn -> VLLM.reload(llm, max_model_len: 4096, max_logprobs: 25) end)
    assert eventually(fn -> match?([%{state: :draining}], VLLM.replicas!(llm)) end, patience())
    assert {:ok, [output]} = ask(llm, logprobs: 25)
    assert [%{logprobs: [logprobs]}] = output.outputs
    assert map_size(logprobs) >= 25
    assert {:ok, [output]} = Task.await(long, patience())
    assert tokens(output) == 5000
    assert :ok = Task.await(reload, patience())
    assert VLLM.engine_info!(llm).max_model_len == 4096
    assert gone?(old)
    assert right?(llm)

    assert {:error, %Error{reason: :model_not_found}} = VLLM.reload(llm, model: "/nowhere/at/all")
    assert VLLM.engine_info!(llm).max_model_len == 4096
    assert {:ok, _} = ask(llm, logprobs: 25)
    assert right?(llm)

    last = processes(llm)
    long = count(llm, 3000)
    stop = Task.async(fn -> VLLM.stop(llm) end)
    assert eventually(fn -> match?({:error, %{reason: :not_running}}, ask(llm)) end, patience())
    assert {:ok, [output]} = Task.await(long, patience())
    assert tokens(output) == 3000
    assert :ok = Task.await(stop, patience())
    assert gone?(last)
  end

  defp ask(llm, options \\ []) do
    VLLM.generate(llm, "The", [max_tokens: 1, timeout: patience()] ++ options)
  end
end
