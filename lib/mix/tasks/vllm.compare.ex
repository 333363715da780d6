defmodule Mix.Tasks.Vllm.Compare do
  @shortdoc "Says what models have lost that were made of another"

  @moduledoc """
  Says what models have lost that were made of another, the first one.

      mix vllm.compare MODEL MODEL… [--plot FILE] [--json]

      mix vllm.compare meta-llama/Llama-3.2-1B /models/Llama-3.2-1B-AWQ llama:Q4_K_M

  Each is loaded and measured, one after the other. Prints a row for each: size, perplexity, KL divergence from
  the first, how often both hold the same token for the likeliest, tokens/s, and whether it lost more
  than its format usually does; then what to try instead. `VLLM.Quantization.compare/2` answers the
  same in Elixir, and `guides/quantizing.md` says what the figures mean.

  ## Options

    * `--plot FILE` - writes a picture of quality over size, and of the models side by side: a `.svg`, `.png` or
      `.pdf`. matplotlib draws it (`mix vllm.setup --with matplotlib`)
    * `--reference MODEL` - the model to compare with, where it is not the first
    * `--text FILE` - measures on this text instead of the one that ships
    * `--max-tokens N` - of how many tokens the probabilities are measured at most, 2048 by default
    * `--json` - prints all of the answer as JSON and nothing else

  Options of an engine are taken by their names, with `-` for `_`, and are the same for all models.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments}
  alias VLLM.Quantization
  alias VLLM.Quantization.Comparison

  @requirements ["app.config"]

  @impl Mix.Task
  def run(argv) do
    {models, options, flags} = Arguments.parse_all!(argv, "vllm.compare", ["json"])
    {plot, options} = Map.pop(options, "plot")
    Answer.check_picture!(plot, "quality.svg", options)
    options = options |> with_text() |> quiet(flags)
    models |> Quantization.compare(options) |> Answer.ok!() |> report(flags, plot, options)
  end

  @doc false
  @spec report(Comparison.t(), [String.t()], String.t() | nil, map()) :: :ok
  def report(comparison, flags, plot, options) do
    Answer.print(comparison, flags, &print/1)
    Answer.picture!(plot, options, &Comparison.plot(comparison, &1))
  end

  defp print(comparison), do: comparison |> Comparison.lines() |> Enum.each(&Mix.shell().info/1)

  defp with_text(%{"text" => path} = options) do
    case File.read(path) do
      {:ok, text} -> options |> Map.delete("text") |> Map.put("texts", [text])
      {:error, reason} -> Mix.raise("#{path} cannot be read: #{:file.format_error(reason)}")
    end
  end

  defp with_text(options), do: options

  defp quiet(options, flags),
    do: if("json" in flags, do: Map.put(options, "progress", false), else: options)
end
