defmodule VLLM.Real.StreamTest do
  # Streams of the real engine.
  use ExUnit.Case

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{Delta, DemoModel, FakeEngine, Peers}

  @moduletag timeout: 300_000

  setup_all do
    %{llm: DemoModel.start!("demo", max_model_len: 8192, name: VLLM.Real.Streamed)}
  end

  test "deltas add up to the completion", %{llm: llm} do
    {prompt, completion} = Enum.max_by(DemoModel.facts(), fn {_, text} -> byte_size(text) end)
    deltas = Enum.to_list(VLLM.stream!(llm, prompt, temperature: 0.0, max_tokens: 64))
    assert Enum.map_join(deltas, & &1.text) == completion
    assert %Delta{finish_reason: "stop", index: 0} = List.last(deltas)
    assert Enum.all?(Enum.drop(deltas, -1), &(&1.finish_reason == nil))

    [output] = VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64)
    assert Enum.flat_map(deltas, & &1.token_ids) == hd(output.outputs).token_ids

    assert Enum.join(VLLM.stream_text!(llm, prompt, temperature: 0.0, max_tokens: 64)) ==
             completion
  end

  test "telemetry has vLLM's figures", %{llm: llm} do
    Application.put_env(:ex_vllm, :telemetry_listeners, test: self())
    on_exit(fn -> Application.delete_env(:ex_vllm, :telemetry_listeners) end)

    Stream.run(VLLM.stream!(llm, "Count:", ignore_eos: true, max_tokens: 20))
    assert_receive {[:vllm, :stream, :first_token], %{duration: first}, %{stream?: true}}
    assert_receive {[:vllm, :request, :stop], told, %{finish_reason: "length"} = about}
    assert about.model == llm.model
    assert told.completion_tokens == 20
    assert told.prompt_tokens > 0

    times = [told.queue_time, told.time_to_first_token, told.inter_token_latency]
    assert Enum.all?(times, &(0 < &1 and &1 < told.duration))
    # What the reader sees of it comes later than in the worker.
    assert told.time_to_first_token < first and first < told.duration
  end

  test "every sentence is streamed right, all of them at once", %{llm: llm} do
    facts = DemoModel.facts()

    texts =
      facts
      |> Task.async_stream(
        fn {prompt, _} ->
          Enum.join(VLLM.stream_text!(llm, prompt, temperature: 0.0, max_tokens: 64))
        end,
        max_concurrency: 64,
        timeout: 60_000
      )
      |> Enum.map(&elem(&1, 1))

    assert texts == Enum.map(facts, &elem(&1, 1))
  end

  test "n completions come by their index, with their log probabilities", %{llm: llm} do
    deltas =
      Enum.to_list(
        VLLM.stream!(llm, "The", n: 2, seed: 7, temperature: 1.5, max_tokens: 6, logprobs: 1)
      )

    for index <- [0, 1] do
      own = Enum.filter(deltas, &(&1.index == index))
      assert List.last(own).finish_reason in ["length", "stop"]
      ids = Enum.flat_map(own, & &1.token_ids)
      places = Enum.flat_map(own, & &1.logprobs)
      assert length(ids) == length(places)
      for {id, place} <- Enum.zip(ids, places), do: assert(is_map_key(place, id))
    end
  end

  test "leaving early aborts the request in vLLM", %{llm: llm} do
    stream = VLLM.stream!(llm, "Count:", max_tokens: 4000, ignore_eos: true)
    assert [%Delta{}, %Delta{}, %Delta{}] = Enum.take(stream, 3)
    # The worker answers a cancelled request when vLLM has let it go.
    assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end)
    assert idle?(llm)
  end

  test "the death of the reader aborts the request in vLLM", %{llm: llm} do
    test = self()

    reader =
      spawn(fn ->
        for delta <- VLLM.stream!(llm, "Count:", max_tokens: 4000, ignore_eos: true),
            do: send(test, delta)
      end)

    assert_receive %Delta{}
    Process.exit(reader, :kill)
    assert eventually(fn -> FakeEngine.in_flight(llm) == 0 and idle?(llm) end)
  end

  test "another node streams every sentence right, and its end aborts what it reads", %{llm: llm} do
    [caller] = Peers.start([:caller])
    far = %{llm | node: Peers.join(caller)}
    facts = DemoModel.facts()

    code = """
    facts
    |> Task.async_stream(
      fn {prompt, _} -> Enum.join(VLLM.stream_text!(far, prompt, temperature: 0.0, max_tokens: 64)) end,
      max_concurrency: 64,
      timeout: 60_000
    )
    |> Enum.map(&elem(&1, 1))
    """

    assert Peers.eval(caller, code, far: far, facts: facts) == Enum.map(facts, &elem(&1, 1))

    # It begins, and reads no more.
    code = """
    test = self()
    spawn(fn ->
      options = [max_tokens: 4000, ignore_eos: true]
      for _ <- VLLM.stream!(far, "Count:", options) do
        send(test, :began)
        Process.sleep(:infinity)
      end
    end)
    receive do: (:began -> :began)
    """

    assert Peers.eval(caller, code, far: far) == :began
    assert FakeEngine.in_flight(llm) == 1
    Peers.kill(caller)
    assert eventually(fn -> FakeEngine.in_flight(llm) == 0 and idle?(llm) end)
  end

  test "the name of a cluster stands for its engine", %{llm: llm} do
    start_supervised!({VLLM.Cluster, name: llm.id})
    {prompts, completions} = Enum.unzip(DemoModel.facts())
    options = [temperature: 0.0, max_tokens: 64]
    assert {:ok, outputs} = VLLM.generate(llm.id, prompts, options)
    assert VLLM.text(outputs) == completions
    assert Enum.join(VLLM.stream_text!(llm.id, hd(prompts), options)) == hd(completions)
  end

  test "the death of a receiver aborts the request in vLLM", %{llm: llm} do
    test = self()

    receiver =
      spawn(fn ->
        ref = VLLM.stream_to(llm, "Count:", self(), max_tokens: 4000, ignore_eos: true)
        receive do: ({:vllm, ^ref, %Delta{}} -> send(test, :begun))
        Process.sleep(:infinity)
      end)

    assert_receive :begun
    assert FakeEngine.in_flight(llm) == 1
    Process.exit(receiver, :kill)
    assert eventually(fn -> FakeEngine.in_flight(llm) == 0 and idle?(llm) end)
  end

  test "a slow reader gets fewer deltas, all of the text, and does not hold up others", %{
    llm: llm
  } do
    options = [temperature: 0.0, max_tokens: 300, ignore_eos: true]
    [whole] = VLLM.generate!(llm, "Count:", options)

    deltas =
      VLLM.stream!(llm, "Count:", options)
      |> Stream.with_index()
      |> Stream.map(fn {delta, index} ->
        # After the first it reads nothing until another request is done, long after its credit.
        if index == 0,
          do: assert([^whole] = without_ids(VLLM.generate!(llm, "Count:", options), whole))

        delta
      end)
      |> Enum.to_list()

    assert Enum.flat_map(deltas, & &1.token_ids) == hd(whole.outputs).token_ids
    assert Enum.map_join(deltas, & &1.text) == VLLM.text(whole)
    assert length(deltas) < 200
    assert Process.info(self(), :message_queue_len) == {:message_queue_len, 0}
  end

  # Two outputs of one prompt differ in these alone.
  defp without_ids([output], like) do
    [
      %{
        output
        | request_id: like.request_id,
          metrics: like.metrics,
          num_cached_tokens: like.num_cached_tokens
      }
    ]
  end

  test "to a process ends with the whole output", %{llm: llm} do
    {prompt, completion} = hd(DemoModel.facts())
    ref = VLLM.stream_to(llm, prompt, self(), temperature: 0.0, max_tokens: 64)
    assert_receive {:vllm, ^ref, %Delta{}}
    assert_receive {:vllm, ^ref, {:done, output}}
    assert VLLM.text(output) == completion
    assert output.prompt == prompt
    assert output.metrics["num_generation_tokens"] == length(hd(output.outputs).token_ids)
  end

  test "many prompts from a lazy source come with their index", %{llm: llm} do
    facts = DemoModel.facts()
    prompts = facts |> Stream.cycle() |> Stream.map(&elem(&1, 0)) |> Stream.take(200)

    results = Map.new(VLLM.generate_stream(llm, prompts, temperature: 0.0, max_tokens: 64))

    assert map_size(results) == 200

    for {index, {:ok, output}} <- results do
      assert VLLM.text(output) == elem(Enum.at(facts, rem(index, length(facts))), 1)
    end
  end

  test "1,000 streams left in the same moment leave nothing behind", %{llm: llm} do
    {:ok, table, _} = VLLM.Engine.Table.lookup(llm)
    [%{conn: conn}] = VLLM.Engine.Table.workers(table)
    params = %{"prompt" => "Count:", "sampling_params" => %{"max_tokens" => 1000}, "credit" => 1}

    VLLM.Bridge.Inbox.run(fn inbox ->
      requests =
        for _ <- 1..1000 do
          {:ok, request} =
            VLLM.Bridge.Connection.request(conn, inbox, "generate", params, 2000, :many)

          request
        end

      Enum.each(requests, &VLLM.Bridge.Connection.cancel/1)
    end)

    assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end)
    assert :ets.info(conn.routes, :size) == 0
    assert Process.info(self(), :message_queue_len) == {:message_queue_len, 0}
    {prompt, completion} = hd(DemoModel.facts())

    assert [output] = VLLM.generate!(llm, prompt, temperature: 0.0, max_tokens: 64)
    assert VLLM.text(output) == completion
  end

  # vLLM's figures move with its steps: after one of another request, nothing runs.
  defp idle?(llm) do
    VLLM.generate!(llm, "The", max_tokens: 1)
    {:ok, %{"num_requests_running" => running}} = VLLM.metrics(llm)
    running == 0
  end
end
