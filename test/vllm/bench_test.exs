defmodule VLLM.BenchTest do
  use ExUnit.Case, async: true

  alias VLLM.Bench
  alias VLLM.Bench.{Figures, Plot, Run, Statistics}
  alias VLLM.Error

  doctest VLLM.Bench.Statistics

  @quick [num_prompts: 4, num_warmups: 0, rounds: 1, random_input_len: 3]

  # What starts a model here; see test/support/fake_worker.py.
  @fake [python: Path.expand("../support/fake_python", __DIR__), nursery: false]

  defp engine(script), do: VLLM.Test.start!(script: script)

  describe "figures" do
    test "are those of vllm bench serve, from given times" do
      one = %{ttft: 0.1, itls: [0.03, 0.02], latency: 0.15, input_len: 10, output_len: 3}
      two = %{ttft: 0.3, itls: [0.1], latency: 0.4, input_len: 20, output_len: 6}
      # Of a single token there is no time per token after it.
      three = %{ttft: 0.2, itls: [], latency: 0.2, input_len: 5, output_len: 1}
      error = {:error, Error.new(:timeout, "Too late.")}
      results = [{:ok, one}, {:ok, two}, {:ok, three}, error, error]
      figures = Figures.new(results, 2.0, 0.5, 0.05)

      assert %{completed: 3, failed: 2, errors: ["timeout: Too late."]} = figures
      assert %{total_input_tokens: 35, total_output_tokens: 10} = figures
      assert figures.request_throughput == 1.5
      assert figures.output_throughput == 5.0
      assert figures.total_token_throughput == 22.5
      assert_in_delta figures.mean_ttft_ms, 200, 1.0e-9
      assert_in_delta figures.median_ttft_ms, 200, 1.0e-9
      # Between the second and the third of three, 98 % of the way.
      assert_in_delta figures.p99_ttft_ms, 298, 1.0e-9
      # 50 ms over two tokens, 100 ms over five.
      assert_in_delta figures.mean_tpot_ms, 22.5, 1.0e-9
      assert_in_delta figures.mean_itl_ms, 50, 1.0e-9
      assert_in_delta figures.median_itl_ms, 30, 1.0e-9
      assert_in_delta figures.mean_e2el_ms, 250, 1.0e-9
      assert figures.cpu_ms_per_1k_tokens == 50_000.0
      assert figures.beam_cpu_ms_per_1k_tokens == 5_000.0
    end

    test "of rounds are medians, and counts are sums" do
      rounds =
        for seconds <- [1.0, 4.0, 2.0] do
          noted = %{ttft: seconds, itls: [], latency: seconds, input_len: 1, output_len: 8}
          Figures.new([{:ok, noted}], seconds, nil, 0.0)
        end

      together = Figures.together(rounds)
      assert %{completed: 3, total_output_tokens: 24} = together
      assert together.output_throughput == 4.0
      assert together.median_ttft_ms == 2000.0
      assert together.mean_itl_ms == nil
      assert together.cpu_ms_per_1k_tokens == nil
    end
  end

  describe "a picture" do
    setup do
      figures = %Figures{median_ttft_ms: 50.0, p99_ttft_ms: 80.0}
      run = %Run{engine: "one", max_concurrency: 1, figures: figures, memory: 7}
      one = %{run | output_throughput: {12.0, 11.0, 13.5}}

      two = %{
        run
        | engine: "another",
          output_throughput: {18.0, 17.0, 19.0},
          ratio: {1.5, 1.4, 1.6}
      }

      %{runs: [one, two, %{one | max_concurrency: 16}, %{two | max_concurrency: 16}]}
    end

    test "has lines over how many requests were under way, of each engine", %{runs: runs} do
      assert [throughput, ratio, ttft, tpot, memory, start_up] = Plot.panels(runs)

      assert %{"kind" => "lines", "categories" => ["1", "16"], "series" => [one, two]} =
               throughput

      assert one == %{
               "label" => "one",
               "x" => [0, 1],
               "y" => [12.0, 12.0],
               "low" => [11.0, 11.0],
               "high" => [13.5, 13.5]
             }

      assert %{"label" => "another", "y" => [18.0, 18.0]} = two
      assert %{"baseline" => 1, "series" => [%{"y" => []}, %{"y" => [1.5, 1.5]}]} = ratio
      assert [%{"y" => [50.0, 50.0], "high" => [80.0, 80.0]}, _] = ttft["series"]
      assert [%{"label" => "one", "x" => [0], "y" => [7]}, %{"y" => [7]}] = memory["series"]
      # What is not known is nowhere.
      assert start_up["series"] == []
      assert [%{"x" => [], "y" => []}, %{"x" => []}] = tpot["series"]
    end

    test "has bars side by side where there is one such number", %{runs: runs} do
      for {count, name} <- [{16, "16"}, {nil, "all"}] do
        runs = for run <- Enum.take(runs, 2), do: %{run | max_concurrency: count}
        assert [%{"kind" => "bars", "categories" => [^name]} | _] = Plot.panels(runs)
      end
    end
  end

  describe "random times" do
    test "have the mean that was asked for and are the same for a seed" do
      times = Statistics.arrivals(5000, 50, 1, 7)
      assert times == Statistics.arrivals(5000, 50, 1, 7)
      assert times != Statistics.arrivals(5000, 50, 1, 8)
      assert_in_delta List.last(times), 100.0, 1.0e-6
      gaps = gaps(times)
      assert Enum.all?(gaps, &(&1 > 0))
      # Of a Poisson process they scatter as much as they are long.
      assert_in_delta deviation(gaps) / 0.02, 1.0, 0.05
    end

    test "scatter more in bursts, and less the larger the burstiness" do
      for burstiness <- [0.25, 16] do
        gaps = 5000 |> Statistics.arrivals(50, burstiness, 1) |> gaps()
        assert_in_delta Statistics.mean(gaps), 0.02, 1.0e-9
        # 1 / sqrt(k) of a gamma distribution of the shape k.
        assert_in_delta deviation(gaps) / 0.02 * :math.sqrt(burstiness), 1.0, 0.1
      end
    end

    test "come all at the end where bursts are too dense for numbers" do
      assert Statistics.arrivals(5, 50, 1.0e-6, 1) == List.duplicate(0.1, 5)
    end

    defp gaps(times), do: Enum.zip_with(times, [0.0 | times], &(&1 - &2))

    defp deviation(numbers) do
      mean = Statistics.mean(numbers)
      numbers |> Enum.map(&((&1 - mean) ** 2)) |> Statistics.mean() |> :math.sqrt()
    end
  end

  test "the interval of a median holds it, and is the same for the same numbers" do
    numbers = for n <- 1..15, do: 100 + rem(n * 7, 15)
    assert {107.0, low, high} = Statistics.interval(numbers)
    assert low >= 102 and low < 107 and high > 107 and high <= 112
    assert Statistics.interval(numbers) == {107.0, low, high}
    assert Statistics.interval([5.0, 5.0]) == {5.0, 5.0, 5.0}
  end

  describe "an engine that runs" do
    test "is asked as often as was said, with random prompts of the length that was said" do
      llm = engine(fn _ -> {:deltas, ["ab", "c", "d"]} end)

      assert {:ok, bench} =
               Bench.run(llm, @quick ++ [rounds: 2, num_warmups: 3, random_output_len: 9])

      asked = VLLM.Test.requests(llm)
      # Of an option that is there twice the first counts: one round, and no request before it.
      assert length(asked) == 4

      for request <- asked do
        assert %{"max_tokens" => 9, "ignore_eos" => true} = request.sampling_params
        assert request.sampling_params["temperature"] == 0
      end

      prompts = for request <- asked, do: request.params["prompt"]
      assert length(Enum.uniq(prompts)) == 4
      assert [%{figures: figures, max_concurrency: nil, ratio: nil} = run] = bench.runs
      assert %{completed: 4, failed: 0, total_input_tokens: 12} = figures
      assert figures.total_output_tokens == 16
      assert figures.output_throughput > 0
      # Three deltas have two times between them.
      assert figures.median_itl_ms <= figures.median_e2el_ms
      assert run.startup_seconds == nil
      assert run.memory == nil
      assert bench.dataset == "4 prompts of 3 random tokens, answers of 9"
    end

    test "is asked in rounds after requests that do not count" do
      llm = engine(fn _ -> {:deltas, ["a", "b"]} end)
      options = [num_prompts: 5, num_warmups: 3, rounds: 2, max_concurrency: [1, 4]]
      assert {:ok, bench} = Bench.run(llm, options ++ [random_input_len: 2])
      assert length(VLLM.Test.requests(llm)) == 3 + 2 * 2 * 5
      assert [1, 4] == Enum.map(bench.runs, & &1.max_concurrency)
      for run <- bench.runs, do: assert([%Figures{completed: 5}, _] = run.rounds)
    end

    test "has no more requests at a time than was said" do
      test = self()
      under_way = :counters.new(1, [])

      script = fn _ ->
        :counters.add(under_way, 1, 1)
        # Whoever else may come has time to come.
        Process.sleep(5)
        send(test, {:under_way, :counters.get(under_way, 1)})
        :counters.sub(under_way, 1, 1)
        "a"
      end

      llm = engine(script)
      assert {:ok, _} = Bench.run(llm, Keyword.merge(@quick, num_prompts: 12, max_concurrency: 3))
      counts = for _ <- 1..12, do: receive(do: ({:under_way, count} -> count))
      assert Enum.max(counts) <= 3
    end

    test "is asked at the rate that was said" do
      options = Keyword.merge(@quick, num_prompts: 10, request_rate: 100)
      assert {:ok, %{runs: [run]} = bench} = Bench.run(engine(fn _ -> "a" end), options)
      # The last of ten comes after a tenth of a second.
      assert run.figures.duration >= 0.1
      assert run.figures.request_throughput <= 100
      assert to_string(bench) =~ "; 100 requests a second (burstiness 1); one round"
    end

    test "is given one's own prompts, and each again where there are too few" do
      llm = engine(fn _ -> "yes" end)
      chat = [%{role: "user", content: "Hello!"}]
      prompts = ["abc", %{prompt_token_ids: [97, 98]}, chat]
      options = Keyword.merge(@quick, prompts: prompts, num_prompts: 5, max_concurrency: 1)
      assert {:ok, bench} = Bench.run(llm, options)
      requests = VLLM.Test.requests(llm)
      assert ~w(generate generate chat generate generate) == Enum.map(requests, & &1.method)
      assert hd(requests).sampling_params["ignore_eos"] == false
      assert hd(requests).sampling_params["max_tokens"] == 256
      assert bench.dataset =~ ~r/\A5 prompts that were given, of \d+ tokens on average/
    end

    test "whose requests fail has them counted, with their errors" do
      script = fn request ->
        if request.prompt == "bad", do: {:error, :prompt_too_long, "Too long."}, else: "good"
      end

      options = [prompts: ["good", "bad", "good", "bad"], num_warmups: 1, rounds: 2]
      assert {:ok, %{runs: [run]} = bench} = Bench.run(engine(script), options)
      assert %{completed: 4, failed: 4, errors: ["prompt_too_long: Too long."]} = run.figures
      assert to_string(bench) =~ "4 of 8"
      assert to_string(bench) =~ "prompt_too_long: Too long."
    end

    test "whose first request fails is not measured" do
      llm = engine(fn _ -> {:error, :unsupported, "Not this."} end)
      assert {:error, %Error{reason: :unsupported}} = Bench.run(llm, num_prompts: 2)
      assert length(VLLM.Test.requests(llm)) == 4
    end
  end

  test "engines are compared in turns, in each round anew" do
    test = self()
    say = fn name -> fn _ -> tap({:deltas, ["a", "b"]}, fn _ -> send(test, name) end) end end
    options = Keyword.merge(@quick, num_prompts: 1, rounds: 3)
    engines = [engine(say.(:one)), engine(say.(:two))]
    assert {:ok, %{runs: [one, two]} = bench} = Bench.run(engines, options)
    turns = for _ <- 1..6, do: receive(do: (name -> name))
    assert turns == [:one, :two, :two, :one, :one, :two]
    assert one.engine == "script (1)" and two.engine == "script (2)"
    assert one.ratio == nil
    {median, low, high} = two.ratio
    assert low <= median and median <= high

    [first, second] = for run <- [one, two], do: Enum.map(run.rounds, & &1.output_throughput)
    assert median == Statistics.median(Enum.zip_with(second, first, &(&1 / &2)))

    assert to_string(bench) =~ "medians of 3 rounds"
    assert Bench.to_json(bench) =~ ~s("median_ttft_ms": )
    assert {:error, %Error{reason: :python_not_found}} = Bench.plot(bench, python: "/no/python")
  end

  test "a model is started with its options, and stopped" do
    # Of no other test that runs at the same time.
    model = "print:bench;ready"

    options =
      [prompts: ["packed:ab,c;reply:abc"], num_warmups: 0, rounds: 1, progress: false] ++ @fake

    assert {:ok, %{runs: [one, two]}} = Bench.run(model, [against: [replicas: 2]] ++ options)
    assert %{engine: ^model, replicas: 1, figures: %{completed: 1}} = one
    assert %{total_input_tokens: 21, total_output_tokens: 3} = one.figures
    assert %{replicas: 2} = two
    assert two.engine == model <> " replicas=2"
    assert one.startup_seconds > 0
    assert one.memory > 0
    assert is_float(one.figures.cpu_ms_per_1k_tokens)
    refute model in VLLM.Engine.Table.models()
  end

  test "engines have the options of the first, and what is other" do
    options = %{"max_model_len" => 64, "replicas" => 1}
    plan = fn targets, against -> Bench.Engines.plan(targets, against, options) end
    given = fn {:start, label, config} -> {label, config.model, config.secrets.().given} end

    # With nothing that is other it is the same engine once more.
    assert {:ok, [one, one]} =
             plan.("/m/llama", []) |> then(fn {:ok, all} -> {:ok, Enum.map(all, given)} end)

    assert {"/m/llama", "/m/llama", %{"max_model_len" => 64}} = one

    assert {:ok, [_, other]} = plan.("a", model: "b", kv_cache_dtype: :fp8, hf_token: "hf_secret")
    assert {label, "b", %{"kv_cache_dtype" => :fp8, "max_model_len" => 64}} = given.(other)
    assert label == "b hf_token=… kv_cache_dtype=:fp8"

    assert {:ok, [_, b, c]} = plan.(["a", "b"], "c")
    assert [{"b", "b", _}, {"c", "c", _}] = Enum.map([b, c], given)
  end

  test "where one of the engines does not start, none is left" do
    options = [against: "refuse:out_of_memory", progress: false, prompts: ["a"]] ++ @fake
    assert {:error, %Error{reason: :out_of_memory}} = Bench.run("touch:/dev/null;ready", options)
    refute "touch:/dev/null;ready" in VLLM.Engine.Table.models()
  end

  test "what is wrong with options is said before anything starts" do
    llm = engine("")

    for {option, value} <- [
          max_concurrency: 0,
          max_concurrency: [],
          request_rate: 0,
          request_rate: 1.0e-9,
          burstiness: -1,
          num_prompts: 1.5,
          random_range_ratio: 1,
          prompts: [],
          prompts: [:no]
        ] do
      assert {:error, %Error{reason: :invalid_option, details: details}} =
               Bench.run(llm, [{option, value}])

      assert details["option"] == Atom.to_string(option)
    end

    # It would fail otherwise, since there is none.
    assert {:error, %Error{details: %{"option" => "random_range_ratio"}}} =
             Bench.run("/no/such/model", random_range_ratio: 1)

    assert {:error, %Error{message: message}} = Bench.run(llm, num_promts: 3)
    assert message =~ "Did you mean `num_prompts`?"
    assert {:error, %Error{details: %{"option" => "against"}}} = Bench.run(llm, against: "m")
    assert {:error, %Error{details: %{"option" => "model"}}} = Bench.run([])
    assert VLLM.Test.requests(llm) == []
  end

  test "prompts are read from a file, and what is wrong there is told with its line" do
    llm = engine(fn _ -> "yes" end)
    path = Path.join(System.tmp_dir!(), "bench-#{System.unique_integer([:positive])}.jsonl")
    on_exit(fn -> File.rm(path) end)
    File.write!(path, ~s({"prompt": "abc"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n))
    assert {:ok, %{runs: [run]}} = Bench.run(llm, prompts: path, num_warmups: 0, rounds: 1)
    assert run.figures.completed == 2
    File.write!(path, ~s({"prompt": ""}\n))

    assert {:error, %Error{reason: :invalid_option, message: message}} =
             Bench.run(llm, prompts: path)

    assert message =~ "line 1: its `prompt` is empty"

    # By the Python that the engine has.
    assert {:error, %Error{reason: :python_not_found}} =
             Bench.run("/no/model", prompts: path, python: "/no/python")

    other = VLLM.Test.start!(script: fn _ -> "yes" end, python: "/no/python")
    assert {:error, %Error{reason: :python_not_found}} = Bench.run(other, prompts: path)
  end
end
