defmodule VLLM.Quantization.CompareTest do
  # What is measured is made up by a worker without an engine (test/support/fake_measure.py); how it is
  # compared is not.
  use ExUnit.Case, async: true

  alias VLLM.{DemoModel, Error, FakeInterpreter, OSProcess, Quantization, TestPython}
  alias VLLM.Quantization.Comparison

  @moduletag :tmp_dir
  @gguf_models Path.expand("../../../python/tests/gguf_models.py", __DIR__)
  @fake Path.expand("../../support/fake_measure.py", __DIR__)

  setup %{tmp_dir: folder} do
    line = ~s(exec "#{TestPython.executable!()}" "#{@fake}")
    %{python: FakeInterpreter.with_worker!(folder, line)}
  end

  test "each model has a row, and what lost more than usual has what to try", %{python: python} do
    models = ["skewed:0.3", "even", "skewed:0.97", "other", "error:load_failed"]
    options = [python: python, reference: "even", texts: ["A text."], max_tokens: 5]
    assert {:ok, comparison} = Quantization.compare(models, options)
    assert %Comparison{reference: "even", texts: :given} = comparison
    assert [good, even, bad, other, failed] = comparison.rows

    assert %{model: "even", kl_mean: 0.0, same_top: 1.0, verdict: nil, tokens: 5} = even
    assert even.answers == ["A text."]
    assert %{model: "skewed:0.3", format: "awq (4 bits)", verdict: :ok, usual: 0.07194} = good
    expected = 0.25 * :math.log(0.25 / 0.3) + 0.75 * :math.log(0.75 / 0.7)
    assert_in_delta good.kl_mean, expected, 1.0e-6
    assert %{verdict: :worse_than_usual, says: [_why, "Take a smaller `group_size`" <> _]} = bad
    assert %{kl_mean: nil, verdict: nil, says: ["It cuts the text" <> _]} = other

    assert %{kl_mean: nil, says: ["It cannot be loaded."], error: %{reason: :load_failed}} =
             failed

    assert String.starts_with?(to_string(comparison), """
           model              format           size   bits  perplexity       KL  KL 99 %  same top  tokens/s  verdict
           skewed:0.3         awq (4 bits)   4.3 GB   4.25       3.333  0.00616   0.0062   100.0 %      20.0  ok
           even               plain         16.0 GB  16.00       4.000  0.00000   0.0000   100.0 %      20.0  reference
           skewed:0.97        awq (4 bits)   4.3 GB   4.25       1.031  2.07520   2.0752   100.0 %      20.0  worse than usual
           other              plain         16.0 GB  16.00       4.000        ?        ?         ?      20.0
           error:load_failed  ?                   ?      ?           ?        ?        ?         ?         ?  load_failed

           skewed:0.97
             Its mean KL divergence of 2.0752 is worse than usual:\
           """)

    assert inspect(comparison) =~ "#VLLM.Quantization.Comparison<\nmodel "
    assert Comparison.to_json(comparison) =~ ~s("verdict": "worse_than_usual")

    assert [over_size, sizes, same, rate] = Comparison.Plot.panels(comparison.rows)
    assert %{"kind" => "dots", "log_y" => true, "unit_x" => "B"} = over_size

    drawn =
      for %{"label" => label, "x" => [x], "y" => [y]} <- over_size["series"], do: {label, x, y}

    # Those that have a divergence.
    assert drawn == [
             {"skewed:0.3, awq (4 bits)", good.bytes, good.kl_mean},
             {"skewed:0.97, awq (4 bits): worse than usual", bad.bytes, bad.kl_mean}
           ]

    heights = fn panel -> for series <- panel["series"], do: series["y"] end
    assert heights.(sizes) == [[good.bytes], [even.bytes], [bad.bytes], [other.bytes], []]
    assert heights.(same) |> Enum.at(1) == [100.0]
    assert heights.(rate) == [[20.0], [20.0], [20.0], [20.0], []]
  end

  test "without the reference, which is the first, nothing is measured", %{python: python} do
    assert {:error, %Error{reason: :load_failed}} =
             Quantization.compare(["error:load_failed", "hang"], python: python)
  end

  test "what is no set of models and no option is refused without Python" do
    for models <- [[], "a", [], nil, ["a"], ["a", "a"], ["a", 1]] do
      assert {:error, %Error{reason: :invalid_option} = error} =
               Quantization.compare(models, python: "/no/python")

      assert error.details["option"] in ["models", "model"]
    end

    for {name, value} <- [texts: [], texts: [""], texts: "a", max_tokens: 0, reference: ""] do
      option = Atom.to_string(name)

      assert {:error, %Error{reason: :invalid_option, details: %{"option" => ^option}}} =
               Quantization.compare(["a", "b"], [{name, value}, {:python, "/no/python"}])
    end
  end

  test "a caller that ends while a model is measured leaves nothing", %{
    python: python,
    tmp_dir: folder
  } do
    file = Path.join(folder, "pid")
    caller = spawn(fn -> Quantization.compare(["even", "pid:#{file}:hang"], python: python) end)
    assert OSProcess.eventually(fn -> match?({:ok, <<_, _::binary>>}, File.read(file)) end)
    pid = file |> File.read!() |> String.to_integer()
    Process.exit(caller, :kill)
    assert OSProcess.eventually(fn -> not OSProcess.alive?(pid) end)
  end

  test "a model that is not measured in time is an error that says so", %{python: python} do
    assert {:error, %Error{reason: :timeout, details: %{"option" => "timeout"}} = error} =
             Quantization.compare(["even", "hang"], python: python, timeout: 300)

    assert error.message =~ "max_tokens:"
  end

  @tag :slow
  @tag timeout: 300_000
  test "the demo model's variants have lost little, and a damaged one is told", %{tmp_dir: folder} do
    damaged = Path.join(folder, "damaged")
    damage!(DemoModel.path("demo-gptq"), damaged)
    gguf = Path.join(folder, "demo-Q4_0.gguf")

    {log, status} =
      System.cmd(TestPython.executable!(), [@gguf_models, "Q4_0", folder], stderr_to_stdout: true)

    assert status == 0, log
    models = [DemoModel.path(), DemoModel.path("demo-gptq"), gguf, damaged]
    comparison = Quantization.compare!(models, max_tokens: 512)
    assert [demo, gptq, gguf, worse] = comparison.rows
    assert %{kl_mean: 0.0, kl_p99: 0.0, same_top: 1.0, same_answers: 1.0, verdict: nil} = demo

    for row <- [gptq, gguf] do
      assert %{verdict: :ok, tokens: 512, rest: 0.0, usual: 0.07194} = row
      assert row.kl_mean > 0.005 and row.kl_mean < 0.15
      assert row.kl_p99 > row.kl_mean
      assert row.same_top > 0.8 and row.same_top < 1.0
      assert row.bytes < demo.bytes / 2 and row.memory < demo.memory / 2
      assert row.tokens_per_second > 0
    end

    assert %{verdict: :broken, error: nil} = worse
    assert worse.kl_mean > 5 * gptq.kl_mean
  end

  # The packed weights of all down projections are zeros, as if they had never been written.
  defp damage!(model, copy) do
    File.cp_r!(model, copy)
    {:ok, file} = File.open(Path.join(copy, "model.safetensors"), [:read, :write, :raw])
    {:ok, <<length::64-little>>} = :file.pread(file, 0, 8)
    {:ok, header} = :file.pread(file, 8, length)
    tensor = ~r/down_proj\.qweight":\{[^}]*"data_offsets":\[(\d+),(\d+)\]/

    for [_, from, to] <- Regex.scan(tensor, header) do
      [from, to] = Enum.map([from, to], &String.to_integer/1)
      :ok = :file.pwrite(file, 8 + length + from, <<0::size(to - from)-unit(8)>>)
    end

    :ok = File.close(file)
  end
end
