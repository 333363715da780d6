defmodule Mix.Tasks.Vllm.RecommendTest do
  # Mix's shell is the same for all processes.
  use ExUnit.Case, async: false

  import VLLM.MixShell

  alias Mix.Tasks.Vllm.Recommend
  alias VLLM.Quantization.{Advice, Choice, RuledOut}

  @gib 1024 * 1024 * 1024

  setup :capture_shell

  defp advice(fields \\ []) do
    choice = %Choice{
      format: "awq (4 bits)",
      method: "awq",
      disk: 5 * @gib,
      memory: 5 * @gib,
      needs: 7 * @gib,
      score: 0.908,
      marks: %{"one" => 1.0},
      loss: %{"class" => "small", "words" => "small: accuracy falls by 1.6 %"},
      speed: %{"one" => 2.7, "many" => 1.6},
      reasons: ["Loss of quality small."],
      ways: [
        %{"kind" => "hub", "model" => "org/m-AWQ", "options" => %{}, "text" => "load org/m-AWQ"},
        %{"kind" => "make", "model" => "m", "options" => %{}, "text" => "make it with gptqmodel"}
      ]
    }

    unknown = %{choice | format: "new", loss: nil, speed: nil, score: 0.5, ways: []}

    plain = %RuledOut{
      format: "plain",
      why: :does_not_fit,
      needs: 17 * @gib,
      message: "It is too large."
    }

    struct!(
      %Advice{
        model: "org/m",
        goal: :latency,
        device: "RTX 4090 24GB",
        weights: %{"one" => 0.6, "quality" => 0.4},
        choices: [choice, unknown],
        ruled_out: [plain],
        notes: ["A note."],
        picture: "the picture"
      },
      fields
    )
  end

  defp shown(advice, flags \\ []) do
    assert Recommend.report(advice, flags) == :ok
    Enum.join(lines(), "\n")
  end

  test "prints the choices in order, why the first is the first, and what was ruled out" do
    assert shown(advice()) == """
           org/m for latency on RTX 4090 24GB

           format        weights    needs  loss of quality    one   many  score  how to have it
           awq (4 bits)  5.0 GiB  7.0 GiB  small            2.7 x  1.6 x   0.91  load org/m-AWQ
           new           5.0 GiB  7.0 GiB  ?                    ?      ?   0.50

           awq (4 bits)
             Loss of quality small.
             -> load org/m-AWQ
             -> make it with gptqmodel

           Ruled out
           format     needs  why
           plain   17.0 GiB  It is too large.

           A note.\
           """
  end

  test "has no columns of speed where training is what counts" do
    refute shown(advice(weights: %{"training" => 1.0})) =~ "many"
  end

  test "says so where nothing suits" do
    assert shown(advice(choices: [], ruled_out: [])) =~ "There is no format of it."
  end

  test "shows the picture where that is asked for" do
    assert shown(advice(), ["picture"]) =~ ~r/\nthe picture\z/
  end

  test "--json prints all of it" do
    json = shown(advice(), ["json"])
    assert json =~ ~s|"format": "awq (4 bits)"|
    assert json =~ ~s("why": "does_not_fit")
    assert json =~ ~s("goal": "latency")
  end

  test "takes one model" do
    assert_raise Mix.Error, ~r/`mix vllm.recommend MODEL`/, fn -> Recommend.run(["--json"]) end
  end
end
