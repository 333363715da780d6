defmodule VLLM.Real.LifecycleTest do
  # What hangs and what dies of a real engine with all its processes, and what only takes long.
  use ExUnit.Case

  import VLLM.OSProcess, only: [signal: 2]
  import VLLM.RealEngine

  alias VLLM.{DemoModel, Error}

  @moduletag :slow
  @moduletag timeout: 1_800_000

  # A busy machine may leave processes without time for seconds.
  @hang_timeout 10_000

  setup_all do
    llm =
      DemoModel.start!("demo",
        max_model_len: 8192,
        # So that a prompt takes many steps, and samples come one after another.
        max_num_batched_tokens: 16,
        max_num_seqs: 1,
        hang_timeout: @hang_timeout,
        max_restarts: 1000,
        max_seconds: 1
      )

    on_exit(fn -> VLLM.stop(llm) end)
    %{llm: llm}
  end

  test "a long prompt and thousands of tokens are no hang", %{llm: llm} do
    before = processes(llm)
    takes_long(llm, 1)
    assert processes(llm) == before
    assert right?(llm)
  end

  # One request, of which more is asked until it takes far longer than a hang may.
  defp takes_long(llm, samples) do
    prompt = %{prompt_token_ids: for(n <- 1..4000, do: 7 + rem(n, 90))}
    options = [n: samples, max_tokens: 2000, ignore_eos: true, temperature: 1.0]
    started = System.monotonic_time(:millisecond)
    [output] = VLLM.generate!(llm, prompt, [timeout: patience()] ++ options)
    took = System.monotonic_time(:millisecond) - started

    assert for(completion <- output.outputs, do: length(completion.token_ids)) ==
             List.duplicate(2000, samples)

    if took < 2 * @hang_timeout,
      do: takes_long(llm, ceil(samples * 2.2 * @hang_timeout / took) |> max(samples + 1))
  end

  for {name, role, who} <- [{"worker", :worker, "worker"}, {"EngineCore", :engine_core, "engine"}] do
    test "a #{name} that was stopped is found and replaced", %{llm: llm} do
      processes = processes(llm)
      request = count(llm, 8000)
      assert signal("STOP", processes[unquote(role)])

      # The answer says who hangs.
      assert {:error, %Error{reason: :engine_dead} = error} = Task.await(request, patience())
      assert error.message =~ "hung"
      assert error.details["hung"] == unquote(who)
      assert_replaced(llm, processes)
    end
  end

  for {name, role, signal, words} <- [
        {"EngineCore", :engine_core, "SEGV", "SIGSEGV"},
        {"EngineCore", :engine_core, "ABRT", "SIGABRT"},
        {"worker", :worker, "TERM", "signal 15"}
      ] do
    test "a #{name} that ends by SIG#{signal} is noticed and replaced", %{llm: llm} do
      processes = processes(llm)
      victim = processes[unquote(role)]
      # Its memory is nobody's in a test.
      assert {_, 0} = System.cmd("prlimit", ["--core=0", "--pid", "#{victim}"])
      request = count(llm, 8000)
      assert signal(unquote(signal), victim)

      # The answer says what it died of.
      assert {:error, %Error{reason: :engine_dead} = error} = Task.await(request, patience())
      assert Enum.join([error.message | error.details["log"]], "\n") =~ unquote(words)
      assert_replaced(llm, processes)
    end
  end

  test "an EngineCore that is killed while it starts is tried again", %{llm: llm} do
    processes = processes(llm)
    assert signal("KILL", processes[:engine_core])
    assert gone?(processes)
    {processes, engine_core} = await_starting(llm, 1)
    assert signal("KILL", engine_core)
    assert_replaced(llm, processes)
  end

  defp assert_replaced(llm, processes) do
    assert gone?(processes)
    assert :ok = VLLM.await_ready(llm, patience())
    assert right?(llm)
  end
end
