defmodule Mix.Tasks.Vllm.CompareTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  import VLLM.MixShell

  alias Mix.Tasks.Vllm.Compare
  alias VLLM.Quantization.Comparison
  alias VLLM.Quantization.Comparison.Row

  @moduletag :tmp_dir

  setup :capture_shell

  # It draws nothing, and says what it was to draw.
  defp fake, do: Map.new(VLLM.FakeJobs.worker(), fn {name, value} -> {to_string(name), value} end)

  defp comparison do
    plain = %Row{
      model: "org/m",
      format: "plain",
      bits_per_weight: 16.0,
      bytes: 2_000_000_000,
      perplexity: 12.5,
      kl_mean: 0.0,
      kl_p99: 0.0,
      same_top: 1.0,
      tokens_per_second: 31.25,
      says: []
    }

    nf4 = %Row{
      plain
      | model: "m <nf4> & more",
        format: "bitsandbytes (4 bits)",
        bytes: 600_000_000,
        kl_mean: 0.9,
        perplexity: 1.0e40,
        verdict: :worse_than_usual,
        says: ["It is worse.", "Take more bits."]
    }

    Comparison.new("org/m", nil, [plain, nf4])
  end

  test "prints a row for each model, and what to try", %{tmp_dir: folder} do
    plot = Path.join(folder, "quality.svg")
    assert Compare.report(comparison(), [], plot, fake()) == :ok

    assert Enum.join(lines(), "\n") == """
           model           format                     size   bits  perplexity       KL  KL 99 %  same top  tokens/s  verdict
           org/m           plain                    2.0 GB  16.00      12.500  0.00000   0.0000   100.0 %      31.3  reference
           m <nf4> & more  bitsandbytes (4 bits)  600.0 MB  16.00        huge  0.90000   0.0000   100.0 %      31.3  worse than usual

           m <nf4> & more
             It is worse.
             Take more bits.\
           """

    assert File.read!(plot) =~
             "svg What was lost of org/m org/m, plain m <nf4> & more, bitsandbytes (4 bits): worse than usual"
  end

  test "prints everything as JSON, with numbers as numbers" do
    assert Compare.report(comparison(), ["json"], nil, %{}) == :ok
    [text] = lines()
    assert text =~ ~s("texts": "held_out")
    assert text =~ ~s("kl_mean": 0.9)
    assert text =~ ~s("error": null)
  end

  test "a text that cannot be read and a plot that cannot be written are said", %{tmp_dir: folder} do
    missing = Path.join(folder, "missing")

    assert_raise Mix.Error, "#{missing} cannot be read: no such file or directory", fn ->
      Compare.run(["a", "b", "--text", missing])
    end

    assert_raise Mix.Error, ~r/cannot be written: illegal operation on a directory/, fn ->
      Compare.report(comparison(), [], folder, fake())
    end

    # Before anything is compared.
    assert_raise Mix.Error, ~r/--plot takes a file/, fn -> Compare.run(["a", "b", "--plot"]) end
    nowhere = Path.join(missing, "quality.svg")

    assert_raise Mix.Error, "#{nowhere} cannot be written: there is no folder #{missing}", fn ->
      Compare.run(["a", "b", "--plot", nowhere])
    end

    assert_raise Mix.Error, ~r/Which model\?/, fn -> Compare.run(["--json"]) end
  end
end
