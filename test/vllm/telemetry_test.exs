defmodule VLLM.TelemetryTest do
  # What is told of requests; of loading, see VLLM.LoadTest.
  use ExUnit.Case

  alias VLLM.{Error, FakeEngine, Telemetry}
  alias VLLM.Engine.{Config, Table}

  setup do
    Application.put_env(:ex_vllm, :telemetry_listeners, test: self())
    on_exit(fn -> Application.delete_env(:ex_vllm, :telemetry_listeners) end)
  end

  defp start!(script, options \\ []), do: VLLM.Test.start!([script: script] ++ options)

  test "a request has a start and a stop, with tokens and the finish reason" do
    llm = start!("Paris", name: VLLM.TelemetryTest.Told, model: "/models/told")
    VLLM.generate!(llm, ["ab", "abc"], n: 2)
    about = %{engine: VLLM.TelemetryTest.Told, model: "/models/told"}
    about = Map.merge(about, %{method: "generate", stream?: false})

    for prompt_tokens <- [2, 3] do
      assert_receive {[:vllm, :request, :start], %{system_time: _}, ^about}

      assert_receive {[:vllm, :request, :stop], %{prompt_tokens: ^prompt_tokens} = figures, stop}
      assert stop == Map.put(about, :finish_reason, "stop")
      assert %{completion_tokens: 10, duration: duration} = figures
      assert duration > 0
    end

    refute_received {[:vllm, :request, _], _, _}
  end

  test "nothing is told, and nothing warned of, where telemetry was not started" do
    handlers = Process.whereis(:telemetry_handler_table)
    Process.unregister(:telemetry_handler_table)
    on_exit(fn -> Process.register(handlers, :telemetry_handler_table) end)

    log =
      ExUnit.CaptureLog.capture_log(fn ->
        llm = start!("Paris")
        VLLM.generate!(llm, "x")
        Stream.run(VLLM.stream!(llm, "x"))
        VLLM.stop(llm)
      end)

    assert log =~ "script: ready"
    refute log =~ "telemetry"
    refute_received {[:vllm | _], _, _}
  end

  test "pooling, scores and the rest have what there is" do
    llm = start!({:numbers, [0.5]})
    VLLM.embed!(llm, "abc")
    assert_receive {[:vllm, :request, :stop], %{prompt_tokens: 3}, %{method: "pool"} = stop}
    assert stop.finish_reason == nil
    VLLM.score!(llm, "a", "b")
    assert_receive {[:vllm, :request, :stop], %{prompt_tokens: _}, %{method: "score"}}
    VLLM.tokenize!(llm, "abc")
    assert_receive {[:vllm, :request, :stop], figures, %{method: "tokenize"}}
    assert Map.keys(figures) == [:duration]
  end

  test "an error is an exception" do
    llm = start!({:error, :prompt_too_long, "Too long."})
    assert {:error, _} = VLLM.generate(llm, "x")
    assert_receive {[:vllm, :request, :exception], %{duration: _}, %{error: error}}
    assert %Error{reason: :prompt_too_long} = error
    refute_received {[:vllm, :request, :stop], _, _}
  end

  test "deadlines, stopped engines and prompts given up for another are exceptions" do
    script = %{"hang" => :hang, "fail" => {:error, :prompt_too_long, "Too long."}}
    llm = start!(script, shutdown_timeout: 100)
    {:error, _} = VLLM.generate(llm, "hang", timeout: 20)
    assert reason() == :timeout
    {:error, _} = VLLM.generate(llm, ["hang", "fail"])
    assert Enum.sort([reason(), reason()]) == [:aborted, :prompt_too_long]
    [{0, {:error, _}}] = Enum.to_list(VLLM.generate_stream(llm, ["hang"], timeout: 20))
    assert reason() == :timeout
    [{:error, _}] = Enum.to_list(VLLM.stream(llm, "hang", timeout: 20))
    assert reason() == :timeout

    FakeEngine.ask_in_background(llm, "hang")
    assert_receive {[:vllm, :request, :start], _, _}
    VLLM.stop(llm)
    assert reason() == :shutdown
  end

  defp reason do
    assert_receive {[:vllm, :request, :exception], %{duration: _}, %{error: error}}
    error.reason
  end

  test "a stream tells its first token once, and its end" do
    llm = start!({:deltas, for(number <- 1..40, do: "#{number} ")})
    Stream.run(VLLM.stream!(llm, "x"))

    assert [
             {[:vllm, :request, :start], _, %{method: "generate", stream?: true}},
             {[:vllm, :stream, :first_token], %{duration: first}, %{stream?: true}},
             {[:vllm, :request, :stop], %{duration: all, completion_tokens: 111}, _}
           ] = of_requests()

    assert 0 < first and first <= all
    ref = VLLM.stream_to(llm, "x")
    assert_receive {:vllm, ^ref, {:done, _}}
    assert [_start, {[:vllm, :stream, :first_token], _, _}, _stop] = of_requests()
  end

  test "a stream that is left is an exception" do
    llm = start!({:deltas, ["a", :hang]})
    assert Enum.take(VLLM.stream_text!(llm, "x"), 1) == ["a"]
    assert [_start, _first, {[:vllm, :request, :exception], _, %{error: error}}] = of_requests()
    assert error.reason == :aborted
  end

  test "prompts and texts are told only where that was asked for" do
    llm = start!("secret answer")
    VLLM.generate!(llm, "secret prompt")
    assert [_, _] = told = of_requests()
    refute inspect(told) =~ "secret"

    llm = start!("answer", telemetry_payloads: true)
    VLLM.generate!(llm, "prompt", max_tokens: 5)
    assert [{_, _, start}, {_, _, stop}] = of_requests()
    assert %{"prompt" => "prompt", "sampling_params" => %{"max_tokens" => 5}} = start.params
    refute is_map_key(start, :result)
    assert %{result: %{"outputs" => [%{"text" => "answer"}]}, params: %{"prompt" => _}} = stop
  end

  test "vLLM's figures become times" do
    figures = %{
      "num_generation_tokens" => 5,
      "arrival_time" => 1.7e9,
      "queued_ts" => 100.0,
      "scheduled_ts" => 100.25,
      "first_token_ts" => 101.0,
      "last_token_ts" => 103.0,
      "first_token_latency" => 1.125
    }

    told = figures(figures)
    assert seconds(told.queue_time) == 0.25
    assert seconds(told.time_to_first_token) == 1.125
    assert seconds(told.inter_token_latency) == 0.5

    refute is_map_key(figures(%{figures | "num_generation_tokens" => 1}), :inter_token_latency)
    # A request that was never scheduled, and a vLLM that keeps no figures.
    for none <- [%{figures | "scheduled_ts" => 0.0}, nil] do
      assert Map.keys(figures(none)) == [:completion_tokens, :duration, :prompt_tokens]
    end
  end

  defp figures(metrics) do
    table = Table.new()
    {:ok, config} = Config.new(model: "m")
    Table.put_config(table, config)

    table
    |> Telemetry.request_start("generate", %{}, System.monotonic_time())
    |> Telemetry.request_end(
      {:ok, %{"outputs" => [], "prompt_token_ids" => <<>>, "metrics" => metrics}}
    )

    assert_receive {[:vllm, :request, :stop], measurements, _}
    measurements
  end

  defp seconds(native), do: System.convert_time_unit(native, :native, :microsecond) / 1.0e6

  # The events of requests that have come, in order.
  defp of_requests do
    receive do
      {[:vllm, kind, _], _, _} = event when kind in [:request, :stream] -> [event | of_requests()]
    after
      0 -> []
    end
  end
end
