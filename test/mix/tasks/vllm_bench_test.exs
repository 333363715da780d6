defmodule Mix.Tasks.Vllm.BenchTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  import VLLM.MixShell

  alias Mix.Tasks.Vllm.Bench, as: Task
  alias VLLM.Bench
  alias VLLM.Bench.{Figures, Run}

  @moduletag :tmp_dir

  setup :capture_shell

  defp figures(results) do
    noted = %{ttft: 0.05, itls: [0.01, 0.01], latency: 0.07, input_len: 20, output_len: 3}
    Figures.new([{:ok, noted}, {:ok, noted} | results], 0.5, 0.003, 0.001)
  end

  defp bench(results \\ []) do
    plain = %Run{
      engine: "demo",
      model: "/m/demo",
      replicas: 1,
      kv_cache_dtype: "auto",
      max_concurrency: 16,
      startup_seconds: 9.25,
      memory: 734_003_200,
      figures: figures(results),
      rounds: [figures(results)],
      output_throughput: {12.0, 11.0, 13.5},
      ratio: nil
    }

    awq = %Run{
      plain
      | engine: "demo <awq>",
        quantization: "awq",
        max_concurrency: 16,
        output_throughput: {18.0, 17.0, 19.0},
        ratio: {1.5, 1.25, 1.75}
    }

    %Bench{
      runs: [plain, awq],
      dataset: "2 prompts of 20 random tokens, answers of 3",
      settings: %{rounds: 15, request_rate: 4, burstiness: 1},
      versions: %{ex_vllm: "0.1.0", vllm: "0.32.0", elixir: "1.14.0", otp: "25"},
      cores: 2
    }
  end

  test "prints throughput, latencies and what the engines are", %{tmp_dir: folder} do
    [json, plot] = for name <- ["speed.json", "speed.svg"], do: Path.join(folder, name)
    assert Task.report(bench(), json, plot, %{}) == :ok

    assert printed() == """
           2 prompts of 20 random tokens, answers of 3; 4 requests a second (burstiness 1); medians of 15 rounds
           ex_vllm 0.1.0, vLLM 0.32.0, Elixir 1.14.0, OTP 25, 2 cores

           engine      at a time    done  requests/s  output tokens/s         95 %  total tokens/s  CPU ms/1k  of the first
           demo               16  2 of 2        4.00             12.0  11.0 - 13.5            92.0        500
           demo <awq>         16  2 of 2        4.00             18.0  17.0 - 19.0            92.0        500  1.50 (1.25 - 1.75)

           milliseconds: mean, median, p99  at a time            TTFT            TPOT             ITL            E2EL
           demo                                    16  50.0 50.0 50.0  10.0 10.0 10.0  10.0 10.0 10.0  70.0 70.0 70.0
           demo <awq>                              16  50.0 50.0 50.0  10.0 10.0 10.0  10.0 10.0 10.0  70.0 70.0 70.0

           engine      start-up     memory  quantization  KV cache
           demo           9.3 s  700.0 MiB  none          auto
           demo <awq>     9.3 s  700.0 MiB  awq           auto
           """

    assert File.read!(json) =~ ~s("median_e2el_ms": 70.0)
    texts = texts(File.read!(plot))

    # What was asked, the engines, and the numbers at their bars: of tokens/s, of the first one's, TTFT and TPOT.
    assert "2 prompts of 20 random tokens, answers of 3" in texts
    assert ["demo", "demo <awq>"] == Enum.filter(texts, &String.starts_with?(&1, "demo"))
    for number <- ["12", "18", "1.5", "50", "10"], do: assert(number in texts)
  end

  defp texts(svg) do
    for [_, text] <- Regex.scan(~r{>([^<>]+)</text>}, svg),
        do: text |> String.replace("&lt;", "<") |> String.replace("&gt;", ">")
  end

  test "--json without a file prints all of it and nothing else" do
    assert Task.report(bench(), true, nil, %{}) == :ok
    assert [text] = lines()
    assert text =~ ~s("request_throughput": 4.0)
    assert String.starts_with?(text, "{")
  end

  test "ends with status 1 where a request failed, and says why" do
    error = {:error, VLLM.Error.new(:timeout, "Too late.")}
    assert catch_exit(Task.report(bench([error]), nil, nil, %{})) == {:shutdown, 1}
    text = printed()
    assert text =~ "2 of 3"
    assert text =~ "demo: timeout: Too late."
  end

  test "what cannot be written, and options that are none, are said before anything starts" do
    missing = "/nowhere/speed.json"

    assert_raise Mix.Error, "#{missing} cannot be written: there is no folder /nowhere", fn ->
      Task.run(["m", "--json", missing])
    end

    assert_raise Mix.Error, ~r/--plot takes a file/, fn -> Task.run(["m", "--plot"]) end
    no_python = ["m", "--plot", "speed.svg", "--python", "/no/python"]
    assert catch_exit(Task.run(no_python)) == {:shutdown, 1}
    assert printed() =~ "Python could not be started"

    assert_raise Mix.Error, "--against takes NAME=VALUE,…; got \"fp8\"", fn ->
      Task.run(["m", "--against", "kv-cache-dtype=fp8,fp8"])
    end

    assert catch_exit(Task.run(["m", "--max-concurrency", "1,many"])) == {:shutdown, 1}
    assert printed() =~ "`max_concurrency` must be a positive integer or a list of such"
    assert catch_exit(Task.run(["m", "--against", "m2", "--rounds", "0"])) == {:shutdown, 1}
    assert printed() =~ "`rounds` must be a positive integer"
  end
end
