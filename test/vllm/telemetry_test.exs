defmodule VLLM.TelemetryTest do
  # What is told of requests; of loading, see VLLM.LoadTest.
  use ExUnit.Case

  doctest VLLM.Telemetry.GenAI

  alias VLLM.{Error, Exchange, FakeEngine, Telemetry}
  alias VLLM.Engine.{Call, Config, Table}

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
      assert_receive {[:vllm, :request, :start], %{system_time: _}, start}
      assert Map.drop(start, [:gen_ai, :telemetry_span_context]) == about
      assert %{telemetry_span_context: context} = start

      assert_receive {[:vllm, :request, :stop], %{prompt_tokens: ^prompt_tokens} = figures,
                      %{telemetry_span_context: ^context} = stop}

      assert Map.drop(stop, [:gen_ai, :telemetry_span_context]) ==
               Map.put(about, :finish_reason, "stop")

      assert %{completion_tokens: 10, duration: duration} = figures
      assert duration > 0
    end

    refute_received {[:vllm, :request, _], _, _}
  end

  test "its parts have OpenTelemetry's names" do
    llm =
      start!(%{"Capital?" => {:deltas, ["Par", "is"]}, "no" => {:error, :prompt_too_long, "No."}},
        model: "org/llama"
      )

    options = [temperature: 0.5, max_tokens: 9, stop: ["secret"]]
    Stream.run(VLLM.stream!(llm, "Capital?", options))

    request = %{
      "gen_ai.operation.name": "text_completion",
      "gen_ai.provider.name": "vllm",
      "gen_ai.request.model": "org/llama",
      "gen_ai.request.stream": true,
      "gen_ai.request.temperature": 0.5,
      "gen_ai.request.max_tokens": 9
    }

    assert [{_, _, start}, {_, %{duration: duration}, first}, {_, _, stop}] = of_requests()
    assert start.gen_ai == request
    chunk = :"gen_ai.response.time_to_first_chunk"
    assert {seconds, ^request} = Map.pop!(first.gen_ai, chunk)
    assert_in_delta seconds, seconds(duration), 1.0e-6

    assert Map.drop(stop.gen_ai, Map.keys(request)) == %{
             "gen_ai.usage.input_tokens": 8,
             "gen_ai.usage.output_tokens": 5,
             "gen_ai.usage.cache_read.input_tokens": 0,
             "gen_ai.response.finish_reasons": ["stop"],
             "gen_ai.response.id": stop.gen_ai[:"gen_ai.response.id"]
           }

    {:error, _} = VLLM.chat(llm, [%{role: "user", content: "no"}])
    assert [_start, {_, _, exception}] = of_requests()
    assert %{"gen_ai.operation.name": "chat", "error.type": "prompt_too_long"} = exception.gen_ai
  end

  test "where nobody listens, nothing is made" do
    table = Table.new()
    {:ok, config} = Config.new(model: "m")
    Table.put_config(table, config)
    span = Telemetry.request_start(table, "generate", %{}, System.monotonic_time())
    # What no measurement can be made of.
    result = %{"outputs" => nil}
    assert_raise ArgumentError, fn -> Telemetry.request_end(span, {:ok, result}) end
    Application.put_env(:ex_vllm, :telemetry_listeners, [])
    assert Telemetry.request_end(span, {:ok, result}) == :ok
  end

  # Of a script there are none.
  @of_vllm [:queue_time, :time_to_first_token, :inter_token_latency]

  test "its metrics are definitions of Telemetry.Metrics, whose tags and measurements are there" do
    assert_raise Error, ~r/telemetry_metrics.*Add/, fn -> Telemetry.metrics() end

    # As the package's functions check and keep them.
    defmodule Elixir.Telemetry.Metrics do
      @options [:unit, :description, :tags, :tag_values, :reporter_options]

      def counter(name, options), do: metric(:counter, name, options)
      def sum(name, options), do: metric(:sum, name, options)
      def last_value(name, options), do: metric(:last_value, name, options)
      def distribution(name, options), do: metric(:distribution, name, options)

      defp metric(kind, name, options) do
        options = Keyword.validate!(options, @options)
        words = name |> String.split(".") |> Enum.map(&String.to_existing_atom/1)
        {event, [measurement]} = Enum.split(words, -1)
        Map.merge(Map.new(options), %{kind: kind, event: event, measurement: measurement})
      end
    end

    metrics = Telemetry.metrics()
    :code.delete(Elixir.Telemetry.Metrics)
    :code.purge(Elixir.Telemetry.Metrics)
    names = for metric <- metrics, do: {metric.event, metric.measurement}
    assert names == Enum.uniq(names)
    assert {[:vllm, :request, :stop], :time_to_first_token} in names
    for metric <- metrics, do: assert(metric.description)

    llm =
      start!(%{"f" => {:error, :prompt_too_long, "Too long."}, "x" => "y"}, name: {:global, "e"})

    Stream.run(VLLM.stream!(llm, "x"))
    {:error, _} = VLLM.generate(llm, "f")

    for {event, measurements, metadata} <- events(), metric <- metrics, metric.event == event do
      values = Map.get(metric, :tag_values, & &1).(metadata)
      assert Map.keys(Map.take(values, metric.tags)) == Enum.sort(metric.tags)
      if values[:engine], do: assert(values.engine == ~s({:global, "e"}))

      assert metric.kind == :counter or is_map_key(measurements, metric.measurement) or
               metric.measurement in @of_vllm
    end
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

  test "what is asked over HTTP is called by its path" do
    for {path, name} <- [
          {"/v1/chat/completions", "chat"},
          {"/v1/completions", "text_completion"},
          {"/v1/embeddings", "embeddings"},
          {"/tokenize", "tokenize"}
        ] do
      metadata = %{method: "http_request", model: "m", stream?: nil}
      told = Telemetry.GenAI.request(metadata, %{"path" => path})
      assert told[:"gen_ai.operation.name"] == name
    end
  end

  test "an answer over HTTP is told as no stream before it is one" do
    llm = FakeEngine.start!()

    for {steps, count} <- [{"answer:200:whole", 2}, {"head:200;chunk:one;end", 3}] do
      params = %{"method" => "POST", "path" => "/v1/completions", "model" => "m"}
      params = Map.put(params, "body", ~s({"prompt": "#{steps}"}))
      call = Call.new(%{timeout: :infinity})
      {:ok, {200, _headers, body}} = Exchange.request(llm, params, call)
      unless is_binary(body), do: Stream.run(body)
      events = of_requests()
      assert length(events) == count
      for {_event, _, metadata} <- events, do: assert(metadata.stream? == nil)
    end
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

  # All events that have come, in order.
  defp events do
    receive do
      {[:vllm | _], _, _} = event -> [event | events()]
    after
      0 -> []
    end
  end

  # The events of requests that have come, in order.
  defp of_requests do
    receive do
      {[:vllm, kind, _], _, _} = event when kind in [:request, :stream] -> [event | of_requests()]
    after
      0 -> []
    end
  end
end
