defmodule VLLM.Real.RequestsTest do
  # What requests are promised, on the real engine: run once more after a death,
  # ended while they wait, kept with their replica.
  use ExUnit.Case

  import VLLM.FakeEngine, only: [in_flight: 1]
  import VLLM.OSProcess
  import VLLM.RealEngine, only: [processes: 1]

  alias VLLM.{Delta, DemoModel, Error}

  @moduletag :slow
  @moduletag timeout: 600_000

  @endless [max_tokens: 8000, ignore_eos: true, temperature: 0.0]

  test "requests in flight when the worker, or vLLM under it, is ended are run once more" do
    llm = DemoModel.start!("demo", max_model_len: 8192)
    # What it knows by heart, and then nonsense until it is long enough to be interrupted.
    facts = Enum.take(DemoModel.facts(), 2)
    prompts = Enum.map(facts, &elem(&1, 0))
    long = [temperature: 0.0, ignore_eos: true, max_tokens: 600]

    # A vLLM that is asked to end passes on what it has as if that were all.
    for {signal, victim} <- [{"KILL", :worker}, {"KILL", :engine_core}, {"TERM", :engine_core}] do
      tasks =
        for prompt <- prompts do
          Task.async(fn -> VLLM.generate(llm, prompt, [retry: true] ++ long) end)
        end

      streams =
        for prompt <- prompts do
          # They have begun when their first delta is here.
          VLLM.stream_to(llm, prompt, self(), [retry: true] ++ @endless)
        end

      for ref <- streams, do: assert_receive({:vllm, ^ref, %Delta{}}, 60_000)
      assert signal(signal, processes(llm)[victim])

      # What has been read is not said twice.
      assert %{engine_dead: 2} = Enum.frequencies_by(ends(streams), & &1.reason)

      for {{_, right}, {:ok, [output]}} <- Enum.zip(facts, Task.await_many(tasks, 240_000)) do
        assert String.starts_with?(VLLM.text(output), right)
        assert length(hd(output.outputs).token_ids) == 600
      end
    end

    assert in_flight(llm) == 0
    VLLM.stop(llm)
  end

  test "what vLLM has not begun with is ended at its queue_timeout, or waits by its priority" do
    llm =
      DemoModel.start!("demo",
        scheduling_policy: "priority",
        max_num_seqs: 1,
        max_num_batched_tokens: 16,
        max_model_len: 8192
      )

    ref = VLLM.stream_to(llm, "Count:", self(), @endless)
    assert_receive {:vllm, ^ref, %Delta{}}, 60_000

    for ask <- [&VLLM.generate/3, &one_of_stream/3] do
      assert {:error, %Error{reason: :queue_timeout} = error} =
               ask.(llm, "The", queue_timeout: 300, max_tokens: 1)

      assert error.details["option"] == "queue_timeout"
    end

    # The one that is computed is none the worse for it.
    flush(ref)
    assert_receive {:vllm, ^ref, %Delta{}}, 60_000

    tasks =
      for priority <- [5, 1] do
        Task.async(fn ->
          {:ok, _} = VLLM.generate(llm, "The", priority: priority, max_tokens: 1)
          System.monotonic_time()
        end)
      end

    assert eventually(fn -> waiting(llm) == 2 end, 60_000)
    :ok = VLLM.cancel(ref)
    assert [late, early] = Task.await_many(tasks, 60_000)
    assert early < late
    assert eventually(fn -> in_flight(llm) == 0 end)

    # A prompt of hundreds of steps: its first token comes long after the queue_timeout.
    prompt = %{prompt_token_ids: for(n <- 1..8000, do: 7 + rem(n, 90))}
    assert {:ok, [output]} = VLLM.generate(llm, prompt, queue_timeout: 1_500, max_tokens: 1)
    assert length(output.prompt_token_ids) == 8000
    VLLM.stop(llm)
  end

  test "prompts that begin alike find what their replica has computed" do
    llm = DemoModel.start!("demo", replicas: 2)
    # Longer than the part that prompts are told apart by, and several blocks of the cache.
    beginnings = for n <- 1..6, do: String.duplicate("#{n} is the number of this text. ", 12)

    for beginning <- beginnings do
      [first] = VLLM.generate!(llm, beginning <> "One", max_tokens: 1)
      [second] = VLLM.generate!(llm, beginning <> "Two", max_tokens: 1)
      assert first.num_cached_tokens < second.num_cached_tokens
      assert second.num_cached_tokens > length(second.prompt_token_ids) / 2
    end

    # Both replicas had some of them.
    {:ok, table, _pid} = VLLM.Engine.Table.lookup(llm)
    workers = for worker <- VLLM.Engine.Table.workers(table), do: {0, worker}
    call = VLLM.Engine.Call.new(%{timeout: :infinity})
    choose = &VLLM.Engine.Balancer.choose(workers, %{"prompt" => &1}, call).index
    sessions = for n <- 1..20, do: "session #{n}"
    assert sessions |> Enum.map(choose) |> Enum.uniq() |> Enum.sort() == [1, 2]
    VLLM.stop(llm)
  end

  defp one_of_stream(llm, prompt, options),
    do: llm |> VLLM.stream(prompt, options) |> Enum.to_list() |> List.last()

  # As of the last step of the request that is computed.
  defp waiting(llm) do
    {:ok, figures} = VLLM.metrics(llm)
    figures["num_requests_waiting"]
  end

  # The errors that streams end with. All that comes is read: a receiver with a full mailbox is
  # given no more.
  defp ends([]), do: []

  defp ends(streams) do
    assert_receive {:vllm, ref, event}, 60_000

    case event do
      %Delta{} -> ends(streams)
      {:error, error} -> [error | ends(List.delete(streams, ref))]
    end
  end

  defp flush(ref) do
    receive do
      {:vllm, ^ref, _} -> flush(ref)
    after
      0 -> :ok
    end
  end
end
