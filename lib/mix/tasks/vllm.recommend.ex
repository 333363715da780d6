defmodule Mix.Tasks.Vllm.Recommend do
  @shortdoc "Says which formats of a model suit a purpose and a device"

  @moduledoc """
  Says which formats of a model suit a purpose and a device.

      mix vllm.recommend MODEL [--for GOAL] [--device DEVICE] [--search] [--json]

      mix vllm.recommend meta-llama/Llama-3.1-8B-Instruct --for latency --device "RTX 4090"

  Prints the formats that run there and fit, the best first, with their sizes, what they lose and how
  fast they are; how to have the first of them and why it is the first; and what was ruled out.
  `VLLM.Quantization.recommend/2` answers the same in Elixir, and `guides/choosing.md` explains the
  rules.

  ## Options

    * `--for` - `latency`, `throughput`, `quality`, `memory`, `fine_tuning` or `cpu`
    * `--device` - the device, when it is not this machine's: `"H100"`, `"2x A10G"`, `"24GiB"`,
      `"cpu 64GiB"`
    * `--search` - looks on the hub for repositories of the same model in these formats
    * `--picture` - prints how it was decided as well
    * `--json` - prints all of the answer as JSON and nothing else

  Options of an engine are taken by their names: `--max-model-len 8192 --tensor-parallel-size 2`.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments, Table}
  alias VLLM.{Bytes, Quantization}
  alias VLLM.Quantization.Advice

  @requirements ["app.config"]

  @impl Mix.Task
  def run(argv) do
    {model, options, flags} = Arguments.parse!(argv, "vllm.recommend", ["json", "picture"])
    flags |> Answer.of_vllm!(fn -> Quantization.recommend(model, options) end) |> report(flags)
  end

  @doc false
  @spec report(Advice.t(), [String.t()]) :: :ok
  def report(advice, flags), do: Answer.print(advice, flags, &print(&1, "picture" in flags))

  defp print(advice, picture?) do
    Mix.shell().info("#{advice.model} for #{advice.goal} on #{advice.device}\n")
    Table.print(columns(advice), Enum.map(advice.choices, &row(&1, advice)))
    advice.choices |> Enum.take(1) |> Enum.each(&explain/1)
    ruled_out(advice)
    Enum.each(advice.notes, &Mix.shell().info("\n" <> &1))
    if picture?, do: Mix.shell().info("\n" <> advice.picture)
  end

  defp columns(advice) do
    ["format", {:right, "weights"}, {:right, "needs"}, "loss of quality"] ++
      if(training?(advice), do: [], else: [{:right, "one"}, {:right, "many"}]) ++
      [{:right, "score"}, "how to have it"]
  end

  defp row(choice, advice) do
    [choice.format, Bytes.memory(choice.memory), Bytes.memory(choice.needs), loss(choice)] ++
      if(training?(advice), do: [], else: [speed(choice, "one"), speed(choice, "many")]) ++
      [Table.decimal(choice.score, 2), how(choice)]
  end

  defp training?(advice), do: is_map_key(advice.weights, "training")

  @colours %{"none" => :green, "negligible" => :green, "noticeable" => :yellow, "large" => :red}

  defp loss(%{loss: nil}), do: "?"

  defp loss(%{loss: %{"class" => class}}) do
    case @colours do
      %{^class => colour} -> {colour, class}
      _ -> class
    end
  end

  defp speed(%{speed: nil}, _name), do: "?"
  defp speed(%{speed: speed}, name), do: "#{Table.decimal(speed[name], 1)} x"

  # The first way is the least work.
  defp how(%{ways: []}), do: ""
  defp how(%{ways: [way | _]}), do: way["text"]

  defp explain(choice) do
    Mix.shell().info(["\n", :bright, choice.format, :reset])
    Enum.each(choice.reasons, &hanging("  ", &1))
    Enum.each(choice.ways, &hanging("  -> ", &1["text"]))
  end

  defp hanging(mark, text) do
    for {line, index} <- text |> Table.wrap() |> Enum.with_index(),
        do: Mix.shell().info(if(index == 0, do: mark, else: "    ") <> line)
  end

  defp ruled_out(%{choices: [], ruled_out: []}), do: Mix.shell().info("There is no format of it.")
  defp ruled_out(%{ruled_out: []}), do: :ok

  defp ruled_out(%{ruled_out: ruled_out}) do
    Mix.shell().info(["\n", :bright, "Ruled out", :reset])
    Table.print(["format", {:right, "needs"}, "why"], Enum.map(ruled_out, &ruled_out_row/1))
  end

  defp ruled_out_row(one), do: [one.format, Bytes.memory(one.needs), one.message]
end
